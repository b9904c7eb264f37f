"""Logging: the terminal, metrics.jsonl and TensorBoard."""
