"""The training, evaluation and prediction steps: pure functions of a state and a batch, written for one device.

On several devices, each one runs the step on its rows of the batch, and collectives over the mesh axis
`task.layout.axis_name` combine the results.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree, Shaped, UInt8

from cifar_flax.data import resident
from cifar_flax.data.augment import VIEWS, AugmentConfig, Context, Examples, augment, normalize, resize, views
from cifar_flax.data.batches import Batch, Indices
from cifar_flax.errors import UserError
from cifar_flax.models.network import FROZEN
from cifar_flax.runtime.devices import Layout
from cifar_flax.runtime.trees import all_finite
from cifar_flax.training import averaging, metrics, optimizers
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.metrics import StepMetrics
from cifar_flax.training.optimizers import OptimConfig
from cifar_flax.training.state import TrainState, root_keys


@dataclass(frozen=True, slots=True)
class Call:
    """The inputs of one call of the compiled program."""

    start: int  # finished steps before the call
    stop: int  # finished steps after the call
    inputs: Batch | Indices


# (state, inputs: a `Call`, or a batch) -> (state, metrics: an entry for each row of the indices, or a scalar)
TrainCall = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The constants that the compiled steps use: everything about a run that is neither state nor data."""

    graphdef: nnx.GraphDef
    optim: OptimConfig
    image_shape: tuple[int, int, int]  # height, width, channels
    mean: tuple[float, ...]  # per channel, in units of the stored bytes
    std: tuple[float, ...]
    augment: AugmentConfig
    num_classes: int
    label_smoothing: float
    averaging: AveragingConfig
    total_steps: int
    steps_per_epoch: float
    layout: Layout
    sync_batchnorm: bool  # whether BatchNorm statistics are over the batch of all devices
    param_groups: PyTree[str]  # the optimizer group of each parameter
    loss_scale: float = 1.0  # factor of the loss in the backward pass only; a power of two, so that it is exact
    skip_nonfinite: bool = False  # whether to skip the update if the loss, the gradient or the new state is not finite
    frozen_from: Mapping[str, int] = field(default_factory=dict)  # group -> number of steps after which it is frozen
    class_weights: tuple[float, ...] = ()  # factor of the loss of the examples of each class; (): 1
    sides: tuple[tuple[int, int], ...] = ()  # (finished steps, side of the images in pixels from there on)
    frozen: frozenset[str] = frozenset()  # groups that have no gradient; `phases` sets them
    side: int | None = None  # side that the images are resized to; `phases` sets it
    rates: Float[Any, "groups steps"] | None = None  # if it is not the table that `optim` describes, such as traced

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optimizers.make_optimizer(self.optim, self.learning_rates, self.param_groups)

    @property
    def learning_rates(self) -> Float[Any, "groups steps"]:
        """Return the table of `optimizers.learning_rates`, which the compiled programs take as an argument."""
        if self.rates is not None:
            return self.rates
        return optimizers.learning_rates(self.optim, self.total_steps, self.steps_per_epoch)

    @property
    def phase_starts(self) -> set[int]:
        """Return the numbers of finished steps at which another phase starts, besides the first."""
        return {*self.frozen_from.values(), *(step for step, _ in self.sides)} - {0}


def phases(task: Task, start: int = 0) -> list[tuple[int, Task]]:
    """Return the tasks of a run from step `start` on, in order, each with the number of finished steps it starts at.

    A new task starts at each step at which groups are frozen or the size of the images changes. The gradients of frozen
    groups are 0, so that XLA removes the operations that compute them.
    """

    def phase(first: int) -> Task:
        frozen = frozenset(name for name, step in task.frozen_from.items() if step <= first)
        sides = [side for step, side in task.sides if step <= first]
        return dataclasses.replace(task, frozen=frozen, side=sides[-1] if sides else None)

    return [(first, phase(first)) for first in sorted({start, *(step for step in task.phase_starts if step > start)})]


def example_keys(seed: Array, epoch: Int32[Array, " batch"], index: Int32[Array, " batch"]) -> Key[Array, " batch"]:
    """Return one random key per example, a function of the seed, the epoch and the example's index alone.

    Hence random numbers depend neither on the position in the batch, nor on the devices, nor on interruptions.
    """
    _, root = root_keys(seed)
    return jax.vmap(lambda e, i: jax.random.fold_in(jax.random.fold_in(root, e), i))(epoch, index)


