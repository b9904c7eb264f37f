"""Another run's weights as the first of this one."""

from pathlib import Path

import jax

from cifar_flax import averaging, distributed
from cifar_flax.config import Config
from cifar_flax.errors import UserError
from cifar_flax.experiment import DatasetInfo
from cifar_flax.state import TrainState, named_leaves
from cifar_flax.steps import Task
from cifar_flax.trained import restore, saved_config

_FIELD = "train.init_from"


def begin(config: Config, info: DatasetInfo, task: Task, state: TrainState) -> TrainState:
    """The first state `state` with the weights that `config.train.init_from` has trained, as far as they fit.

    A weight fits where one of the same name, such as "hidden.kernel", has the same shape: a head for another number of
    classes does not, and stays as it is. So does the optimizer. What does not fit is told, a line for each.

    Raises `ConfigError` where there is no checkpoint, `UserError` where none of its parameters fits.
    """
    folder = Path(config.train.init_from)
    saved = saved_config(folder, _FIELD)
    saved.parallel = config.parallel
    trained = restore(saved, folder, _FIELD)
    own = state.params, state.batch_stats
    ours, theirs = (
        {name: x for tree in trees for name, x in named_leaves(tree, ".").items()} for trees in (own, trained.weights)
    )
    fits = {name for name, array in ours.items() if name in theirs and theirs[name].shape == array.shape}
    unfit = [
        f"{name}: {_shape(theirs, name)} there, {_shape(ours, name)} here"
        for name in (ours | theirs)
        if name not in fits
    ]
    if not fits & named_leaves(state.params, ".").keys():
        raise UserError(f"{_FIELD}={str(folder)!r}: none of its weights fits this network ({'; '.join(unfit)})")
    distributed.say(f"begins with {len(fits)} of its {len(ours)} weights from {folder}, step {trained.step}")
    if trained.info.class_names != info.class_names and len(trained.info.class_names) == len(info.class_names):
        distributed.say(f"  its head is of other classes: {', '.join(trained.info.class_names)}")
    for line in unfit:
        distributed.say(f"  does not match: {line}")
    leaves = [theirs[name] if name in fits else array for name, array in ours.items()]
    params, batch_stats = jax.tree.unflatten(jax.tree.structure(own), leaves)
    opt_state, average = jax.jit(
        lambda weights: (task.optimizer.init(weights[0]), averaging.init(config.averaging, weights)),
        out_shardings=task.layout.replicated,
    )((params, batch_stats))
    return state._replace(params=params, batch_stats=batch_stats, opt_state=opt_state, average=average)


def _shape(arrays: dict[str, jax.Array], name: str) -> str:
    return str(arrays[name].shape) if name in arrays else "absent"
