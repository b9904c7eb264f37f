"""Run the command line: `python -m cifar_flax` does the same as `python main.py`."""

from cifar_flax.cli import entry_point

if __name__ == "__main__":
    entry_point()
