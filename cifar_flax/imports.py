"""What is there to import, and what libraries import besides what is needed of them."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def installed(name: str) -> bool:
    """Whether the module `name` could be imported; it is not."""
    return importlib.util.find_spec(name) is not None


@contextmanager
def without(name: str) -> Iterator[None]:
    """Here, whoever imports the module `name` is told that it is not installed, unless it is imported already.

    Libraries try such imports for the sake of users who might pass them that module's objects.
    """
    there = name in sys.modules
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # a module that is None cannot be imported
    try:
        yield
    finally:
        if not there:
            del sys.modules[name]
