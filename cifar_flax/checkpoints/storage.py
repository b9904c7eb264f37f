"""Save, verify and restore the arrays of checkpoints. Only this module imports Orbax."""

import contextlib
import inspect
import logging
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

# Silence Orbax's and asyncio's per-array logging; failures are reported by the exception.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _report(unraisable: Any, report: Any = sys.unraisablehook) -> None:
    """Suppress the tracebacks of reads and writes that end after Orbax has given up."""
    file = unraisable.object.cr_code.co_filename if inspect.iscoroutine(unraisable.object) else ""
    if "orbax" not in file and "Event loop is closed" not in str(unraisable.exc_value):
        report(unraisable)


sys.unraisablehook = _report

# Orbax passes absolute paths to `glob`. If a folder's name is a pattern, the files of a save are not found and not
# merged, without an error.
_PATTERN = re.compile(r"[*?\[\\]")


class Storage:
    """Save and restore dicts from names such as "params/conv/kernel" to arrays, in subfolders of one folder."""

    def __init__(self, folder: Path):
        self._orbax, self._reader = ocp.StandardCheckpointer(), ocp.PyTreeCheckpointHandler()
        self._folder, self._stack = folder, contextlib.ExitStack()
        if _PATTERN.search(str(folder)):
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
        self._orbax.wait_until_finished()

    def verify(self, path: str, described: Mapping[str, str]) -> None:
        """Read the arrays back, in this process only. Raise an exception unless they are as `described`."""
        wanted = unflatten_dict(dict.fromkeys(described, ocp.RestoreArgs(restore_type=np.ndarray)), sep="/")
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=wanted)
        found = flatten_dict(self._reader.restore(self._folder / path, args=arguments), sep="/")
        if describe(found) != described:
            raise ValueError("the arrays read back from the disk have other shapes")

    def restore(self, path: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Return the saved arrays, with the shardings of `abstract`. Partial matches raise no error."""
        restored = self._orbax.restore(self._folder / path, unflatten_dict(abstract, sep="/"))
        return dict(flatten_dict(restored, sep="/"))


def describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict from name to shape and dtype, such as "(3, 3) float32"."""
    return {name: f"{array.shape} {array.dtype}" for name, array in arrays.items()}
