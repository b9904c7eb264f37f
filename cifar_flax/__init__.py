"""Train, checkpoint and evaluate small-image classifiers in JAX and Flax."""

__version__ = "0.1.0"
