"""Optimizers and learning-rate schedules, built from optax; different settings for groups of parameters.

To add one, write a function and add a row to `OPTIMIZERS` or `SCHEDULES`.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, PyTree

from cifar_flax.errors import require
from cifar_flax.models.network import FROZEN
from cifar_flax.training import muon


@dataclass(slots=True, kw_only=True)
class GroupConfig:
    """The settings of a group of parameters."""

    learning_rate: float | None = None  # peak learning rate; None is optim.learning_rate
    weight_decay: float | None = None  # weight decay; None is optim.weight_decay, but 0 for the group biases
    momentum: float | None = None  # Nesterov momentum; None is optim.momentum
    frozen_from: float = 0.0  # epoch from which the group is frozen and has no gradient; 0: never
    own_decay: bool = False  # linear decay to zero at frozen_from, instead of optim.schedule


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    name: str = "adamw"  # adam | adamw | sgd | muon (for convolution kernels; the groups below use sgd)
    learning_rate: float = 1e-3  # peak learning rate
    schedule: str = "constant"  # after the warm-up: constant | cosine (to zero) | linear (to final_share of the peak)
    warmup_epochs: float = 0.0  # epochs of linear warm-up
    warmup_start: float = 0.0  # learning rate at the start of the warm-up, as a fraction of the peak
    final_share: float = 0.0  # linear: learning rate at the end of the run, as a fraction of the peak
    final_epochs: float = 0.0  # linear: epochs at the end of the run at the learning rate of final_share
    weight_decay: float = 0.0  # adamw: decoupled; sgd: added to the gradient; not for biases and whitening
    b1: float | None = None  # adam, adamw: EMA decay of the gradient; None is 0.9
    b2: float | None = None  # adam, adamw: EMA decay of the squared gradient; None is 0.999
    eps: float | None = None  # adam, adamw: added to the denominator of the update; None is 1e-8
    momentum: float | None = None  # sgd, muon: Nesterov momentum; None is 0
    dense: GroupConfig = field(default_factory=GroupConfig)  # kernels that are not of convolutions, and embeddings
    biases: GroupConfig = field(default_factory=GroupConfig)  # biases, scales of normalization layers, other parameters
    whitening: GroupConfig = field(default_factory=GroupConfig)  # bias of a whitening layer; None: as in biases
    clip_norm: float = 0.0  # largest norm of the gradient of all groups that are not frozen; 0 does not clip
    accumulate_steps: int = 1  # batches whose gradients are averaged per update; an incomplete last group is discarded

    def validate(self) -> None:
        rows = (("name", self.name, "", OPTIMIZERS), ("schedule", self.schedule, "the schedule ", SCHEDULES))
        for name, row, _, table in rows:
            require(row in table, f"optim.{name}", row, f"must be one of {', '.join(table)}")
        for name in ("learning_rate", "warmup_epochs", "final_epochs", "weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must be at least 0")
        for name in ("warmup_start", "final_share"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "must be in [0, 1]")
        require(self.accumulate_steps >= 1, "optim.accumulate_steps", self.accumulate_steps, "must be at least 1")
        for _, row, kind, table in rows:
            of_all = frozenset[str]().union(*(other.settings for other in table.values()))
            for name in sorted(of_all - table[row].settings):
                value, default = getattr(self, name), getattr(OptimConfig(), name)
                require(value == default, f"optim.{name}", value, f"does not apply to {kind}{row}")
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
        for_groups = OPTIMIZERS[self.name].for_groups
        optimizer = for_groups or self.name
        for name in ("weight_decay", "momentum"):
            value, applies = getattr(settings, name), name in OPTIMIZERS[optimizer].settings
            require(value is None or applies, f"{group}.{name}", value, f"does not apply to {optimizer}")
        require(0 <= (settings.momentum or 0) < 1, f"{group}.momentum", settings.momentum, "must be in [0, 1)")
        fits = settings.frozen_from > 0 or not settings.own_decay
        require(fits, f"{group}.own_decay", settings.own_decay, f"needs {group}.frozen_from above 0")
        is_set = group == "optim.whitening" or settings.learning_rate is not None
        allowed = f"must be set if optim.name is {self.name}"
        require(is_set or not for_groups, f"{group}.learning_rate", settings.learning_rate, allowed)


GROUPS = ("dense", "biases", "whitening")
_RATES = ("convolutions", *GROUPS)  # rows of the table of learning rates
NO_RATES = np.zeros((len(_RATES), 1), np.float32)  # for an optimizer that only initializes its state


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """A row of `OPTIMIZERS`. `make` passes the schedule to optax, because skipped steps advance optax's step count."""

    make: Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation]
    settings: frozenset[str] = frozenset()  # optional fields of OptimConfig that it uses
    for_groups: str = ""  # optimizer of the groups, if it is another one; dense and biases then need a learning rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A row of `SCHEDULES`."""

    make: Callable[[OptimConfig, int], optax.Schedule]  # (config, steps of the decay) -> learning rate
    settings: frozenset[str] = frozenset()  # optional fields of OptimConfig that it uses
    depends_on_length: bool = True  # whether another train.epochs would change the learning rate of earlier steps


