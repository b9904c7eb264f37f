"""A trained network, from the folder of its run."""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import PyTree

from cifar_flax import averaging, experiment
from cifar_flax import config as configs
from cifar_flax.checkpoint import Checkpoints
from cifar_flax.config import Config
from cifar_flax.errors import ConfigError, UserError
from cifar_flax.experiment import DatasetInfo
from cifar_flax.parallel import ParallelConfig
from cifar_flax.records import Record, read_record, saved_steps
from cifar_flax.state import TrainState
from cifar_flax.steps import Task
from cifar_flax.workdir import CHECKPOINTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    config: Config
    info: DatasetInfo
    task: Task
    state: TrainState
    record: Record  # of the checkpoint

    @property
    def step(self) -> int:
        step: int = self.record["step"]
        return step

    @property
    def weights(self) -> PyTree:
        """Parameters and batch statistics as they are evaluated."""
        state = self.state
        return averaging.evaluated(self.config.averaging, (state.params, state.batch_stats), state.average)


def saved_config(workdir: Path, field: str = "--workdir") -> Config:
    """The config saved with the newest checkpoint of `workdir`; raises `UserError` if there is none.

    But for `parallel`: what is trained is used where that is started. It may be by several processes, so nothing here
    makes JAX look for devices. `field` is what has named the folder.
    """
    folder = _checkpoint_folder(workdir, field)
    steps = saved_steps(folder)
    if not steps:
        raise _no_checkpoint(workdir, field)
    config = configs.from_dict(read_record(folder, steps[-1])["config"])
    config.parallel = ParallelConfig()
    return config


def restore(config: Config, workdir: Path, field: str = "--workdir") -> Trained:
    """The checkpoint of `workdir` that `config.eval.checkpoint` names, on the devices of `config.parallel`.

    Raises `UserError` where there is none, or it is not as it was saved.
    """
    with Checkpoints(_checkpoint_folder(workdir, field), config.checkpoint, read_only=True) as checkpoints:
        step = checkpoints.newest_step()
        if step is None:
            raise _no_checkpoint(workdir, field)
        if config.eval.checkpoint == "best":
            step = checkpoints.best_step()
            if step is None:
                raise UserError(f"{field}={str(workdir)!r}: none of its checkpoints has a validation accuracy")
        record = checkpoints.record(step)
        info = DatasetInfo.from_dict(record["dataset"])
        task, init = experiment.build(config, info)
        state = checkpoints.restore(step, init(config.seed, None))
    return Trained(config=config, info=info, task=task, state=state, record=record)


def _checkpoint_folder(workdir: Path, field: str) -> Path:
    folder = workdir / CHECKPOINTS
    if not workdir.is_dir():
        raise ConfigError(f"{field}={str(workdir)!r}: no such folder")
    if not folder.is_dir():
        raise ConfigError(f"{field}={str(workdir)!r}: holds no checkpoint; train one first")
    return folder


def _no_checkpoint(workdir: Path, field: str) -> UserError:
    return UserError(f"{field}={str(workdir)!r}: holds no finished checkpoint; train one first")
