"""Argument types of the benchmarks' command lines."""

import argparse


def at_least_one(text: str) -> int:
    """Convert `text` to a positive integer; argparse adds the name of the argument to the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text}")
    return int(text)