def _adam_constants(config: OptimConfig) -> dict[str, float]:
    """Return the constants that are set; optax has defaults for the others."""
    return {name: value for name in ("b1", "b2", "eps") if (value := getattr(config, name)) is not None}


def _adam(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adam(schedule, **_adam_constants(config))


def _adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, **_adam_constants(config), weight_decay=config.weight_decay)


def _sgd(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    sgd = optax.sgd(schedule, momentum=config.momentum, nesterov=config.momentum is not None)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), sgd)


def _muon(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return muon.muon(schedule, config.momentum or 0.0)


def _linear_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    return optax.linear_schedule(config.learning_rate, config.learning_rate * config.final_share, steps)


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(make=_adam, settings=frozenset({"b1", "b2", "eps"})),
    "adamw": Optimizer(make=_adamw, settings=frozenset({"b1", "b2", "eps", "weight_decay"})),
    "sgd": Optimizer(make=_sgd, settings=frozenset({"momentum", "weight_decay"})),
    "muon": Optimizer(make=_muon, settings=frozenset({"momentum"}), for_groups="sgd"),
}

SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(
        make=lambda config, steps: optax.constant_schedule(config.learning_rate), depends_on_length=False
    ),
    "cosine": Schedule(make=lambda config, steps: optax.cosine_decay_schedule(config.learning_rate, steps)),
    "linear": Schedule(make=_linear_schedule, settings=frozenset({"final_share", "final_epochs"})),
}


