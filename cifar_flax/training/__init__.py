"""The training step, its loop and what they consist of."""
