"""One run as data: the parts' own settings composed, checked, and read and written as JSON.

A config file imports all that it needs from here, the parts' dataclasses included.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cifar_flax import models
from cifar_flax.checkpoints.manager import CheckpointConfig
from cifar_flax.data.augment import VIEWS, AugmentConfig
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError, require
from cifar_flax.models import AirbenchConfig, CNNConfig, ResNetConfig  # noqa: F401
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.optimizers import GroupConfig, OptimConfig
from cifar_flax.training.profiling import ProfileConfig


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    batch_size: int = 128  # images
    epochs: float = 10.0
    label_smoothing: float = 0.0  # share of the target spread evenly over all classes
    log_every: int = 50  # steps between the lines of metrics.jsonl
    sync_batchnorm: bool = True  # whether BatchNorm sees the batch of all devices, or each device its own part
    init_from: str = ""  # the folder of another run, whose weights are the first, as far as they fit; "": random ones
    steps_per_call: int = 1  # steps that run as one loop on the device, without a word from the host

    def validate(self) -> None:
        for name in ("batch_size", "log_every", "steps_per_call"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        per_call, every = self.steps_per_call, self.log_every
        require(every % per_call == 0, "train.steps_per_call", per_call, f"must divide train.log_every={every}")
        require(self.epochs > 0, "train.epochs", self.epochs, "must be above 0")
        require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "must be in [0, 1)")


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    batch_size: int = 500  # images
    every_epochs: int = 1  # epochs between evaluations while training
    checkpoint: str = "newest"  # the checkpoint that counts in the end: newest | best (by validation accuracy)
    # Test-time augmentation of the final evaluation: none | mirror | mirror_translate (averages of 2 and 6 views)
    tta: str = "none"
    tta_below: float | None = None  # only of images whose top probability is below this; None: of all

    def validate(self) -> None:
        for name in ("batch_size", "every_epochs"):
            require(getattr(self, name) >= 1, f"eval.{name}", getattr(self, name), "must be at least 1")
        require(self.checkpoint in ("newest", "best"), "eval.checkpoint", self.checkpoint, "must be newest or best")
        require(self.tta in VIEWS, "eval.tta", self.tta, f"must be one of {', '.join(VIEWS)}")
        below = self.tta_below
        require(below is None or 0 < below <= 1, "eval.tta_below", below, "must be above 0 and at most 1")
        require(below is None or self.tta != "none", "eval.tta_below", below, "needs another eval.tta than none")


@dataclass(slots=True, kw_only=True)
class Config:
    seed: int = 0  # of the initial weights, the order of the examples and every random bit
    deterministic: bool = False  # on a GPU: only operations that repeat to the bit, without autotuning; slower
    # What a loss or gradient that is not finite does: stop | skip (that step changes nothing; where accumulate_steps is
    # above 1, the updates, and with them the schedule, come as many steps later).
    on_nonfinite: str = "stop"
    max_skipped: int = 10  # steps left out in a row that stop the run all the same
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: models.ModelConfig = field(default_factory=CNNConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def validate(self) -> None:
        """Raises `ConfigError` at the first field that is of a wrong type or not allowed."""
        for path, value, kind in _fields(self):
            _check_type(path, value, kind)
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        require(self.on_nonfinite in ("stop", "skip"), "on_nonfinite", self.on_nonfinite, "must be stop or skip")
        require(self.max_skipped >= 1, "max_skipped", self.max_skipped, "must be at least 1")
        name, allowed = self.model.name, "belongs to another network than the one that the config file builds"
        require(isinstance(self.model, models.config_class(name)), "model.name", name, allowed)
        for member in dataclasses.fields(self):
            part: Any = getattr(self, member.name)
            if hasattr(part, "validate"):
                part.validate()
        whitening = self.optim.whitening
        fits = self.model.name == "airbench" or whitening == GroupConfig()
        allowed = f"does not apply to {self.model.name}, which has no whitening layer"
        require(fits, "optim.whitening", whitening, allowed)
        fits, per_call = self.data.pipeline == "resident" or self.train.steps_per_call == 1, self.train.steps_per_call
        require(fits, "train.steps_per_call", per_call, "must be 1 where data.pipeline is not resident")
        best, every, often = self.checkpoint.keep_best, self.checkpoint.every_epochs, self.eval.every_epochs
        allowed = "needs data.validation_fraction above 0, so that nothing is chosen on the split that is reported"
        require(best == 0 or self.data.validation_fraction > 0, "checkpoint.keep_best", best, allowed)
        fits, allowed = best == 0 or every % often == 0, f"must be a multiple of eval.every_epochs={often}"
        require(fits, "checkpoint.every_epochs", every, allowed)
        fits, allowed = best > 0 or self.eval.checkpoint != "best", "needs checkpoint.keep_best above 0"
        require(fits, "eval.checkpoint", self.eval.checkpoint, allowed)


# Where data lies: it may differ from host to host, and between a run and the use of its checkpoint.
LOCATIONS = ("data.data_dir", "data.archive", "data.cache_dir")


def may_override(path: str) -> bool:
    """Whether evaluation accepts another value for the field `path`, such as "eval.batch_size"."""
    return path in LOCATIONS or path.startswith(("eval.", "parallel."))


def shared(config: Config) -> dict[str, Any]:
    """Path -> value of all settings but those that say where things are and run: what processes of a run agree on."""
    return {
        path: value for path, value, _ in _fields(config) if path not in LOCATIONS and not path.startswith("parallel.")
    }


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts of what JSON knows."""
    return dataclasses.asdict(config)


