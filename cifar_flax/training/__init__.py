"""Training: state, steps, optimizers, evaluation, metrics and the loop."""
