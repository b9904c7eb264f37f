"""Optimizers, groups of parameters and learning-rate schedules; what optax has of them is optax's."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from cifar_flax.errors import require


@dataclass(slots=True, kw_only=True)
class GroupConfig:
    """What differs for a group of parameters; None: nothing."""

    learning_rate: float | None = None  # at its peak
    weight_decay: float | None = None
    momentum: float | None = None
    frozen_from: float = 0.0  # epochs; 0 never freezes them
    own_decay: bool = False  # the learning rate falls linearly to zero until then, whatever the schedule


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    name: str = "adamw"  # adam | adamw | sgd | muon (convolutions' kernels; the groups below by sgd)
    learning_rate: float = 1e-3  # at its peak
    schedule: str = "constant"  # after the warm-up: constant | cosine | linear (both down to zero at the end)
    warmup_epochs: float = 0.0  # of linear growth
    warmup_start: float = 0.0  # the share of the peak that the warm-up starts from
    final_share: float = 0.0  # the share of the peak that the linear schedule ends at
    weight_decay: float = 0.0  # adamw: decoupled; sgd: added to the gradient; not on tensors of one axis
    b1: float | None = None  # adam, adamw: decay of the gradient's average; None is 0.9
    b2: float | None = None  # adam, adamw: decay of the squared gradient's average; None is 0.999
    eps: float | None = None  # adam, adamw: added to the root of that average; None is 1e-8
    momentum: float | None = None  # sgd, muon: Nesterov momentum; None is 0
    dense: GroupConfig = field(default_factory=GroupConfig)  # kernels with two axes
    biases: GroupConfig = field(default_factory=GroupConfig)  # tensors of one axis: biases, BatchNorm's scales
    whitening: GroupConfig = field(default_factory=GroupConfig)  # a whitening layer's bias; None: that of biases
    clip_norm: float = 0.0  # largest global norm of the gradient; 0 does not clip
    accumulate_steps: int = 1  # steps whose gradients are averaged for one update; a remainder at the end is not used

    def validate(self) -> None:
        for name, value, table in (("name", self.name, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            require(value in table, f"optim.{name}", value, f"must be one of {', '.join(table)}")
        for name in ("learning_rate", "warmup_epochs", "weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must be at least 0")
        for name in ("warmup_start", "final_share"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "must be in [0, 1]")
        fits = self.final_share == 0 or self.schedule == "linear"
        require(fits, "optim.final_share", self.final_share, f"does not apply to the schedule {self.schedule}")
        require(self.accumulate_steps >= 1, "optim.accumulate_steps", self.accumulate_steps, "must be at least 1")
        used = OPTIMIZERS[self.name][1]
        for name, unset in (("weight_decay", 0.0), ("b1", None), ("b2", None), ("eps", None), ("momentum", None)):
            value = getattr(self, name)
            require(value == unset or name in used, f"optim.{name}", value, f"does not apply to {self.name}")
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"optim.{name}", value, "must be in [0, 1)")
        require(self.eps is None or self.eps > 0, "optim.eps", self.eps, "must be above 0")
        for name in GROUPS:
            self._validate_group(f"optim.{name}", getattr(self, name))

    def _validate_group(self, group: str, settings: GroupConfig) -> None:
        for name in ("learning_rate", "weight_decay", "frozen_from"):
            value = getattr(settings, name)
            require(value is None or value >= 0, f"{group}.{name}", value, "must be at least 0")
        optimizer = _optimizer_of_groups(self)
        for name in ("weight_decay", "momentum"):
            value, applies = getattr(settings, name), name in OPTIMIZERS[optimizer][1]
            require(value is None or applies, f"{group}.{name}", value, f"does not apply to {optimizer}")
        require(0 <= (settings.momentum or 0) < 1, f"{group}.momentum", settings.momentum, "must be in [0, 1)")
        fits = settings.frozen_from > 0 or not settings.own_decay
        require(fits, f"{group}.own_decay", settings.own_decay, f"needs {group}.frozen_from above 0")
        fits = self.name != "muon" or group == "optim.whitening" or settings.learning_rate is not None
        require(fits, f"{group}.learning_rate", settings.learning_rate, "must be set where optim.name is muon")


GROUPS = ("dense", "biases", "whitening")


def _group_of(path: tuple[Any, ...], param: Array) -> str:
    if getattr(path[0], "key", "") == "whitening":
        return "whitening"
    return {1: "biases", 2: "dense"}.get(param.ndim, "convolutions")


def _optimizer_of_groups(config: OptimConfig) -> str:
    return "sgd" if config.name == "muon" else config.name


def _adam_constants(config: OptimConfig) -> dict[str, float]:
    """Those that are set; the others keep optax's defaults."""
    constants = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    return {name: value for name, value in constants.items() if value is not None}


def _adam(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adam(schedule, **_adam_constants(config))


def _adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, **_adam_constants(config), weight_decay=config.weight_decay)


def _sgd(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    sgd = optax.sgd(schedule, momentum=config.momentum, nesterov=config.momentum is not None)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), sgd)


