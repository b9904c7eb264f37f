"""Devices, processes, signals, compilation and memory: where and how programs run."""
