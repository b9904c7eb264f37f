"""Restore a run from its workdir, to use the trained model or to initialize another run."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jaxtyping import PyTree

from cifar_flax import config as configs
from cifar_flax.checkpoints.manager import Checkpoints
from cifar_flax.checkpoints.metadata import CHECKPOINTS, Metadata, read_metadata, saved_steps, while_training
from cifar_flax.config import Config
from cifar_flax.data.info import DatasetInfo
from cifar_flax.errors import ConfigError, UserError, first_of, require
from cifar_flax.paths import local_path
from cifar_flax.runtime import processes
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.runtime.trees import named_leaves
from cifar_flax.training.setup import setup
from cifar_flax.training.state import TrainState
from cifar_flax.training.steps import Task

_NO_CHECKPOINT = "holds no checkpoint; run --mode=train first"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredRun:
    """A run restored from one of its checkpoints."""

    config: Config
    info: DatasetInfo
    task: Task
    state: TrainState
    metadata: Metadata  # metadata of the checkpoint

    @property
    def step(self) -> int:
        return int(self.metadata["step"])

    @property
    def weights(self) -> PyTree:
        """Return the (params, batch_stats) to evaluate: their EMA if `averaging.name` is ema, else the last ones."""
        return self.state.evaluated(self.config.averaging)


def saved_config(workdir: Path, field: str = "--workdir") -> Config:
    """Return the config saved with the newest checkpoint of `workdir`; raise `UserError` if there is none.

    `parallel` is reset to its defaults, since the devices may differ from those that trained the run. JAX's devices are
    not initialized, since this process may have to join others first. Messages refer to the folder as `field`.
    """
    require(workdir.is_dir(), field, str(workdir), "no such folder")
    folder = workdir / CHECKPOINTS

    def read() -> Config:
        if not (steps := saved_steps(folder)):
            raise ConfigError(f"{field}={str(workdir)!r}: {_NO_CHECKPOINT}")
        return configs.from_dict(read_metadata(folder, steps[-1])["config"])

    return dataclasses.replace(while_training(folder, read), parallel=ParallelConfig())


def restore(
    config: Config, workdir: Path, field: str = "--workdir", known: tuple[Task, TrainState] | None = None
) -> RestoredRun:
    """Restore the checkpoint in `workdir` that `config.eval.checkpoint` selects, on the devices of `config.parallel`.

    Of `config`, `data`, `eval` and `parallel` are used; the other settings are those saved with this checkpoint. If a
    training run removes the checkpoint meanwhile, select again. `known` are the task of the run and a state of its
    shapes, if the caller has them; otherwise, build them.

    Raise `UserError` if there is no such checkpoint or if it is damaged.
    """
    folder = workdir / CHECKPOINTS
    with Checkpoints(folder, config.checkpoint) as checkpoints:
        read = functools.partial(_read, checkpoints, config, f"{field}={str(workdir)!r}", known)
        # Not in a multi-process run, whose processes may differ in whether they find the checkpoint.
        return read() if processes.label() else while_training(folder, read)


def _read(checkpoints: Checkpoints, config: Config, where: str, known: tuple[Task, TrainState] | None) -> RestoredRun:
    step = checkpoints.newest_step()
    if step is None:
        raise ConfigError(f"{where}: {_NO_CHECKPOINT}")
    if config.eval.checkpoint == "best":
        step = checkpoints.best_step()
        if step is None:
            raise UserError(f"{where}: no checkpoint has a validation accuracy; use eval.checkpoint=newest")
    metadata = checkpoints.metadata(step)
    if (below := metadata["config"]["eval"].get("tta_below")) is not None:
        was = f"eval.tta_below={below}, which this run was saved with, no longer exists"
        processes.log(f"{was}: TTA is for all images, or for eval.tta_fraction of them")
    saved, info = configs.from_dict(metadata["config"]), DatasetInfo.from_dict(metadata["dataset"])
    config = dataclasses.replace(saved, data=config.data, eval=config.eval, parallel=config.parallel)
    if known is None:
        task, init = setup(config, info)
        shapes = jax.eval_shape(lambda: init(config.seed, None))
        known = task, jax.tree.map(lambda x: x.update(sharding=task.layout.replicated), shapes)
    task, template = known
    state = checkpoints.restore(step, template)
    return RestoredRun(config=config, info=info, task=task, state=state, metadata=metadata)


_FIELD = "train.init_from"


def init_from(
    config: Config,
    info: DatasetInfo,
    initialize_optimizer: Callable[[PyTree], tuple[PyTree, PyTree]],
    state: TrainState,
) -> TrainState:
    """Return the initial state `state` with the matching weights of the run `config.train.init_from`.

    Weights match if their names, such as "hidden.kernel", and their shapes are equal. Weights that do not match (such
    as a head for another number of classes) keep their fresh initialization and are logged. The optimizer state and the
    average of the weights are initialized afresh, by `initialize_optimizer`, a function (params, batch_stats) ->
    (opt_state, average).

    Raise `ConfigError` if a weight outside the head does not match and is frozen. Raise `UserError` if that run has no
    checkpoint or if none of its parameters matches.
    """
    folder = local_path(_FIELD, config.train.init_from)
    saved = saved_config(folder, _FIELD)
    saved.parallel = config.parallel
    run = restore(saved, folder, _FIELD)
    own = state.params, state.batch_stats
    ours, theirs = (
        {name: x for tree in trees for name, x in named_leaves(tree, ".").items()} for trees in (own, run.weights)
    )
    here, there = ({name: str(array.shape) for name, array in arrays.items()} for arrays in (ours, theirs))
    fits = {name for name in here if here[name] == there.get(name)}
    unfit = [
        f"{name}: {there.get(name, 'absent')} in that run, {here.get(name, 'absent')} in this run"
        for name in (here | there)
        if name not in fits
    ]
    outside = [line for line in unfit if not line.startswith("head.")]
    allowed = f"needs all weights outside the head from {_FIELD} ({first_of(outside)})"
    require(config.train.freeze == "none" or not outside, "train.freeze", config.train.freeze, allowed)
    if not fits & named_leaves(state.params, ".").keys():
        raise UserError(f"{_FIELD}={str(folder)!r}: none of its weights matches this model ({first_of(unfit)})")
    processes.log(f"initialized {len(fits)} of {len(ours)} weights from {folder}, step {run.step}", is_routine=True)
    if run.info.class_names != info.class_names and len(run.info.class_names) == len(info.class_names):
        processes.log(f"  that run has other classes: {', '.join(run.info.class_names)}", is_routine=True)
    if run.info.image_shape != info.image_shape:
        shapes = f"images of shape {run.info.image_shape}, this one {info.image_shape}"
        processes.log(f"  that run has {shapes}", is_routine=True)
    for line in unfit:
        processes.log(f"  does not match: {line}", is_routine=True)
    leaves = [theirs[name] if name in fits else array for name, array in ours.items()]
    params, batch_stats = jax.tree.unflatten(jax.tree.structure(own), leaves)
    opt_state, average = initialize_optimizer((params, batch_stats))
    return state._replace(params=params, batch_stats=batch_stats, opt_state=opt_state, average=average)
