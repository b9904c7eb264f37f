"""The config of a run: dataclasses, their validation, and their conversion to and from JSON.

Config files import everything from this module, including the dataclasses of the parts.
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
from cifar_flax.data.config import DataConfig
from cifar_flax.errors import ConfigError, require
from cifar_flax.models import AirbenchConfig, CNNConfig, ModelConfig, ResNetConfig  # noqa: F401
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.training.averaging import AveragingConfig
from cifar_flax.training.optimizers import GROUPS, SCHEDULES, GroupConfig, OptimConfig
from cifar_flax.training.profiling import ProfileConfig


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    batch_size: int = 128  # images per step, on all devices together
    epochs: float = 10.0  # passes over the training examples; may be fractional
    resolutions: tuple[tuple[float, int], ...] = ()  # (epoch, side) pairs: from then on, train on side x side pixels
    label_smoothing: float = 0.0  # fraction of the target that is spread evenly over all classes
    class_weights: str = "none"  # none | balanced: weight the loss of each class inversely to its number of examples
    log_every: int = 50  # steps between two training lines in metrics.jsonl
    sync_batchnorm: bool = True  # BatchNorm statistics over the batch of all devices; False: per device
    init_from: str = ""  # workdir of another run whose matching weights are the initial ones; "": random weights
    freeze: str = "none"  # none | backbone: train the head only, with dropout off and BatchNorm's running statistics
    patience: int = 0  # consecutive evaluations without a higher validation accuracy that end the run; 0: never
    steps_per_call: int = 1  # steps that the device runs in one loop at most, if the data is in its memory

    def validate(self) -> None:
        for name in ("batch_size", "log_every", "steps_per_call"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        require(self.patience >= 0, "train.patience", self.patience, "must be at least 0")
        require(self.epochs > 0, "train.epochs", self.epochs, "must be above 0")
        self._validate_resolutions()
        require(self.freeze in ("none", "backbone"), "train.freeze", self.freeze, "must be none or backbone")
        fits = self.freeze == "none" or self.init_from != ""
        require(fits, "train.freeze", self.freeze, "needs train.init_from, the run whose backbone is kept")
        require(0 <= self.label_smoothing < 1, "train.label_smoothing", self.label_smoothing, "must be in [0, 1)")
        weights = self.class_weights
        require(weights in ("none", "balanced"), "train.class_weights", weights, "must be none or balanced")

    def _validate_resolutions(self) -> None:
        epochs = [epoch for epoch, _ in self.resolutions]
        fits = epochs == sorted(set(epochs)) and epochs[:1] in ([], [0])
        allowed = "must be pairs (epoch, side) in the order of their epochs, of which the first is 0"
        require(fits, "train.resolutions", self.resolutions, allowed)
        fits, allowed = all(side >= 1 for _, side in self.resolutions), "sides must be at least 1 pixel"
        require(fits, "train.resolutions", self.resolutions, allowed)
        fits, allowed = max(epochs, default=0) < self.epochs, f"must start within the run of {self.epochs:g} epochs"
        require(fits, "train.resolutions", self.resolutions, allowed)


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    batch_size: int = 500  # images per step, on all devices together; does not affect the results
    every_epochs: int = 1  # epochs between evaluations during training
    checkpoint: str = "newest"  # checkpoint of the final evaluation: newest | best (by validation accuracy)
    tta: str = "none"  # in the final evaluation: none | mirror | mirror_translate (mean of 1, 2 or 6 TTA views)
    tta_fraction: float = 1.0  # fraction of the images, those of lowest confidence, that get TTA; 1.0: all

    def validate(self) -> None:
        for name in ("batch_size", "every_epochs"):
            require(getattr(self, name) >= 1, f"eval.{name}", getattr(self, name), "must be at least 1")
        require(self.checkpoint in ("newest", "best"), "eval.checkpoint", self.checkpoint, "must be newest or best")
        require(self.tta in VIEWS, "eval.tta", self.tta, f"must be one of {', '.join(VIEWS)}")
        fraction = self.tta_fraction
        require(0 < fraction <= 1, "eval.tta_fraction", fraction, "must be in (0, 1]")


@dataclass(slots=True, kw_only=True)
class Config:
    seed: int = 0  # seed of the initial weights, the sampling order and all other random numbers
    deterministic: bool = False  # use deterministic GPU kernels without autotuning: bit-exact but slower
    on_nonfinite: str = "stop"  # if the loss or the gradient is not finite: stop the run | skip the step
    max_skipped: int = 10  # consecutive skipped steps that stop the run
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=CNNConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def validate(self) -> None:
        """Raise `ConfigError` at the first field of a wrong type or with a value that is not allowed."""
        for path, value, kind in _fields(self):
            _check_type(path, value, kind)
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        require(self.on_nonfinite in ("stop", "skip"), "on_nonfinite", self.on_nonfinite, "must be stop or skip")
        require(self.max_skipped >= 1, "max_skipped", self.max_skipped, "must be at least 1")
        name = self.model.name
        allowed = "must match the class of the config file's model. Choose a network in the config file."
        require(isinstance(self.model, models.config_class(name)), "model.name", name, allowed)
        for member in dataclasses.fields(self):
            part: Any = getattr(self, member.name)
            if hasattr(part, "validate"):
                part.validate()
        weights, allowed = self.train.class_weights, "must be none if data.sampling is balanced: use one of them"
        require(weights == "none" or self.data.sampling == "shuffled", "train.class_weights", weights, allowed)
        warmup, allowed = self.optim.warmup_epochs, f"must be shorter than the run of {self.train.epochs:g} epochs"
        require(warmup <= self.train.epochs, "optim.warmup_epochs", warmup, allowed)
        final = self.optim.final_epochs
        allowed = f"must be shorter than the run of {self.train.epochs:g} epochs without its warm-up"
        require(final == 0 or warmup + final < self.train.epochs, "optim.final_epochs", final, allowed)
        whitening = self.optim.whitening
        fits = "whitening" in models.network_class(self.model).groups.values() or whitening == GroupConfig()
        allowed = f"does not apply to {self.model.name}, which has no whitening layer"
        require(fits, "optim.whitening", whitening, allowed)
        validates, patience = self.data.validation_fraction > 0, self.train.patience
        allowed = "needs data.validation_fraction above 0. The test split must not decide when training stops."
        require(patience == 0 or validates, "train.patience", patience, allowed)
        best, every, often = self.checkpoint.keep_best, self.checkpoint.every_epochs, self.eval.every_epochs
        allowed = "needs data.validation_fraction above 0. The test split must not choose a checkpoint."
        require(best == 0 or validates, "checkpoint.keep_best", best, allowed)
        fits, allowed = best == 0 or every % often == 0, f"must be a multiple of eval.every_epochs={often}"
        require(fits, "checkpoint.every_epochs", every, allowed)
        fits, allowed = best > 0 or self.eval.checkpoint != "best", "needs checkpoint.keep_best above 0"
        require(fits, "eval.checkpoint", self.eval.checkpoint, allowed)


# Places of data: they may differ between hosts, and between training and later uses of a checkpoint.
PATHS = ("data.data_dir", "data.folder", "data.archive", "data.cache_dir")
LOCATIONS = (*PATHS, "data.source", "data.cache")


def may_override(path: str) -> bool:
    """Return whether evaluation accepts another value of the field `path`, such as "eval.batch_size"."""
    return path in LOCATIONS or path.startswith(("eval.", "parallel."))


def shared(config: Config) -> dict[str, Any]:
    """Return path -> value of the settings that all processes of a run must agree on: no locations, no devices."""
    return {
        path: value for path, value, _ in _fields(config) if path not in LOCATIONS and not path.startswith("parallel.")
    }


# Settings that the compiled programs take as arguments.
_ARGUMENTS = {
    "seed",
    *(f"optim.{name}" for name in ("learning_rate", "schedule", "warmup_epochs", "warmup_start")),
    *(f"optim.{name}" for name in ("final_share", "final_epochs")),
    *(f"optim.{group}.{name}" for group in GROUPS for name in ("learning_rate", "own_decay")),
}


def program_settings(config: Config) -> tuple[tuple[str, Any], ...]:
    """Return path and value of the settings that the compiled programs depend on.

    Runs for which they are equal can share programs: see `Trainer.for_config`.
    """
    return tuple((path, value) for path, value, _ in _fields(config) if path not in _ARGUMENTS)


def to_dict(config: Config) -> dict[str, Any]:
    """Return `config` as nested dicts of JSON types."""
    return dataclasses.asdict(config)


def from_dict(values: Any) -> Config:
    """Return the validated `Config` of `to_dict`, also of an earlier release. Drop fields that no longer exist.

    Raise `ConfigError` for an unknown field or a value that is not allowed.
    """
    require(isinstance(values, dict), "config", values, "must be a JSON object")
    config = _build(Config, values, "")
    config.validate()
    return config


# Settings that do not affect the weights after a given step may change between restarts of a run.
_HARMLESS = (
    "data.pipeline",
    "data.max_bad_fraction",
    "train.log_every",
    "train.patience",
    "train.steps_per_call",
    "on_nonfinite",
    "max_skipped",
)


def differences(saved: Config, config: Config, where: str = "the checkpoint") -> list[str]:
    """Return the settings that forbid resuming, as lines such as "model.width: 32 in the checkpoint, 64 in the config".

    `train.epochs` may grow if neither the schedule nor the average of the weights depends on it.
    """
    before, now = shared(saved), shared(config)
    harmless = [path for path in before if path in _HARMLESS or path.startswith(("eval.", "checkpoint.", "profile."))]
    may_grow = not SCHEDULES[config.optim.schedule].depends_on_length and config.averaging.name != "lookahead"
    if may_grow and config.train.epochs > saved.train.epochs:
        harmless.append("train.epochs")
    schedules = " or ".join(name for name, schedule in SCHEDULES.items() if not schedule.depends_on_length)
    only = {"train.epochs": f" (it may grow with optim.schedule={schedules} and without lookahead)"}
    return [
        f"{path}: {before.get(path)!r} in {where}, {now.get(path)!r} in the config{only.get(path, '')}"
        for path in before | now
        if before.get(path) != now.get(path) and path not in harmless
    ]


# Fields of earlier releases, which are dropped from saved configs. A run with `eval.tta_below`, which limited TTA to
# images of lower confidence, is then evaluated with TTA for all images.
_RETIRED = ("eval.tta_below",)


def _build(kind: type, values: dict[str, Any], path: str) -> Any:
    known = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        if f"{path}{name}" in _RETIRED:
            continue
        require(name in known, f"{path}{name}", value, "must be a field of this version's config")
        part = known[name]
        if dataclasses.is_dataclass(part):
            require(isinstance(value, dict), f"{path}{name}", value, "must be a JSON object")
            if part is ModelConfig:
                part = models.config_class(value.get("name"))
            value = _build(part, value, f"{path}{name}.")
        else:
            value = _as_tuple(value)
            _check_type(f"{path}{name}", value, part)
        arguments[name] = value
    return kind(**arguments)


def _as_tuple(value: Any) -> Any:
    """Return `value` with all lists, which JSON has instead of tuples, as tuples."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _fields(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, value and declared type of every setting."""
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
        if not isinstance(value, tuple):
            return False
        if members[-1] is ...:
            members = members[:1] * len(value)
        return len(value) == len(members) and all(map(_is_instance, value, members))
    if kind is float:  # accepts an int, but neither NaN nor infinity
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    return type(value) is kind or (value is None and kind is types.NoneType)


def _type_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_name(member) for member in typing.get_args(kind) if member is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return f"({', '.join(map(_type_name, typing.get_args(kind)))})"
    names = {...: "...", int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
    return names.get(kind) or f"{kind.__name__}(...)"


def describe_field(config: Config, path: str, value: str) -> str:
    """Return the type of the field `path` in words; raise `ConfigError` with a suggestion if there is no such field."""
    return _type_name(field_type(config, path, value))


def field_type(config: Config, path: str, value: str) -> Any:
    """Return the declared type of the field `path`; raise `ConfigError` as `describe_field` does."""
    kinds = {name: kind for name, _, kind in _fields(config)}
    if path not in kinds:
        group = path.split(".")[0]
        inside = [other for other in kinds if other.startswith(f"{group}.")]
        groups = dict.fromkeys(other.split(".")[0] for other in kinds)
        close = difflib.get_close_matches(path, kinds, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(inside or groups)}"
        raise ConfigError(f"{path}={value!r}: no such field; {hint}")
    return kinds[path]
