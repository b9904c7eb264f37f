"""Optimizers and learning-rate schedules, all of them optax's."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax
from jaxtyping import PyTree

from cifar_flax.errors import require


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    name: str = "adamw"  # adam | adamw | sgd
    learning_rate: float = 1e-3  # at its peak
    schedule: str = "constant"  # after the warm-up: constant | cosine | linear (both down to zero at the end)
    warmup_epochs: float = 0.0  # of linear growth from zero
    weight_decay: float = 0.0  # adamw: decoupled; sgd: added to the gradient; on tensors of two and more axes
    b1: float | None = None  # adam, adamw: decay of the gradient's average; None is 0.9
    b2: float | None = None  # adam, adamw: decay of the squared gradient's average; None is 0.999
    eps: float | None = None  # adam, adamw: added to the root of that average; None is 1e-8
    momentum: float | None = None  # sgd: Nesterov momentum; None is 0
    clip_norm: float = 0.0  # largest global norm of the gradient; 0 does not clip
    accumulate_steps: int = 1  # steps whose gradients are averaged for one update; a remainder at the end is not used

    def validate(self) -> None:
        for field, value, table in (("name", self.name, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            require(value in table, f"optim.{field}", value, f"must be one of {', '.join(table)}")
        for field in ("learning_rate", "warmup_epochs", "weight_decay", "clip_norm"):
            require(getattr(self, field) >= 0, f"optim.{field}", getattr(self, field), "must be at least 0")
        require(self.accumulate_steps >= 1, "optim.accumulate_steps", self.accumulate_steps, "must be at least 1")
        used = OPTIMIZERS[self.name][1]
        for field, unset in (("weight_decay", 0.0), ("b1", None), ("b2", None), ("eps", None), ("momentum", None)):
            value = getattr(self, field)
            require(value == unset or field in used, f"optim.{field}", value, f"does not apply to {self.name}")
        for field in ("b1", "b2", "momentum"):
            value = getattr(self, field)
            require(value is None or 0 <= value < 1, f"optim.{field}", value, "must be in [0, 1)")
        require(self.eps is None or self.eps > 0, "optim.eps", self.eps, "must be above 0")


def _is_matrix(params: PyTree) -> PyTree:
    """Weight decay is for kernels: biases and BatchNorm's scales have one axis."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


def _adam_constants(config: OptimConfig) -> dict[str, float]:
    """Those that are set; the others keep optax's defaults."""
    constants = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    return {name: value for name, value in constants.items() if value is not None}


def _adam(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adam(schedule, **_adam_constants(config))


def _adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, **_adam_constants(config), weight_decay=config.weight_decay, mask=_is_matrix)


def _sgd(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    sgd = optax.sgd(schedule, momentum=config.momentum, nesterov=config.momentum is not None)
    return optax.chain(optax.add_decayed_weights(config.weight_decay, _is_matrix), sgd)


# name -> (its optax transformation, which of the settings that not all optimizers have it uses)
OPTIMIZERS: dict[str, tuple[Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation], set[str]]] = {
    "adam": (_adam, {"b1", "b2", "eps"}),
    "adamw": (_adamw, {"b1", "b2", "eps", "weight_decay"}),
    "sgd": (_sgd, {"momentum", "weight_decay"}),
}

# name -> schedule of a peak value and a number of steps
SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
}


def make_schedule(config: OptimConfig, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Learning rate as a function of the training step.

    Raises `ConfigError` if the warm-up is longer than the run.
    """
    warmup = round(min(config.warmup_epochs * steps_per_epoch, total_steps))
    longest = f"must be shorter than the run of {total_steps / steps_per_epoch:g} epochs"
    require(warmup < total_steps, "optim.warmup_epochs", config.warmup_epochs, longest)
    decay = SCHEDULES[config.schedule](config.learning_rate, total_steps - warmup)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), decay], [warmup])


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then the named optimizer, once every `accumulate_steps` steps."""
    every = config.accumulate_steps
    # The optimizer counts its updates, the schedule counts steps.
    optimizer = OPTIMIZERS[config.name][0](config, lambda update: schedule(update * every))
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if every > 1:
        multi = optax.MultiSteps(optimizer, every_k_schedule=every)
        optimizer = optax.GradientTransformation(multi.init, multi.update)
    return optimizer
