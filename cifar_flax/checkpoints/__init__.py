"""Checkpoint files and their metadata."""
