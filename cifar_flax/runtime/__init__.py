"""Devices, processes, signals, compilation and memory of a run."""
