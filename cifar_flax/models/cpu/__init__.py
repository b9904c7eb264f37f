"""Kernels that are faster than XLA's on CPUs."""