def train_step(task: Task, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Shaped[Array, ""]]]:
    """Take one training step; return the new state and the metrics of the step, each a scalar.

    `loss` (with label smoothing and class weights) and `accuracy` are means over the batch of all devices, augmented
    and with dropout. If augmentation mixes targets, `loss` uses the mixed ones, but `accuracy` the example's own label.
    `finite` is whether the loss and the gradient are finite; with `task.skip_nonfinite`, also the new state. Any other
    metric in the returned dict is logged and plotted as its mean over the steps; it must be equal on all devices.
    """
    axis_name = task.layout.axis_name
    keys, dropout_keys = _keys(state, batch, batch.epoch)
    first_epoch_keys, _ = _keys(state, batch, jnp.zeros_like(batch.epoch))
    context = Context(
        config=task.augment,
        platform=task.layout.platform,
        epoch=batch.epoch,
        epoch_keys=keys,
        first_epoch_keys=first_epoch_keys,
        next_row=functools.partial(next_row, task),
    )
    target = optax.smooth_labels(jax.nn.one_hot(batch.label, task.num_classes), task.label_smoothing)
    if task.class_weights:
        # Before the augmentation, so that each of two images that it mixes has the weight of its own class.
        target *= jnp.asarray(task.class_weights)[batch.label][:, None]
    image, target = augment(Examples(batch.image, target), context, task.mean, task.std)
    if task.side is not None:
        image = resize(image, task.side)

    # In evaluation mode, a frozen backbone keeps its statistics and has no dropout.
    training_keys = None if FROZEN in task.frozen else dropout_keys

    def loss_fn(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
        if task.frozen:
            params = jax.tree.map(functools.partial(_unless_frozen, task), params, task.param_groups)
        model = nnx.merge(task.graphdef, params, state.batch_stats)
        logits = _require_logits(task, model(image, training_keys), image)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, target))
        return task.loss_scale * loss, (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    # Without this cast, shard_map sums the gradient over the devices, and `pmean` returns that sum, not the mean.
    params = state.params if axis_name is None else jax.lax.pcast(state.params, axis_name, to="varying")
    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    if task.loss_scale != 1:
        loss, grads = jax.tree.map(lambda scaled: scaled / task.loss_scale, (loss, grads))
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.label)
    if axis_name is not None:
        # With sync_batchnorm, the statistics are equal on all devices. Otherwise average their changes, not their
        # values, so that statistics that no step changes, such as a whitening kernel, stay bit-exact.
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
    return new_state, {
        "loss": loss,
        "accuracy": accuracy,
        "learning_rate": optimizers.rate_at(task.learning_rates, state.step),
        "finite": finite,
    }


def _unless_frozen(task: Task, param: Array, group: str) -> Array:
    return jax.lax.stop_gradient(param) if group in task.frozen else param


def _unless_skipped(finite: Bool[Array, ""], new: TrainState, old: TrainState) -> TrainState:
    """Return `new` if `finite`, else `old` with the step counts of optax schedules from `new`."""

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def train_steps(
    task: Task,
    state: TrainState,
    indices: Indices,
    images: UInt8[Array, "n row_bytes"],
    labels: Int32[Array, " n"],
    count: int | Int32[Array, ""] | None = None,
) -> tuple[TrainState, dict[str, Shaped[Array, " rows"]]]:
    """Run `train_step` for the first `count` rows of `indices` (default: all) in one loop on the device.

    `images` and `labels` are a split in device memory, as `resident.put` returns it. The metrics of the rows after the
    first `count` are 0.

    A `count` that is known at compilation makes faster programs for GPUs: otherwise, each iteration waits until the
    host has read the condition of the loop.
    """

    @functools.partial(jax.jit, inline=True)  # traced once, for the shapes of the metrics and for the loop
    def step(state: TrainState, number: Array) -> tuple[TrainState, dict[str, Array]]:
        row = jax.tree.map(lambda rows: jax.lax.dynamic_index_in_dim(rows, number, keepdims=False), indices)
        return train_step(task, state, resident.gather(images, labels, row, task.image_shape))

    def body(number: Array, carry: tuple[TrainState, dict[str, Array]]) -> tuple[TrainState, dict[str, Array]]:
        state, columns = carry
        state, values = step(state, number)
        update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return state, {name: update(columns[name], value) for name, value in values.items()}

    rows = len(indices.index)
    _, shapes = jax.eval_shape(step, state, jnp.int32(0))
    columns = {name: jnp.zeros((rows, *one.shape), one.dtype) for name, one in shapes.items()}
    return jax.lax.fori_loop(0, rows if count is None else count, body, (state, columns))


