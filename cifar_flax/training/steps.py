"""The training and the evaluation step: pure functions of a state and a batch, written for one device.

Where several share the work, each has its rows of the batch, and `task.layout.axis_name` is what joins them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree, Shaped, UInt8

from cifar_flax.data.augment import VIEWS, AugmentConfig, augment, cutout, normalize, views
from cifar_flax.data.batches import Batch, Indices, gather
from cifar_flax.runtime.devices import Layout
from cifar_flax.runtime.trees import all_finite
from cifar_flax.training import averaging, metrics
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.metrics import StepMetrics
from cifar_flax.training.state import TrainState, root_keys

Inputs = Batch | Indices  # of one call
TrainCall = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]


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
    averaging: AveragingConfig
    total_steps: int
    layout: Layout
    sync_batchnorm: bool  # whether BatchNorm sees the batch of all devices
    skip_nonfinite: bool = False  # whether a step that is not finite changes nothing but the number of steps


def example_keys(seed: Array, epoch: Int32[Array, " batch"], index: Int32[Array, " batch"]) -> Key[Array, " batch"]:
    """One random key per example and epoch.

    It depends on nothing else: not on the example's place in the batch, on the device or on how often the run was
    interrupted.
    """
    _, root = root_keys(seed)
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(root, e), i))(epoch, index)


def train_step(task: Task, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Shaped[Array, ""]]]:
    """One step of gradient descent.

    Returns the new state and, over the whole batch as the network saw it (augmented, with dropout): the mean `loss`
    (with label smoothing), the `accuracy`, the `learning_rate` of the step, and whether loss and gradient are `finite`;
    with `task.skip_nonfinite`, whether the state that they lead to is, too.
    """
    axis_name = task.layout.axis_name
    keys, dropout_keys = _keys(state, batch, batch.epoch)
    first_keys, _ = _keys(state, batch, jnp.zeros_like(batch.epoch))
    image = augment(batch.image, keys, task.augment, epoch=batch.epoch, first_keys=first_keys)
    image = cutout(normalize(image, task.mean, task.std), keys, task.augment.cutout)

    def loss_fn(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
        model = nnx.merge(task.graphdef, params, state.batch_stats)
        logits = model(image, dropout_keys)
        target = optax.smooth_labels(jax.nn.one_hot(batch.label, logits.shape[-1]), task.label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, target))
        return loss, (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    # A copy of the parameters for each device: the gradient for what they share would be summed over the devices
    # already, and the mean below would change nothing.
    params = state.params if axis_name is None else jax.lax.pcast(state.params, axis_name, to="varying")
    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.label)
    if axis_name is not None:
        # Statistics of the whole batch are the same on each device. Where each has its own, their changes are averaged:
        # what no step changes, such as a whitening kernel, stays to the bit.
        changes = () if task.sync_batchnorm else jax.tree.map(jnp.subtract, batch_stats, state.batch_stats)
        grads, loss, accuracy, changes = jax.lax.pmean((grads, loss, accuracy, changes), axis_name)
        if not task.sync_batchnorm:
            batch_stats = jax.tree.map(jnp.add, state.batch_stats, changes)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
    step = state.step + 1
    weights = optax.apply_updates(state.params, updates), batch_stats
    weights, average = averaging.update(task.averaging, step, task.total_steps, weights, state.average)
    params, batch_stats = weights
    new_state = TrainState(
        step=step, seed=state.seed, params=params, batch_stats=batch_stats, opt_state=opt_state, average=average
    )
    finite = all_finite((loss, grads))
    if task.skip_nonfinite:
        finite &= all_finite(new_state)
        new_state = _unless_skipped(finite, new_state, state._replace(step=step))
    learning_rate = jnp.asarray(task.schedule(state.step), jnp.float32)
    return new_state, {"loss": loss, "accuracy": accuracy, "learning_rate": learning_rate, "finite": finite}


def _unless_skipped(finite: Bool[Array, ""], new: TrainState, old: TrainState) -> TrainState:
    """`new` where it is finite, else `old`; but a schedule's own count goes on with the steps, as the log has it."""

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def train_steps(
    task: Task,
    state: TrainState,
    indices: Indices,
    images: UInt8[Array, "n height width c"],
    labels: Int32[Array, " n"],
) -> tuple[TrainState, dict[str, Shaped[Array, " steps"]]]:
    """`train_step` for each row of `indices`, gathered from `images` and `labels`, in one loop on the device."""

    def step(state: TrainState, row: Indices) -> tuple[TrainState, dict[str, Array]]:
        return train_step(task, state, gather(images, labels, row))

    return jax.lax.scan(step, state, indices)


