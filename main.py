"""Train, evaluate and use image classifiers; see `python main.py --help`."""

from cifar_flax.cli import entry_point

if __name__ == "__main__":
    entry_point()
