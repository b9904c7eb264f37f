"""Checks for --mode=doctor: installation, devices and the run."""