def _keys(state: TrainState, batch: Batch, epoch: Int32[Array, " batch"]) -> Key[Array, "2 batch"]:
    """The keys of the batch's examples in `epoch`: for augmentation and for dropout."""
    return jax.vmap(jax.random.split, out_axes=1)(example_keys(state.seed, epoch, batch.index))


def eval_step(
    task: Task, weights: PyTree, batch: Batch, *, tta: str = "none", at_least: float = 0.0
) -> tuple[metrics.Sums, Float[Array, "whole classes"], Bool[Array, " whole"]]:
    """What the batch adds to an evaluation of the network as it is used: running statistics and no augmentation.

    `weights` are params and batch_stats; with `tta`, a name in `VIEWS`, the logits of several views are averaged. Only
    examples whose top probability is `at_least` that are counted. Also returns the probabilities of all examples, and
    which of them are counted: of the whole batch, on each device.
    """
    logits = _logits(task, weights, batch.image, tta)
    probability = jax.nn.softmax(logits)
    counted = batch.mask if at_least == 0 else batch.mask & (jnp.max(probability, axis=-1) >= at_least)
    sums = metrics.evaluation_sums(logits, batch.label, counted)
    if (axis_name := task.layout.axis_name) is not None:
        sums = jax.lax.psum(sums, axis_name)
    return sums, all_gather(task, probability), all_gather(task, counted.astype(jnp.int32)) > 0


def predict_step(
    task: Task,
    weights: PyTree,
    image: UInt8[Array, "batch h w c"],
    *,
    tta: str = "none",
    tta_below: float | None = None,
) -> Float[Array, "whole classes"]:
    """The probabilities that an evaluation with the same `tta` and `tta_below` counts, of the whole batch."""
    probability = jax.nn.softmax(_logits(task, weights, image, tta))
    if tta_below is not None:
        alone = jax.nn.softmax(_logits(task, weights, image, "none"))
        probability = jnp.where(jnp.max(alone, axis=-1, keepdims=True) >= tta_below, alone, probability)
    return all_gather(task, probability)


def all_gather(task: Task, rows: Shaped[Array, "batch *rest"]) -> Shaped[Array, "whole *rest"]:
    """The rows of all devices, one after the other, on each of them."""
    axis_name = task.layout.axis_name
    if axis_name is None:
        return rows
    # A sum with zeros, which is exact: of what is gathered, shard_map does not know that it is the same everywhere.
    everywhere = jnp.zeros((task.layout.num_devices, *rows.shape), rows.dtype)
    summed = jax.lax.psum(everywhere.at[jax.lax.axis_index(axis_name)].set(rows), axis_name)
    return summed.reshape(-1, *rows.shape[1:])


def _logits(task: Task, weights: PyTree, image: UInt8[Array, "batch h w c"], tta: str) -> Float[Array, "batch classes"]:
    model = nnx.merge(task.graphdef, *weights)
    if tta == "none":
        return model(normalize(image, task.mean, task.std))
    # One view after the other: all at once would take as many times the memory.
    logits = jax.lax.map(lambda view: model(normalize(view, task.mean, task.std)), views(image, tta))
    # Written out: a matrix product would round to the few bits that accelerators multiply with.
    return jnp.sum(jnp.asarray(VIEWS[tta])[:, None, None] * logits, axis=0)
