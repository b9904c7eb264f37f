"""One file per mode of the command line."""
