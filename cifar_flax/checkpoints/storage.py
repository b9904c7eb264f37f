"""Save, verify and restore the arrays of checkpoints. Only this module imports Orbax."""

import contextlib
import inspect
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_flax.errors import UserError

# Silence Orbax's and asyncio's per-array logging; failures are reported by the exception.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

# Orbax passes absolute paths to `glob`. If a folder's name is a pattern, the files of a save are not found and not
# merged, without an error.
_PATTERN = re.compile(r"[*?\[\\]")


class Storage:
    """Save and restore dicts from names such as "params/conv/kernel" to arrays, in subfolders of one folder."""

    def __init__(self, folder: Path):
        self._orbax, self._reader = ocp.StandardCheckpointer(), ocp.PyTreeCheckpointHandler()
        self._folder, self._stack = folder, contextlib.ExitStack()
        if _PATTERN.search(str(folder)):
            if _PATTERN.search(tempfile.gettempdir()):
                raise UserError(f"TMPDIR={tempfile.gettempdir()}: must not contain *, ?, [ or \\ if {folder} does")
            temporary = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cifar_flax."))
            self._folder = Path(temporary, "checkpoints")
            self._folder.symlink_to(folder)

    def close(self) -> None:
        self._orbax.close()
        self._stack.close()

    def start(self, path: str, arrays: Mapping[str, jax.Array]) -> None:
        """Begin to save `arrays` in the background. When this method returns, the caller may donate them."""
        self._orbax.save(self._folder / path, unflatten_dict(arrays, sep="/"))

    def finish(self) -> None:
        """Wait until the files are written."""
        with _quiet():
            self._orbax.wait_until_finished()

    def verify(self, path: str, described: Mapping[str, str]) -> None:
        """Read the arrays back, in this process only. Raise an exception unless they are as `described`."""
        wanted = unflatten_dict(dict.fromkeys(described, ocp.RestoreArgs(restore_type=np.ndarray)), sep="/")
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=wanted)
        with _quiet():
            found = flatten_dict(self._reader.restore(self._folder / path, args=arguments), sep="/")
        if describe(found) != described:
            raise ValueError("the arrays read back from the disk have other shapes")

    def restore(self, path: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Return the saved arrays, with the shardings of `abstract`. Partial matches raise no error."""
        with _quiet():
            restored = self._orbax.restore(self._folder / path, unflatten_dict(abstract, sep="/"))
        arrays: dict[str, jax.Array] = flatten_dict(restored, sep="/")
        return arrays


def describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict from name to shape and dtype, such as "(3, 3) float32"."""
    return {name: f"{array.shape} {array.dtype}" for name, array in arrays.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the tracebacks of reads and writes that end after Orbax has given up.

    If the block raises, they stay suppressed, since they may still end later.
    """
    hook = sys.unraisablehook

    def without_coroutines(unraisable: Any) -> None:
        if not (inspect.iscoroutine(unraisable.object) or "Event loop is closed" in str(unraisable.exc_value)):
            hook(unraisable)

    sys.unraisablehook = without_coroutines
    yield
    sys.unraisablehook = hook
