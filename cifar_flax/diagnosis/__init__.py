"""Checks of the installation, for --mode=doctor."""
