"""The settings of a study: the product of configs and of values of their fields, and ranges to search."""

import dataclasses
import itertools
import math
import operator
import re
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cifar_flax import files
from cifar_flax.config import Config, field_type
from cifar_flax.errors import ConfigError, require

VALIDATION_FRACTION = 0.1  # of a study whose config has none
METHODS = ("tpe", "random")
_SEEDS = 5  # of each setting, unless the command line sets another number
_MOST_TRIALS = 1000  # without --yes
_LONGEST_NAME = 100  # characters
_DATA = ("name", "data_dir", "folder", "archive", "source", "train_split", "eval_split", "test_fraction")


@dataclass(frozen=True, slots=True)
class Range:
    """The values of a field from `low` to `high`, both included."""

    low: float
    high: float
    is_logarithmic: bool
    is_integer: bool


@dataclass(frozen=True, slots=True)
class Search:
    """How to choose settings of a space, in place of all of them."""

    settings: int  # number of settings to try
    method: str  # tpe | random


@dataclass(frozen=True, slots=True)
class Setting:
    """A config, and the values of its fields that vary within the study. Its trials differ in the seed only."""

    name: str
    config: Config
    values: Mapping[str, Any]  # field, or "config" (the config file's name) -> value

    def trial(self, seed: int) -> "Trial":
        return Trial(f"{self.name}_seed{seed}", dataclasses.replace(self.config, seed=seed))


@dataclass(frozen=True, slots=True)
class Trial:
    """A run of a study."""

    name: str  # of its folder
    config: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The settings that a study chooses from."""

    configs: tuple[str, ...]  # names of the config files
    choices: Mapping[str, Sequence[str]]  # field -> its values, as text
    ranges: Mapping[str, Range] = field(default_factory=dict)  # field -> range to search
    seeds: Sequence[int]
    build: Callable[[str, Mapping[str, str]], Config]  # (name of a config file, field -> value as text) -> config
    adds_validation: bool = False  # whether `build` adds a validation split to configs without one
    shared: str = ""  # checksum of the configs without the fields that vary, and of the compared split

    def setting(self, config_name: str, values: Mapping[str, str]) -> Setting:
        """Return a setting. Raise `ConfigError` if a value is not allowed."""
        config = self.build(config_name, values)
        read = {path: operator.attrgetter(path)(config) for path in values}
        shown = "".join(f"_{short}={_text(read[path])}" for path, short in _short_names(values).items())
        name = re.sub(r"[^\w.=+-]+", "-", f"{config_name}{shown}")
        if len(name) > _LONGEST_NAME:
            name = f"{name[: _LONGEST_NAME - 9]}-{files.json_checksum(name)[:8]}"
        return Setting(name, config, ({"config": config_name} if len(self.configs) > 1 else {}) | read)

    def grid(self, *, is_large: bool = False) -> list[Setting]:
        """Return the product of the configs and the choices.

        Raise `ConfigError` if a value is not allowed or listed twice, if the settings cannot be compared, or if there
        are more than 1,000 trials and not `is_large`.
        """
        count = math.prod([len(self.configs), *map(len, self.choices.values())])
        require_few(count * len(self.seeds), is_large=is_large)
        products = itertools.product(self.configs, *self.choices.values())
        found = [self.setting(name, dict(zip(self.choices, texts, strict=True))) for name, *texts in products]
        repeated = [name for name, times in Counter(one.name for one in found).items() if times > 1]
        if repeated:
            raise ConfigError(f"two settings are named {repeated[0]}: a value is listed twice, or two are too similar")
        require_comparable([one.config for one in found])
        return found

    def check(self, search: Search, *, is_large: bool = False) -> list[Setting]:
        """Return settings of a search that have each value, and each end of a range, at least once.

        Raise `ConfigError` as `grid` does. A value is allowed if it is with some value of another field.
        """
        require_few(search.settings * len(self.seeds), is_large=is_large)
        ends = {path: [repr(found.low), repr(found.high)] for path, found in self.ranges.items()}
        values = {"": self.configs, **self.choices, **ends}  # "": the config
        first = {path: texts[0] for path, texts in values.items()}
        singles = [{path: text} for path, texts in values.items() for text in texts]
        found = [self._first_allowed([first | one | other for other in ({}, *singles)], one) for one in singles]
        require_comparable([one.config for one in found])
        return found

    def _first_allowed(self, candidates: Sequence[dict[str, str]], fixed: Mapping[str, str]) -> Setting:
        """Return the first setting that is allowed and has the values `fixed`; raise the first one's error."""
        first_error = None
        for values in candidates:
            try:
                if values.items() >= fixed.items():
                    return self.setting(values[""], {path: text for path, text in values.items() if path})
            except ConfigError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def description(self) -> str:
        """Return the configs, choices and ranges in one line, and a checksum of everything that all settings share."""
        ranges = {
            path: f"{'log:' * found.is_logarithmic}{found.low!r}..{found.high!r}" for path, found in self.ranges.items()
        }
        choices = {path: ",".join(texts) for path, texts in self.choices.items()}
        varied = [f"{path}={text}" for path, text in (choices | ranges).items()]
        return " ".join([*self.configs, *varied, f"seed={','.join(map(str, self.seeds))}", f"({self.shared[:8]})"])


