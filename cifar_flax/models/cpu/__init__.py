"""Kernels for CPUs, where XLA is slow."""