def from_dict(values: Any) -> Config:
    """The inverse of `to_dict`; raises `ConfigError` for an unknown field or a value that is not allowed."""
    require(isinstance(values, dict), "config", values, "must be a JSON object")
    config = _build(Config, values, "")
    config.validate()
    return config


# What may change from one start of a run to the next, and no weight tells.
_HARMLESS = ("train.log_every", "on_nonfinite", "max_skipped")


def differences(saved: Config, config: Config, where: str = "the checkpoint") -> list[str]:
    """Lines such as "model.width: 32 in the checkpoint, 64 in the config" of what would make it another run.

    More epochs than before do not where neither the schedule nor an average asks for their number.
    """
    before, now = shared(saved), shared(config)
    harmless = [path for path in before if path in _HARMLESS or path.startswith(("eval.", "checkpoint.", "profile."))]
    timeless = config.optim.schedule == "constant" and config.averaging.name != "lookahead"
    if timeless and config.train.epochs > saved.train.epochs:
        harmless.append("train.epochs")
    only = {"train.epochs": "; it may only grow, with optim.schedule=constant and without lookahead"}
    return [
        f"{path}: {before.get(path)!r} in {where}, {now.get(path)!r} in the config{only.get(path, '')}"
        for path in before | now
        if before.get(path) != now.get(path) and path not in harmless
    ]


def _build(kind: type, values: dict[str, Any], path: str) -> Any:
    known = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        require(name in known, f"{path}{name}", value, "is no field of this version's config")
        part = known[name]
        if dataclasses.is_dataclass(part) or part == models.ModelConfig:
            require(isinstance(value, dict), f"{path}{name}", value, "must be a JSON object")
            if part == models.ModelConfig:
                part = models.config_class(value.get("name"))
            value = _build(part, value, f"{path}{name}.")
        else:
            value = tuple(value) if isinstance(value, list) else value
            _check_type(f"{path}{name}", value, part)
        arguments[name] = value
    return kind(**arguments)


def _fields(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, value and declared type of every setting."""
    for name, kind in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, kind


def _check_type(path: str, value: Any, kind: Any) -> None:
    require(_is_instance(value, kind), path, value, f"must be {_type_name(kind)}")


def _is_instance(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_instance(value, member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        members = typing.get_args(kind)
        return isinstance(value, tuple) and len(value) == len(members) and all(map(_is_instance, value, members))
    if kind is float:  # a whole number is fine, NaN and infinity are not
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    return type(value) is kind or (value is None and kind is types.NoneType)


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(member) for member in typing.get_args(kind) if member is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return f"({', '.join(map(_type_name, typing.get_args(kind)))})"
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return f"{kind.__name__}(...)"
    return names.get(kind, str(kind))


def describe_field(config: Config, path: str, value: str) -> str:
    """What values the field `path` takes; raises `ConfigError`, with what there is instead, if there is none."""
    kinds = {name: kind for name, _, kind in _fields(config)}
    if path not in kinds:
        group = path.split(".")[0]
        inside = [other for other in kinds if other.startswith(f"{group}.")]
        groups = dict.fromkeys(other.split(".")[0] for other in kinds)
        close = difflib.get_close_matches(path, kinds, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(inside or groups)}"
        raise ConfigError(f"{path}={value!r}: no such field; {hint}")
    return _type_name(kinds[path])
