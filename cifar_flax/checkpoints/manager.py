"""Checkpoints on disk. The only file that imports Orbax.

Layout: `checkpoints/<step>/state/` is Orbax's, beside it lies the metadata of `metadata.py`. A folder appears under its
number when it is complete, by one rename. Other names: `<step>.unfinished` is a save at work or what a killed one left,
`<step>.damaged` is not what had been saved.
"""

import contextlib
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from cifar_flax import files
from cifar_flax.checkpoints.metadata import (
    DamagedError,
    Metadata,
    read_metadata,
    saved_steps,
    unreadable,
    write_metadata,
)
from cifar_flax.errors import UserError, one_line, require
from cifar_flax.runtime import processes
from cifar_flax.runtime.trees import all_finite, named_leaves

# Orbax tells every step of every save, and asyncio of every array that a failed one has not come to: the error that is
# raised says it all.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

_STATE = "state"

_is_finite = jax.jit(all_finite)


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    every_epochs: int = 1  # epochs between checkpoints; the last step always has one
    keep: int = 2  # the newest so many stay on disk
    keep_best: int = 0  # and so many with the highest validation accuracy

    def validate(self) -> None:
        for field in ("every_epochs", "keep"):
            require(getattr(self, field) >= 1, f"checkpoint.{field}", getattr(self, field), "must be at least 1")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must be at least 0")


def steps_to_keep(accuracies: Mapping[int, float | None], newest: int, best: int) -> set[int]:
    """Which of the steps stay: the last `newest`, and the `best` of highest accuracy; later ones where it is equal.

    Steps without an accuracy, or with NaN, are among the best of nothing.
    """
    judged = [(value, step) for step, value in accuracies.items() if value is not None and not math.isnan(value)]
    return {*sorted(accuracies, reverse=True)[:newest], *(step for _, step in sorted(judged, reverse=True)[:best])}


