"""Checkpoints on disk. The only file that imports Orbax."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from cifar_flax import distributed
from cifar_flax.errors import UserError, require
from cifar_flax.state import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of every save


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    every_epochs: int = 1  # epochs between checkpoints; the last step always has one
    keep: int = 2  # the newest so many stay on disk
    keep_best: bool = False  # the one with the highest validation accuracy stays too

    def validate(self) -> None:
        for field in ("every_epochs", "keep"):
            require(getattr(self, field) >= 1, f"checkpoint.{field}", getattr(self, field), "must be at least 1")


class Checkpoints:
    """The checkpoints of one workdir: the state as nested dicts of arrays, `metadata` as JSON."""

    def __init__(self, folder: Path, config: CheckpointConfig, *, read_only: bool = False):
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(config.keep)]
        best_fn = None
        if config.keep_best:
            best_fn = _accuracy
            # Alone, BestN could delete the newest checkpoint, from which a run resumes.
            keep.append(policies.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False))
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                best_fn=best_fn,
                create=not read_only,
                read_only=read_only,
                single_host_load_and_broadcast=True,  # hosts may see a new folder later than the one that made it
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()},
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Closes; but not after an error in one of several processes, whose save waits for others that may be gone."""
        if kind is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits for the save in the background."""
        self._manager.close()

    def newest_step(self) -> int | None:
        return _plain(self._manager.latest_step())

    def best_step(self) -> int | None:
        """The step of the highest validation accuracy among those on disk."""
        return _plain(self._manager.best_step())

    def save(self, state: TrainState, metadata: Mapping[str, Any], accuracy: float | None) -> None:
        """Saves in the background. `accuracy` is the validation split's, None where there is none."""
        step = int(state.step)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(unflatten_dict(_flatten(state), sep="/")),
            metadata=ocp.args.JsonSave(dict(metadata)),
        )
        metrics = None if accuracy is None else {"accuracy": accuracy}
        # force: Orbax would pass over a step that is not above the newest without a word.
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given as `metadata`; raises `UserError` if it cannot be read."""
        return _read_metadata(self._folder, step)

    def restore(self, step: int, template: TrainState) -> TrainState:
        """The state saved at `step`, with the structure, the shapes and the devices of `template`.

        Raises `UserError` if it has another structure or cannot be read.
        """
        wanted = _flatten(template)
        try:
            saved = flatten_dict(self._manager.item_metadata(step)["state"].tree, sep="/")
        except Exception as error:
            raise _unreadable(self._folder, step, error) from error
        # Orbax would load a part of a state that does not fit.
        for name in sorted(wanted.keys() | saved.keys()):
            ours, theirs = (
                f"{tree[name].shape} {tree[name].dtype}" if name in tree else "absent" for tree in (wanted, saved)
            )
            if ours != theirs:
                raise UserError(
                    f"{self._folder}/{step} does not fit this run: {name} is {theirs} there and {ours} here"
                )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(unflatten_dict(abstract, sep="/")))
            restored = flatten_dict(self._manager.restore(step, args=args)["state"], sep="/")
        except Exception as error:
            raise _unreadable(self._folder, step, error) from error
        return jax.tree.unflatten(jax.tree.structure(template), [restored[name] for name in wanted])

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what the background save raised."""
        self._manager.wait_until_finished()


def newest_metadata(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's, None where there is none; may be called before `distributed.start`."""
    steps = ocp.utils.checkpoint_steps(folder)
    return _read_metadata(folder, max(steps)) if steps else None


def _read_metadata(folder: Path, step: int) -> dict[str, Any]:
    """From its file: Orbax would make JAX look for devices, which it must not before the processes have joined."""
    try:
        return json.loads((folder / str(step) / "metadata" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, step, error) from error


def _unreadable(folder: Path, step: int, error: Exception) -> UserError:
    if lost := distributed.lost_peer(error):
        return lost
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"the checkpoint {folder}/{step} cannot be read ({type(error).__name__}: {reason}); "
        "delete that folder to go on from the one before it"
    )


def _plain(step: Any) -> int | None:
    """What came from another process is NumPy's."""
    return None if step is None else int(step)


def _accuracy(metrics: Mapping[str, float]) -> float:
    return metrics["accuracy"]


def _flatten(state: TrainState) -> dict[str, jax.Array]:
    """Path -> array, such as "opt_state/0/mu/conv/kernel", in the order of the tree's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
