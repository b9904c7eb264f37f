"""Trains, evaluates and uses image classifiers: `python main.py --help`."""

from cifar_flax.cli import entry_point

if __name__ == "__main__":
    entry_point()