class Checkpoints:
    """The checkpoints of one workdir: the state as nested dicts of arrays, and what `save` is told with it."""

    def __init__(self, folder: Path, config: CheckpointConfig, *, read_only: bool = False):
        self._folder, self._config = folder.absolute(), config
        self._orbax = ocp.StandardCheckpointer()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._restored = 0  # the step of the checkpoint that the run goes on from
        if not read_only and processes.is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob("*.unfinished"):
                shutil.rmtree(left, ignore_errors=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Closes; but not after an error in one of several processes, whose save waits for others that may be gone."""
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(UserError):  # the first error is the one to tell
                self.close()

    def close(self) -> None:
        """Waits for the save in the background; raises what it raised."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def save(self, state: Any, content: Metadata, accuracy: float | None = None, *, is_extra: bool = False) -> None:
        """Save `state`, a pytree with a `step`, and `content` (of JSON) in the background.

        Returns when the state may be changed.

        `accuracy` is the validation split's, None where there is none. One that `is_extra`, as where a run is stopped,
        stays until there is a newer one and takes no place: in the end the run has the checkpoints that it would have.

        Raises `UserError` where the state is not finite, and for a save before this one that has failed.
        """
        self.wait()
        step = int(jax.device_get(state.step))
        if not jax.device_get(_is_finite(state)):
            raise UserError(f"the state after step {step} is not finite: training has diverged; it is not saved")
        arrays = named_leaves(state)
        shapes = {name: f"{array.shape} {array.dtype}" for name, array in arrays.items()}
        metadata = {"step": step, "accuracy": accuracy, "is_extra": is_extra, "arrays": shapes, **content}
        with self._errors(step):
            if step == self._restored:  # the state is there, and the same to the bit
                if processes.is_main():
                    write_metadata(self._path(step), metadata | {"sha256": self.metadata(step)["sha256"]})
            else:
                unfinished = self._path(f"{step}.unfinished")
                if processes.is_main():
                    unfinished.mkdir()
                self._orbax.save(unfinished / _STATE, unflatten_dict(arrays, sep="/"))
                self._saving = step, self._thread.submit(self._finish, unfinished, metadata)

    def _finish(self, unfinished: Path, metadata: Metadata) -> None:
        """The part of `save` in the background: a complete checkpoint gets its name, others may go."""
        try:
            with _quiet():
                self._orbax.wait_until_finished()
            if not processes.is_main():
                return
            write_metadata(unfinished, metadata | {"sha256": files.checksums(unfinished / _STATE)})
            files.publish(unfinished, self._path(metadata["step"]))
        except BaseException:
            if processes.is_main():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._remove_old()

    def _remove_old(self) -> None:
        steps, extra = self.steps(), set()
        accuracies: dict[int, float | None] = {}  # of those that are no extra
        for step in steps:
            try:
                metadata = self.metadata(step)
            except DamagedError:
                metadata = {"is_extra": True}
            except UserError:  # cannot be read today: it may be the best
                continue
            if metadata["is_extra"]:
                extra.add(step)
            else:
                accuracies[step] = metadata["accuracy"]
        stay = steps_to_keep(accuracies, self._config.keep, self._config.keep_best)
        for step in (accuracies.keys() | extra) - stay - {steps[-1]}:
            try:
                files.remove_folder(self._path(step), self._path(f"{step}.unfinished"))
            except OSError as error:
                raise UserError(f"{self._path(step)} is kept no longer, but cannot be removed ({error})") from error

    def check(self) -> None:
        """Raises `UserError` if a save in the background has failed."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises `UserError` if it cannot be."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._errors(saving[0]):
                saving[1].result()

    @contextlib.contextmanager
    def _errors(self, step: int) -> Iterator[None]:
        """Turns what goes wrong in saving into one message."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if lost := processes.lost_peer(error):
                raise lost from error
            newest = max(self.steps(), default=None)
            left = "there is no other" if newest is None else f"the same command goes on from step {newest}"
            what = f"the checkpoint of step {step} could not be saved in {self._folder}"
            raise UserError(f"{what}; {left} ({one_line(error)})") from error

    def steps(self) -> list[int]:
        """Those that have a checkpoint, intact or not, in order."""
        return saved_steps(self._folder)

    def newest_step(self) -> int | None:
        return processes.from_main(max(self.steps(), default=0)) or None

    def best_step(self) -> int | None:
        """The step of the highest validation accuracy among those on disk; raises `UserError` if one cannot be read."""
        accuracies = {step: self.metadata(step)["accuracy"] for step in self.steps()}
        accuracies = {step: value for step, value in accuracies.items() if value is not None}
        return processes.from_main(max(steps_to_keep(accuracies, 0, 1), default=0)) or None

    def metadata(self, step: int) -> Metadata:
        """Return the metadata of the checkpoint of `step`; raise `UserError` if it cannot be read."""
        return read_metadata(self._folder, step)

    def restore_newest(self, template: PyTree) -> tuple[PyTree, Metadata] | None:
        """Return state and metadata of the newest intact checkpoint, or None if the run has no checkpoint.

        Those that are not are set aside, with a line that says why.

        Raises `UserError` where there are some, but none intact, where one cannot be read, and where the state does not
        fit `template`.
        """
        _is_finite(template)  # compiled here, so that no save waits for it
        step = processes.from_main(self._newest_intact() if processes.is_main() else 0)
        if step < 0:
            raise UserError(
                f"{self._folder}: none of its checkpoints is as it was saved; to start anew, choose another --workdir"
            )
        if not step:
            return None
        self._restored = step
        if processes.is_main():
            self._remove_old()  # a killed run may not have come to it
        metadata = self.metadata(step)
        return self._load(metadata, template), metadata

    def _newest_intact(self) -> int:
        """0 where there is no checkpoint at all, -1 where none is intact."""
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                self._require_intact(self.metadata(step))
            except DamagedError as error:
                damaged[step] = str(error.__cause__)
            else:
                for other, why in damaged.items():  # only now: where all are, a second start must see that too
                    aside = self._path(f"{other}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    self._path(other).rename(aside)
                    what = f"the checkpoint of step {other} is damaged ({why})"
                    processes.log(f"{what}, now {aside.name}; using {step}")
                return step
        for step, why in damaged.items():
            processes.log(f"the checkpoint of step {step} is damaged ({why})")
        return -1 if damaged else 0

    def restore(self, step: int, template: PyTree) -> PyTree:
        """The state saved at `step`, with the structure, the shapes and the devices of `template`.

        Raises `UserError` if it has another structure or is not as it was saved.
        """
        metadata = self.metadata(step)
        self._require_intact(metadata)
        return self._load(metadata, template)

    def _load(self, metadata: Metadata, template: PyTree) -> PyTree:
        step, wanted = metadata["step"], named_leaves(template)
        # Orbax would load a part of a state that does not fit.
        for name in sorted(wanted.keys() | metadata["arrays"].keys()):
            ours = f"{wanted[name].shape} {wanted[name].dtype}" if name in wanted else "absent"
            theirs = metadata["arrays"].get(name, "absent")
            if ours != theirs:
                difference = f"{name} is {theirs} there and {ours} here"
                raise UserError(f"{self._path(step)} does not fit this run: {difference}; choose another --workdir")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        try:
            restored = self._orbax.restore(self._path(step) / _STATE, unflatten_dict(abstract, sep="/"))
        except Exception as error:
            raise unreadable(self._folder, step, error) from error
        arrays = flatten_dict(restored, sep="/")
        return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])

    def _require_intact(self, metadata: Metadata) -> None:
        """Raises `DamagedError` unless the state's files are as they were saved, `UserError` if they cannot be read."""
        try:
            files.require_checksums(self._path(metadata["step"]) / _STATE, metadata["sha256"])
        except (OSError, ValueError) as error:
            raise unreadable(self._folder, metadata["step"], error) from error

    def _path(self, name: int | str) -> Path:
        return self._folder / str(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Here, and after an error for good, writes that end when Orbax has given up print no traceback each."""
    hook = sys.unraisablehook

    def without_closed_loops(what: Any) -> None:
        if "Event loop is closed" not in str(what.exc_value):
            hook(what)

    sys.unraisablehook = without_closed_loops
    yield
    sys.unraisablehook = hook
