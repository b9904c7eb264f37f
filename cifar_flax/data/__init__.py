"""Data: sources -> cache -> order -> batches."""
