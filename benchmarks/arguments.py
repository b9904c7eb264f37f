"""Argument types of the benchmarks' command lines."""

import argparse


def at_least_one(text: str) -> int:
    """Return `text` as a count; argparse names the argument in its error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}; allowed: whole numbers from 1")
    return int(text)
