"""Data pipeline: sources -> cache -> sampling order -> batches -> augmentation."""
