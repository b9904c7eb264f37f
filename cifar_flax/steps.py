"""The training and the evaluation step: pure functions of a state and a batch."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32, Key, PyTree

from cifar_flax import metrics
from cifar_flax.data.augment import AugmentConfig, augment, normalize
from cifar_flax.data.batches import Batch
from cifar_flax.state import TrainState, root_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the steps are compiled for: everything about a run that is neither state nor data."""

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mean: tuple[float, ...]  # per channel, in units of the stored bytes
    std: tuple[float, ...]
    augment: AugmentConfig
    label_smoothing: float


def example_keys(seed: Array, epoch: Int32[Array, " batch"], index: Int32[Array, " batch"]) -> Key[Array, " batch"]:
    """One random key per example and epoch.

    It depends on nothing else: not on the example's place in the batch, on the device or on how often the run was
    interrupted.
    """
    _, root = root_keys(seed)
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(root, e), i))(epoch, index)


def train_step(task: Task, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step of gradient descent.

    Returns the new state and, over the batch as the network saw it (augmented, with dropout): the mean `loss` (with
    label smoothing), the `accuracy`, and the `learning_rate` of the step.
    """
    augment_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(
        example_keys(state.seed, batch.epoch, batch.index)
    )
    image = normalize(augment(batch.image, augment_keys, task.augment), task.mean, task.std)

    def loss_fn(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
        model = nnx.merge(task.graphdef, params, state.batch_stats)
        logits = model(image, dropout_keys)
        target = optax.smooth_labels(jax.nn.one_hot(batch.label, logits.shape[-1]), task.label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, target))
        return loss, (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
    new_state = TrainState(
        step=state.step + 1,
        seed=state.seed,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.label)
    learning_rate = jnp.asarray(task.schedule(state.step), jnp.float32)
    return new_state, {"loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}


def eval_step(task: Task, params: PyTree, batch_stats: PyTree, batch: Batch) -> metrics.Sums:
    """What the batch adds to an evaluation of the network as it is used: no augmentation, running statistics."""
    model = nnx.merge(task.graphdef, params, batch_stats)
    logits = model(normalize(batch.image, task.mean, task.std))
    return metrics.evaluation_sums(logits, batch.label, batch.mask)