def _muon(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Nesterov momentum whose direction is made nearly orthogonal, on kernels of a fixed norm.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", and, for kernels brought to
    the norm of the root of their number of filters before each step, KellerJordan/cifar10-airbench.
    """
    return optax.chain(
        optax.trace(config.momentum or 0.0, nesterov=True),
        optax.stateless(lambda updates, _: _orthogonal_kernels(updates)),
        optax.scale_by_learning_rate(schedule),
        optax.stateless(lambda updates, params: jax.tree.map(_from_fixed_norm, updates, params)),
    )


def _from_fixed_norm(update: Float[Array, "*shape c_out"], kernel: Float[Array, "*shape c_out"]) -> Array:
    """What to add so that `update` counts from the kernel as it is once it has the norm sqrt(c_out)."""
    return update + kernel * (jnp.sqrt(kernel.shape[-1]) / jnp.linalg.norm(kernel) - 1)


def _orthogonal_kernels(updates: PyTree) -> PyTree:
    """`orthogonalize` for kernels [..., c_out], as matrices of a row per filter; those of one shape all at once."""
    leaves, structure = jax.tree.flatten(updates)
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, leaf in enumerate(leaves):
        by_shape[leaf.shape].append(number)
    for shape, numbers in by_shape.items():
        matrices = jnp.stack([leaves[number].reshape(-1, shape[-1]).T for number in numbers])
        for number, matrix in zip(numbers, orthogonalize(matrices, MUON_DTYPE), strict=True):
            leaves[number] = matrix.T.reshape(shape).astype(jnp.float32)
    return jax.tree.unflatten(structure, leaves)


# Of x -> a x + b x^3 + c x^5, chosen for its slope at zero: three steps leave singular values near 1, not at it.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MUON_DTYPE = jnp.bfloat16  # a direction need not be exact


def orthogonalize(
    matrices: Float[Array, "n rows columns"], dtype: DTypeLike, steps: int = 3
) -> Float[Array, "n rows columns"]:
    """U p(S) V' for each matrix, divided by its Frobenius norm, whose singular value decomposition is U S V'.

    p is the polynomial of `NEWTON_SCHULZ`, composed with itself `steps` times. Computed in `dtype`.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / (jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True) + 1e-7)
    wide = x.shape[1] <= x.shape[2]  # the products of rows with rows should be the small ones
    x = (x if wide else x.mT).astype(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


# name -> (its optax transformation, which of the settings that not all optimizers have it uses)
OPTIMIZERS: dict[str, tuple[Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation], set[str]]] = {
    "adam": (_adam, {"b1", "b2", "eps"}),
    "adamw": (_adamw, {"b1", "b2", "eps", "weight_decay"}),
    "sgd": (_sgd, {"momentum", "weight_decay"}),
    "muon": (_muon, {"momentum"}),
}

# name -> schedule of a peak value, a number of steps and the share of the peak at their end
SCHEDULES: dict[str, Callable[[float, int, float], optax.Schedule]] = {
    "constant": lambda peak, steps, final: optax.constant_schedule(peak),
    "cosine": lambda peak, steps, final: optax.cosine_decay_schedule(peak, steps),
    "linear": lambda peak, steps, final: optax.linear_schedule(peak, peak * final, steps),
}


def make_schedule(config: OptimConfig, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Learning rate as a function of the training step.

    Raises `ConfigError` if the warm-up is longer than the run.
    """
    warmup = round(min(config.warmup_epochs * steps_per_epoch, total_steps))
    longest = f"must be shorter than the run of {total_steps / steps_per_epoch:g} epochs"
    require(warmup < total_steps, "optim.warmup_epochs", config.warmup_epochs, longest)
    peak = config.learning_rate
    decay = SCHEDULES[config.schedule](peak, total_steps - warmup, config.final_share)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(config.warmup_start * peak, peak, warmup), decay], [warmup])


def _group_schedule(
    group: GroupConfig, config: OptimConfig, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """`make_schedule` until the group is frozen, or a decay of its own; zero from then on."""
    frozen_from = max(round(group.frozen_from * steps_per_epoch), 1)  # step
    if group.own_decay:
        return optax.linear_schedule(config.learning_rate, 0.0, frozen_from)
    schedule = make_schedule(config, total_steps, steps_per_epoch)
    if not group.frozen_from:
        return schedule
    return lambda step: jnp.where(step < frozen_from, schedule(step), 0.0)


def make_optimizer(config: OptimConfig, total_steps: int, steps_per_epoch: float) -> optax.GradientTransformation:
    """Clipping, then for each group of parameters the named optimizer, once every `accumulate_steps` steps."""
    every = config.accumulate_steps

    def of(name: str, config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
        # The optimizer counts its updates, the schedule counts steps.
        return OPTIMIZERS[name][0](config, lambda update: schedule(update * every))

    groups = {"convolutions": of(config.name, config, make_schedule(config, total_steps, steps_per_epoch))}
    bases = {"dense": config, "biases": dataclasses.replace(config, weight_decay=0.0)}
    for name in GROUPS:
        group = getattr(config, name)
        settings = {field: getattr(group, field) for field in ("learning_rate", "weight_decay", "momentum")}
        # The whitening layer's bias is a bias: it comes last, after theirs.
        base = bases.get(name, bases["biases"])
        own = dataclasses.replace(base, **{key: value for key, value in settings.items() if value is not None})
        bases[name] = own
        groups[name] = of(_optimizer_of_groups(config), own, _group_schedule(group, own, total_steps, steps_per_epoch))
    optimizer = optax.partition(groups, lambda params: jax.tree.map_with_path(_group_of, params))
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if every > 1:
        multi = optax.MultiSteps(optimizer, every_k_schedule=every)
        optimizer = optax.GradientTransformation(multi.init, multi.update)
    return optimizer
