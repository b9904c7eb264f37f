"""The training loop and its parts: state, steps, optimizers, averaging, evaluation and metrics."""