def _keys(state: TrainState, batch: Batch, epoch: Int32[Array, " batch"]) -> tuple[Key[Array, " batch"], ...]:
    """Return the keys of the batch's examples in `epoch`: for augmentation and for dropout."""
    keys = example_keys(state.seed, epoch, batch.index)
    # These are the two of `jax.random.split`, which would compute both of them even if only one is used.
    return tuple(jax.vmap(jax.random.fold_in, (0, None))(keys, number) for number in range(2))


def eval_step(
    task: Task, weights: PyTree, batch: Batch, *, tta: str = "none"
) -> tuple[metrics.Sums, Float[Array, "whole classes"]]:
    """Return the sums that the batch adds to an evaluation, and the probabilities of the images of all devices.

    `weights` are (params, batch_stats). `tta`, a key of `VIEWS`, averages the logits of several TTA views.
    """
    logits = _logits(task, weights, batch.image, tta)
    sums = metrics.evaluation_sums(logits, batch.label, batch.mask)
    if (axis_name := task.layout.axis_name) is not None:
        sums = jax.lax.psum(sums, axis_name)
    return sums, all_gather(task, jax.nn.softmax(logits))


def logits_step(
    task: Task, weights: PyTree, batch: Batch, *, tta: str = "none"
) -> tuple[Float[Array, " whole"], Float[Array, "whole classes"]]:
    """Return the confidences and the logits of the images of all devices, for metrics of images with different TTA."""
    logits = _logits(task, weights, batch.image, tta)
    return all_gather(task, jnp.max(jax.nn.softmax(logits), axis=-1)), all_gather(task, logits)


def predict_step(
    task: Task, weights: PyTree, image: UInt8[Array, "batch h w c"], *, tta: str = "none"
) -> Float[Array, "whole classes"]:
    """Return the class probabilities of the images of all devices, as evaluated with `tta`."""
    return all_gather(task, jax.nn.softmax(_logits(task, weights, image, tta)))


def all_gather(task: Task, rows: Shaped[Array, "batch *rest"]) -> Shaped[Array, "whole *rest"]:
    """Return the rows of all devices, concatenated, on each device."""
    axis_name = task.layout.axis_name
    if axis_name is None:
        return rows
    # psum with zeros is exact, and shard_map infers that its result is equal on all devices, unlike that of all_gather.
    everywhere = jnp.zeros((task.layout.num_devices, *rows.shape), rows.dtype)
    own = jax.lax.dynamic_update_index_in_dim(everywhere, rows, jax.lax.axis_index(axis_name), axis=0)
    summed = jax.lax.psum(own, axis_name)
    return summed.reshape(-1, *rows.shape[1:])


def next_row(task: Task, rows: Shaped[Array, "batch *rest"]) -> Shaped[Array, "batch *rest"]:
    """Return for each row the following row in the batch of all devices; the last row is followed by the first."""
    first, axis_name = rows[:1], task.layout.axis_name
    if axis_name is not None:
        count = task.layout.num_devices
        first = jax.lax.ppermute(first, axis_name, [(device, (device - 1) % count) for device in range(count)])
    return jnp.concatenate([rows[1:], first])


def _require_logits(task: Task, logits: Array, image: Array) -> Array:
    """Return `logits`; raise `UserError` if the network returns something else than float32 logits."""
    shape = (image.shape[0], task.num_classes)
    if logits.shape != shape or logits.dtype != jnp.float32:
        raise UserError(f"the network returns {logits.dtype} of shape {logits.shape}; must be float32 logits {shape}")
    return logits


def _logits(task: Task, weights: PyTree, image: UInt8[Array, "batch h w c"], tta: str) -> Float[Array, "batch classes"]:
    model = nnx.merge(task.graphdef, *weights)
    if tta == "none":
        return _require_logits(task, model(normalize(image, task.mean, task.std)), image)
    # Compute one TTA view after the other: all at once would multiply the memory.
    logits = jax.lax.map(lambda view: model(normalize(view, task.mean, task.std)), views(image, tta))
    # No matrix product, since accelerators compute it in reduced precision by default.
    return jnp.sum(jnp.asarray(VIEWS[tta])[:, None, None] * logits, axis=0)