def require_few(count: int, *, is_large: bool) -> None:
    """Raise `ConfigError` if `count` trials are more than a study may have that is not `is_large`."""
    allowed = f"{count:,} trials are more than {_MOST_TRIALS:,}; add --yes to run them all"
    if count > _MOST_TRIALS and not is_large:
        raise ConfigError(allowed)


def require_comparable(configs: Sequence[Config]) -> None:
    """Raise `ConfigError` unless all configs have the same data and the same fraction of it for validation."""
    first = configs[0].data
    for config in configs:
        for name in (*_DATA, "validation_fraction"):
            value, other = getattr(config.data, name), getattr(first, name)
            allowed = f"must be equal in all settings of a study, but another setting has {other!r}"
            require(value == other, f"data.{name}", value, allowed)


def with_validation(config: Config) -> Config:
    """Return `config` with a validation split."""
    if config.data.validation_fraction > 0:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=VALIDATION_FRACTION))


def vary(
    config: Config, texts: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, list[str]], dict[str, Range], set[str]]:
    """Return the fields with several values, those with a range, and their arguments.

    `texts` has (field, text) for each argument. Raise `ConfigError` as `values_of` does, or if a field varies twice.
    """
    choices: dict[str, list[str]] = {}
    ranges: dict[str, Range] = {}
    varied = set()
    seen: set[str] = set()
    for argument, (path, text) in texts.items():
        require(path not in seen, path, text, "is given twice; list its values in one argument")
        seen.add(path)
        values = values_of(config, path, text) if "=" in argument else [text]
        if isinstance(values, Range):
            require(path != "seed", path, text, "must not be a range; use --seeds=N, or list values")
            ranges[path] = values
        elif len(values) > 1:
            choices[path] = values
        else:
            continue
        varied.add(argument)
    return choices, ranges, varied


def values_of(config: Config, path: str, text: str) -> list[str] | Range:
    """Return the values, as text, or the range that `text` lists for the field `path`.

    Values of a tuple are separated by ";", others by ",". A range is `LOW..HIGH` or `log:LOW..HIGH`. Raise
    `ConfigError` if one is empty or no range.
    """
    kind = field_type(config, path, text)
    kinds = typing.get_args(kind) or (kind,)
    is_tuple = typing.get_origin(kind) is tuple
    if not is_tuple and {int, float} & {*kinds} and (".." in text or text.startswith("log:")):
        return _range(path, text, is_integer=float not in kinds)
    values = [value.strip() for value in text.split(";" if is_tuple else ",")]
    require(len(values) == 1 or all(values), path, text, "one of its values is empty")
    require(len(values) == len(set(values)), path, text, "lists a value twice")
    return values


def seeds_of(listed: Sequence[str] | None, count: int | None, first: int) -> Sequence[int]:
    """Return the seeds of each setting: those `listed`, or `count` (default: 5) seeds from `first` on."""
    if listed is not None:
        require(count is None, "--seeds", count, f"must not be used with seed={','.join(listed)}")
        for text in listed:
            require(text.isdecimal(), "seed", text, "must be an integer in [0, 2**32)")
        seeds: Sequence[int] = list(map(int, listed))
        require(len(set(seeds)) == len(seeds), "seed", ",".join(listed), "lists a seed twice")
        last = max(seeds)
    else:
        count = _SEEDS if count is None else count
        require(count >= 1, "--seeds", count, "must be at least 1")
        seeds, last = range(first, first + count), first + count - 1
    require(last < 2**32, "seed", last, "must be in [0, 2**32)")
    return seeds


def search_of(settings: int | None, method: str | None, *, has_ranges: bool, varies: bool) -> Search | None:
    """Return how to search, or None if the study has all settings of its space. Raise `ConfigError` if it cannot."""
    if settings is None:
        require(method is None, "--search", method, "needs --settings=N, the number of settings to try")
        if has_ranges:
            raise ConfigError("a range such as log:1e-4..1e-2 needs --settings=N, the number of settings to try")
        return None
    require(settings >= 1, "--settings", settings, "must be at least 1")
    allowed = "nothing varies: add a range such as --config.optim.learning_rate=log:1e-4..1e-2, or several values"
    require(has_ranges or varies, "--settings", settings, allowed)
    require(method in (None, *METHODS), "--search", method, f"must be {' or '.join(METHODS)}")
    return Search(settings, method or METHODS[0])


def _range(path: str, text: str, *, is_integer: bool) -> Range:
    logarithmic = text.startswith("log:")
    try:
        low, high = map(int if is_integer else float, text.removeprefix("log:").split(".."))
        fits = math.isfinite(high - low) and "..." not in text  # "1e-4...1e-2" could mean up to 1e-2 or .1e-2
    except (ValueError, OverflowError):
        fits = False
    example = "log:8..64" if is_integer else "log:1e-4..1e-2"
    require(fits, path, text, f"must be a range of {'integers' if is_integer else 'numbers'} such as {example}")
    require(low < high, path, text, "the range must end above its start")
    require(not logarithmic or low > 0, path, text, "a logarithmic range must start above 0")
    return Range(low, high, logarithmic, is_integer)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _short_names(paths: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Return path -> its shortest trailing part that is unique, such as "learning_rate" or "dense.learning_rate"."""
    ends = {path: [path.split(".", count)[-1] for count in range(path.count("."), -1, -1)] for path in paths}
    counts = Counter(end for of in ends.values() for end in of)
    return {path: next(end for end in of if counts[end] == 1) for path, of in ends.items()}