def make_schedule(config: OptimConfig, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Return the learning rate as a function of the training step, counted from 0.

    Raise `ConfigError` if the warm-up is not shorter than the run.
    """
    warmup, final = (
        round(min(epochs * steps_per_epoch, total_steps)) for epochs in (config.warmup_epochs, config.final_epochs)
    )
    longest = f"must be shorter than the run of {total_steps} steps, of which it takes {warmup}; 0 disables it"
    require(warmup < total_steps, "optim.warmup_epochs", config.warmup_epochs, longest)
    longest = f"takes {final} steps, which must be fewer than the run's {total_steps} without its warm-up of {warmup}"
    require(warmup + final < total_steps, "optim.final_epochs", config.final_epochs, longest)
    schedule = SCHEDULES[config.schedule].make(config, total_steps - warmup - final)  # which keeps its last value
    if not warmup:
        return schedule
    peak = config.learning_rate
    return optax.join_schedules([optax.linear_schedule(config.warmup_start * peak, peak, warmup), schedule], [warmup])


def _group_schedule(
    group: GroupConfig, config: OptimConfig, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Return the learning rate of a group: that of `make_schedule`, or its own decay, until the group is frozen."""
    frozen_from = _frozen_step(group, steps_per_epoch)
    if group.own_decay:
        return optax.linear_schedule(config.learning_rate, 0.0, frozen_from)
    schedule = make_schedule(config, total_steps, steps_per_epoch)
    if not group.frozen_from:
        return schedule
    return lambda step: jnp.where(step < frozen_from, schedule(step), 0.0)


def _frozen_step(group: GroupConfig, steps_per_epoch: float) -> int:
    """Return the number of finished steps from which on the learning rate is 0, if `group.frozen_from` is above 0."""
    return max(round(group.frozen_from * steps_per_epoch), 1)


def frozen_steps(config: OptimConfig, steps_per_epoch: float) -> dict[str, int]:
    """Return group -> number of finished steps from which on its gradient is not used, for groups with `frozen_from`.

    With `accumulate_steps`, the rate of an update is that of its first step, so whole updates are frozen. If steps are
    skipped (`on_nonfinite`), the last update before that may contain zeros in place of gradients.
    """
    every = config.accumulate_steps
    groups = {name: getattr(config, name) for name in GROUPS}
    steps = {name: _frozen_step(group, steps_per_epoch) for name, group in groups.items() if group.frozen_from}
    return {name: math.ceil(step / every) * every for name, step in steps.items()}


def learning_rates(config: OptimConfig, total_steps: int, steps_per_epoch: float) -> Float[np.ndarray, "groups steps"]:
    """Return the learning rate of each group, in the order of `_RATES`, at the steps 0 to `total_steps`.

    The compiled steps look it up in this table, an argument, so that another learning rate or schedule needs no other
    program. Raise `ConfigError` if the warm-up is not shorter than the run.
    """
    schedules = [make_schedule(config, total_steps, steps_per_epoch)]
    for name, own in _group_configs(config).items():
        schedules.append(_group_schedule(getattr(config, name), own, total_steps, steps_per_epoch))
    with jax.ensure_compile_time_eval():
        counts = jnp.arange(total_steps + 1)
        return np.stack([np.asarray(jax.vmap(schedule)(counts), np.float32) for schedule in schedules])


def _group_configs(config: OptimConfig) -> dict[str, OptimConfig]:
    """Return the settings of each of `GROUPS`, in which those of the group replace those that it shares."""
    bases = {"dense": config, "biases": dataclasses.replace(config, weight_decay=0.0)}
    for name in GROUPS:
        group = getattr(config, name)
        settings = {field: getattr(group, field) for field in ("learning_rate", "weight_decay", "momentum")}
        # Settings that the last group, whitening, leaves None are those of the biases.
        base = bases.get(name, bases["biases"])
        bases[name] = dataclasses.replace(base, **{key: value for key, value in settings.items() if value is not None})
    return bases


def make_optimizer(
    config: OptimConfig, rates: Float[Any, "groups steps"], param_groups: PyTree[str]
) -> optax.GradientTransformation:
    """Return the optimizer that `config` describes: gradient accumulation, clipping, and an update for each group.

    `rates` is the table of `learning_rates`, which replaces the schedules in `config`; in a compiled step, it may be
    traced. `param_groups` has the name of each parameter's group (`models.network.param_groups`).
    """
    every = config.accumulate_steps

    def of(group: str, name: str, config: OptimConfig) -> optax.GradientTransformation:
        # optax passes the number of updates; the table has an entry for each step.
        return OPTIMIZERS[name].make(config, lambda update: rate_at(rates, update * every, group))

    groups = {"convolutions": of("convolutions", config.name, config)}
    for name, own in _group_configs(config).items():
        groups[name] = of(name, OPTIMIZERS[config.name].for_groups or config.name, own)
    groups[FROZEN] = optax.set_to_zero()
    optimizer = optax.partition(groups, param_groups)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if every > 1:
        multi = optax.MultiSteps(optimizer, every_k_schedule=every)
        optimizer = optax.GradientTransformation(multi.init, multi.update)
    return optimizer


def rate_at(rates: Float[Any, "groups steps"], step: Any, group: str = "convolutions") -> Float[jax.Array, ""]:
    """Return the learning rate of `group` at `step` in the table of `learning_rates`; after its end, the last one."""
    place = jnp.int32(_RATES.index(group)), jnp.asarray(step, jnp.int32)
    return jax.lax.dynamic_slice(jnp.asarray(rates), place, (1, 1))[0, 0]
