"""Standard input, output and error of a command."""

import contextlib
import io
import os
import sys


def prepare() -> None:
    """Make the standard streams usable. Call this before anything else opens a file.

    Open the null device for closed streams, whose descriptors would otherwise be reused by the next files: messages of
    libraries would be written to those. Print each line at once, and "?" for characters that stdout cannot encode.
    """
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:  # closed
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: that of the closed stream
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a killed run loses no printed line


def show(text: str, *, error: bool = False) -> None:
    """Print `text` to stdout, or to stderr if `error`. Ignore a closed pipe or a full disk, so that runs continue."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def printable(text: str) -> str:
    """Return `text`, such as a file name, with control characters replaced by "?"."""
    return "".join(character if character.isprintable() else "?" for character in text)
