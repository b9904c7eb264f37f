"""Save and restore checkpoints.

`storage.py` writes the state to `checkpoints/<step>/state/`, `metadata.py` the metadata beside it. A save writes to
`<step>.unfinished`, which is renamed to `<step>` when it was read back; a killed run may leave an unfinished folder.
Damaged checkpoints are quarantined: renamed to `<step>.damaged`.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
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
from cifar_flax.checkpoints.storage import Storage, describe
from cifar_flax.errors import DivergedError, UserError, one_line, require
from cifar_flax.runtime import processes
from cifar_flax.runtime.trees import all_finite, named_leaves

_STATE = "state"

_is_finite = jax.jit(all_finite)


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    every_epochs: int = 1  # epochs between checkpoints; the last step is always saved
    keep: int = 2  # number of newest checkpoints to keep
    keep_best: int = 0  # number of checkpoints with the highest validation accuracy to keep as well

    def validate(self) -> None:
        for field in ("every_epochs", "keep"):
            require(getattr(self, field) >= 1, f"checkpoint.{field}", getattr(self, field), "must be at least 1")
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must be at least 0")


def steps_to_keep(accuracies: Mapping[int, float | None], newest: int, best: int) -> set[int]:
    """Return the last `newest` steps and the `best` steps with the highest accuracy; ties go to the later step.

    Steps whose accuracy is None or NaN do not count as best.
    """
    judged = [(value, step) for step, value in accuracies.items() if value is not None and not math.isnan(value)]
    return {*sorted(accuracies, reverse=True)[:newest], *(step for _, step in sorted(judged, reverse=True)[:best])}


class Checkpoints:
    """Save, restore and remove the checkpoints of one workdir: the state's arrays, and metadata."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self._folder, self._config = folder.absolute(), config
        self._storage = Storage(self._folder)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._restored = 0  # step of the checkpoint that the run resumed from; 0: none

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Close, except after an error in a multi-process run: the save would wait for processes that may be gone."""
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(UserError):  # the first error is the one to report
                self.close()

    def close(self) -> None:
        """Wait for the save in the background, and raise its error if it failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._storage.close()

    def save(self, state: Any, content: Metadata, accuracy: float | None = None, *, is_extra: bool = False) -> None:
        """Save `state`, a pytree with a `step`, and the JSON object `content` in the background.

        When this method returns, the caller may donate the state. `accuracy` is the validation accuracy or None.

        `is_extra` marks a checkpoint saved outside the schedule because the run was stopped. It is removed when there
        is a newer one and does not count towards `keep`, so that the resumed run ends with the checkpoints of an
        uninterrupted run.

        Raise `DivergedError` if the state is not finite, `UserError` if the previous save failed.
        """
        self.wait()
        step = int(jax.device_get(state.step))
        if not jax.device_get(_is_finite(state)):
            raise DivergedError(f"the state after step {step} is not finite and is not saved: training has diverged")
        arrays = named_leaves(state)
        metadata = {"step": step, "accuracy": accuracy, "is_extra": is_extra, "arrays": describe(arrays), **content}
        with self._errors(step):
            if step == self._restored:  # the same state is on disk already
                if processes.is_main():
                    write_metadata(self._path(step), metadata | {"sha256": self.metadata(step)["sha256"]})
            else:
                unfinished = self._path(f"{step}.unfinished")
                if processes.is_main():
                    unfinished.mkdir(parents=True)
                self._storage.start(f"{unfinished.name}/{_STATE}", arrays)
                self._saving = step, self._thread.submit(self._finish, unfinished, metadata)

    def _finish(self, unfinished: Path, metadata: Metadata) -> None:
        """Finish `save` in the background: rename the complete checkpoint to its step, and remove old ones."""
        try:
            self._storage.finish()
            if not processes.is_main():
                return
            self._storage.verify(f"{unfinished.name}/{_STATE}", metadata["arrays"])
            write_metadata(unfinished, metadata | {"sha256": files.checksums(unfinished / _STATE)})
            files.publish(unfinished, self._path(metadata["step"]))
        except BaseException:
            if processes.is_main():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._remove_old()

    def _remove_old(self) -> None:
        steps, extra = self.steps(), set()
        accuracies: dict[int, float | None] = {}  # checkpoints that are not extra
        for step in steps:
            try:
                metadata = self.metadata(step)
            except DamagedError:
                metadata = {"is_extra": True}
            except UserError:  # cannot be read for now, but may be the best: keep it
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
                raise UserError(f"the old checkpoint {self._path(step)} cannot be removed ({error})") from error

    def check(self) -> None:
        """Raise `UserError` if a save in the background has failed."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in the background is on disk; raise `UserError` if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._errors(saving[0]):
                saving[1].result()

    @contextlib.contextmanager
    def _errors(self, step: int) -> Iterator[None]:
        """Raise errors of a save as one `UserError` that names the step to resume from."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if lost := processes.lost_peer(error):
                raise lost from error
            newest = max(self.steps(), default=None)
            left = "there is no earlier one" if newest is None else f"the same command resumes from step {newest}"
            what = f"the checkpoint of step {step} could not be saved in {self._folder}"
            raise UserError(f"{what}; {left} ({one_line(error)})") from error

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, intact or not, in ascending order."""
        return saved_steps(self._folder)

    def newest_step(self) -> int | None:
        """Return the newest step that has a checkpoint, or None; the main process decides for all."""
        return processes.from_main(max(self.steps(), default=0)) or None

    def best_step(self) -> int | None:
        """Return the step with the highest validation accuracy, or None. Raise `UserError` if one cannot be read."""
        accuracies = {step: self.metadata(step)["accuracy"] for step in self.steps()}
        return processes.from_main(max(steps_to_keep(accuracies, 0, 1), default=0)) or None

    def metadata(self, step: int) -> Metadata:
        """Return the metadata of the checkpoint of `step`; raise `UserError` if it cannot be read."""
        return read_metadata(self._folder, step)

    def restore_newest(self, template: PyTree) -> tuple[PyTree, Metadata] | None:
        """Return state and metadata of the newest intact checkpoint, or None if the run has no checkpoint.

        Newer checkpoints that are damaged are renamed to `<step>.damaged`, and the reason is logged. The remains of a
        killed run are removed.

        Raise `UserError` if all checkpoints are damaged, if one cannot be read, or if the state does not match
        `template`.
        """
        _is_finite(template)  # compile it now, so that no save has to wait
        step = processes.from_main(self._newest_intact() if processes.is_main() else 0)
        if step < 0:
            raise UserError(
                f"{self._folder}: all checkpoints are damaged; to restart training, choose another --workdir"
            )
        if not step:
            return None
        self._restored = step
        if processes.is_main():
            self._remove_old()
        return self.restore(step, template), self.metadata(step)

    def _newest_intact(self) -> int:
        """Return the newest intact step, 0 if there is no checkpoint, or -1 if all are damaged."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob("*.unfinished"):
            shutil.rmtree(left, ignore_errors=True)
        damaged = []
        for step in reversed(self.steps()):
            try:
                self._require_intact(self.metadata(step))
            except DamagedError as error:
                processes.log(f"the checkpoint of step {step} is damaged ({error.__cause__})")
                damaged.append(step)
            else:
                # If all are damaged, none is renamed, so that the next start reports them again.
                for other in damaged:
                    quarantined = self._path(f"{other}.damaged")
                    shutil.rmtree(quarantined, ignore_errors=True)
                    self._path(other).rename(quarantined)
                    processes.log(f"using step {step}; step {other} is renamed to {quarantined.name}")
                return step
        return -1 if damaged else 0

    def restore(self, step: int, template: PyTree) -> PyTree:
        """Return the state saved at `step`, with the structure, shapes and shardings of `template`.

        Raise `UserError` if the saved state has another structure or is damaged.
        """
        metadata, wanted = self.metadata(step), named_leaves(template)
        self._require_intact(metadata)
        described = describe(wanted)
        for name in sorted(described.keys() | metadata["arrays"].keys()):
            ours, theirs = described.get(name, "absent"), metadata["arrays"].get(name, "absent")
            if ours != theirs:
                difference = f"{name} is {theirs} in the checkpoint, {ours} in this run"
                raise UserError(f"{self._path(step)} does not match this run: {difference}; choose another --workdir")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        try:
            arrays = self._storage.restore(f"{step}/{_STATE}", abstract)
        except Exception as error:
            raise unreadable(self._folder, step, error) from error
        return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])

    def _require_intact(self, metadata: Metadata) -> None:
        """Raise `DamagedError` if the state's files do not match their checksums, `UserError` if one is unreadable."""
        try:
            files.require_checksums(self._path(metadata["step"]) / _STATE, metadata["sha256"])
        except (OSError, ValueError) as error:
            raise unreadable(self._folder, metadata["step"], error) from error

    def _path(self, name: int | str) -> Path:
        return self._folder / str(name)
