"""Parse and check the command-line arguments."""

import argparse
import contextlib
import copy
import operator
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from cifar_flax import config as configs
from cifar_flax import files
from cifar_flax.config import LOCATIONS, PATHS, Config, describe_field, may_override
from cifar_flax.errors import ConfigError, one_line, require
from cifar_flax.paths import local_path
from cifar_flax.restore import saved_config
from cifar_flax.study.space import Search, Space, search_of, seeds_of, vary, with_validation

_DESCRIPTION = """
Train, evaluate and use small-image classifiers.

modes:
  train     train a model, or resume from its newest checkpoint; needs --config (default mode)
  eval      evaluate a trained model again and write eval.json and report.html; needs --workdir
  predict   classify image files and folders of images, listed as PATH; needs --workdir
  study     compare values of settings (--config.FIELD=V1,V2) over seeds; needs --config and --workdir
  compare   write one page that compares the runs, or the study, in the folders listed as PATH
  export    write the model as safetensors and StableHLO for other programs; needs --workdir and --output
  doctor    check whether a run can start on this machine
"""
_EXAMPLES = """
examples:
  %(prog)s --config default --config.train.epochs=30 --workdir=runs/longer
  %(prog)s --mode=predict --workdir=runs/longer holiday/ cat.jpg
  %(prog)s --mode=study --config default --config.optim.learning_rate=5e-4,1e-3 --workdir=studies/rates
"""


_OVERRIDE = r"--?(?:no)?config\.([^=]*)=?(.*)"  # such as --config.seed=1


@dataclass(frozen=True, slots=True)
class _Mode:
    """The command-line options that a mode accepts (`takes`) and requires (`needs`)."""

    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    paths: int = 0  # minimum number of PATH arguments; 0: PATH is not accepted


MODES = {
    "train": _Mode(takes=("--config", "--workdir", "--summary"), needs=("--config",)),
    "eval": _Mode(takes=("--workdir",), needs=("--workdir",)),
    "predict": _Mode(takes=("--workdir", "--output"), needs=("--workdir",), paths=1),
    "study": _Mode(
        takes=("--config", "--workdir", "--seeds", "--settings", "--search", "--on-test", "--yes"),
        needs=("--config", "--workdir"),
    ),
    "compare": _Mode(takes=("--output", "--on-test"), paths=1),
    "export": _Mode(takes=("--workdir", "--output"), needs=("--workdir", "--output")),
    "doctor": _Mode(takes=("--config", "--workdir", "--online")),
}


_NEEDED_OPTIONS = {
    "--config": "a config file: --config FILE",
    "--workdir": "the folder of a {}: --workdir=DIR",
    "--output": "a folder to write to: --output=DIR",
}
_NEEDED_PATHS = {"predict": "image files or folders", "compare": "the folders of two or more runs, or of a study"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A parsed and checked command line."""

    mode: str
    config: Config  # from the config file or the checkpoint, with `--config.FIELD=VALUE` applied
    workdir: Path
    paths: tuple[Path, ...]
    output: Path | None
    summary: bool
    online: bool
    is_large: bool  # run more than 1,000 trials
    on_test: bool  # compare on the evaluation split, not on the validation split
    space: Space | None = None  # the settings of --mode=study
    search: Search | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parse(argv: Sequence[str]) -> Command:
    """Parse `argv`, without the program name. Raise `ConfigError` for the first argument that is not allowed."""
    arguments, rest = _parser().parse_known_args(argv)
    name, mode = arguments.mode, MODES[arguments.mode]
    options = {f"--{option.replace('_', '-')}": value for option, value in vars(arguments).items() if option != "mode"}
    uses_run = "--workdir" in mode.needs and "--config" not in mode.takes
    saved = ", which uses the config saved with the checkpoint; pass --workdir instead" if uses_run else ""
    for option, value in options.items():
        instead = saved if option == "--config" else ""
        value = " ".join(value) if isinstance(value, list) else value
        is_given = not (value is None or value is False or value == "")
        if is_given and option not in mode.takes:
            shown = option if value is True else f"{option}={value!r}"
            raise ConfigError(f"{shown}: not used in {name}{instead}")
    for argument in rest:
        if re.match(r"--?[a-zA-Z]", argument) and not re.match(_OVERRIDE, argument):
            raise ConfigError(f"unknown argument {argument!r} (see --help)")
    for option in mode.needs:
        if not options[option]:
            needed = _NEEDED_OPTIONS[option].format("study" if name == "study" else "run")
            raise ConfigError(f"{name} needs {needed} (see --help)")
    given, space, search = arguments.config, None, None
    require(len(given) <= 1 or name == "study", "--config", " ".join(given), f"only one is used in {name}")
    workdir = local_path("--workdir", arguments.workdir or f"runs/{Path(given[0] if given else name).stem}")
    output = local_path("--output", arguments.output) if arguments.output else None
    if uses_run or (name == "doctor" and arguments.workdir and not given):
        config = saved_config(workdir)
    else:
        config = _load(given[0]) if given else Config()
    if name == "study":
        space, search, rest = _study(arguments, rest)
    config, changed, paths = _override(config, rest)
    if space is None:  # otherwise, each setting of it is validated
        config.validate()
    if not uses_run:  # eval, predict and export may not need the places that the saved config names
        for field in (*PATHS, "train.init_from"):
            local_path(field, operator.attrgetter(field)(config))
    for path, value in changed.items():
        allowed = f"only {', '.join(LOCATIONS)}, eval.* and parallel.* may change in {name}"
        require(not uses_run or may_override(path), path, value, allowed)
        require(name != "compare", path, value, "not used in compare")
    if paths and not mode.paths:
        raise ConfigError(f"unknown argument {paths[0]!r} (see --help)")
    if len(paths) < mode.paths:
        raise ConfigError(f"{name} needs {_NEEDED_PATHS[name]} (see --help)")
    return Command(
        mode=name,
        config=config,
        workdir=workdir,
        paths=tuple(local_path("PATH", path) for path in paths),
        output=output,
        summary=arguments.summary,
        online=arguments.online,
        is_large=arguments.yes,
        on_test=arguments.on_test,
        space=space,
        search=search,
    )


def _study(arguments: argparse.Namespace, rest: list[str]) -> tuple[Space, Search | None, list[str]]:
    """Return the settings of a study, how to search them, and the arguments in `rest` that all settings share."""
    loaded: dict[str, Config] = {}
    for file in arguments.config:
        allowed = f"another config is also named {Path(file).stem}; rename one"
        require(Path(file).stem not in loaded, "--config", file, allowed)
        loaded[Path(file).stem] = _load(file)
    texts = {argument: (match[1], match[2]) for argument in rest if (match := re.match(_OVERRIDE, argument))}
    choices, ranges, varied = vary(next(iter(loaded.values())), texts)
    fixed = [argument for argument in rest if argument not in varied]
    shared = {name: _override(copy.deepcopy(config), fixed)[0] for name, config in loaded.items()}

    def build(name: str, values: Mapping[str, str]) -> Config:
        chosen = [f"--config.{path}={value}" for path, value in values.items()]
        config = _override(copy.deepcopy(shared[name]), chosen)[0]
        config = config if arguments.on_test else with_validation(config)
        config.validate()
        return config

    seeds = seeds_of(choices.pop("seed", None), arguments.seeds, next(iter(shared.values())).seed)
    varies = bool(choices) or len(shared) > 1
    search = search_of(arguments.settings, arguments.search, has_ranges=bool(ranges), varies=varies)
    if search is not None and arguments.on_test:
        raise ConfigError("--on-test: not used in a search, which must not choose settings by the test split")
    space = Space(
        configs=tuple(shared), choices=choices, ranges=ranges, seeds=seeds, build=build,
        adds_validation=any(config.data.validation_fraction == 0 for config in shared.values()),
        shared=files.json_checksum([{name: configs.shared(one) for name, one in shared.items()}, arguments.on_test]),
    )  # fmt: skip
    return space, search, fixed


def _parser() -> argparse.ArgumentParser:
    started_as = {"main.py": "python main.py", "__main__.py": "python -m cifar_flax"}
    parser = _Parser(
        prog=started_as.get(Path(sys.argv[0]).name, "cifar-flax"),
        usage="%(prog)s [--mode=MODE] [options] [PATH ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--mode", choices=tuple(MODES), default="train", help=argparse.SUPPRESS)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="train, study, doctor: config file, or name of a shipped config; --config.FIELD=VALUE sets a field",
    )
    run.add_argument("--workdir", metavar="DIR", help="folder of the run (default: runs/<name of the config>) or study")
    run.add_argument("--online", action="store_true", help="doctor: also test the connection for the download of data")
    study = parser.add_argument_group("study")
    study.add_argument(
        "--seeds", metavar="N", type=int, help="runs of each setting, with seeds from config.seed on (5)"
    )
    study.add_argument(
        "--settings", metavar="N", type=int, help="settings to try of the ranges --config.FIELD=LOW..HIGH"
    )
    study.add_argument("--search", metavar="METHOD", help="how to choose them: tpe (default) or random")
    study.add_argument("--on-test", action="store_true", help="study, compare: compare on the test split")
    study.add_argument("--yes", action="store_true", help="run more than 1,000 trials")
    results = parser.add_argument_group("output")
    results.add_argument("--summary", action="store_true", help="train: print the model's layers first")
    results.add_argument(
        "--output",
        metavar="PATH",
        help="predict: .csv, .json or .jsonl file; compare: page (default: comparison.html); export: new folder",
    )
    return parser


def _config_file(name: str) -> Path:
    """Return the path of the config file `name`, which is a path or the name of a shipped config."""
    path = local_path("--config", name)
    if path.is_file():
        return path
    if path.suffix or os.path.basename(name) != name:
        raise ConfigError(f"--config={name!r}: no such file")
    package = Path(__file__).parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"  # in a checkout
    shipped, names = folder / f"{name}.py", ", ".join(sorted(file.stem for file in folder.glob("*.py")))
    require(shipped.is_file(), "--config", name, f"must be the path of a config file, or one of {names}")
    return shipped


@contextlib.contextmanager
def _siblings(folder: Path) -> Iterator[None]:
    """Let a config file in `folder` import its siblings: `import other` or `from configs import other`."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path[:] = [str(folder), *path, str(folder.parent)]
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:  # another folder may have a module of the same name
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent == folder:
                del sys.modules[name]


def _load(name: str) -> Config:
    """Return the config that `get_config()` in the config file `name` returns."""
    path = str(_config_file(name))
    try:
        with _siblings(Path(path).resolve().parent):
            names = runpy.run_path(path)
            require("get_config" in names, "--config", name, "must define get_config()")
            config = names["get_config"]()
    except ConfigError:
        raise
    except Exception as error:  # a config file can raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        raise ConfigError(f"--config={name!r}: {f'line {line}: ' if line else ''}{one_line(error)}") from error
    allowed = f"get_config() must return a Config, not {type(config).__name__}"
    require(isinstance(config, Config), "--config", name, allowed)
    return config


def _override(config: Config, arguments: list[str]) -> tuple[Config, dict[str, Any], list[str]]:
    """Apply the arguments that override fields, such as `--config.seed=1`.

    Return the new config, a dict from overridden field to new value, and the other arguments.
    """
    overrides = [match for argument in arguments if (match := re.match(_OVERRIDE, argument))]
    allowed = {match[1]: describe_field(config, match[1], match[2]) for match in overrides}
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # overrides may follow PATH arguments
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=["", *arguments])
        rest = values(["main.py", *arguments])[1:]
    except flags.Error as error:
        match = re.match(r"flag --config\.([^=]*)=(.*?): ", str(error), re.DOTALL)
        if match and match[1] in allowed:
            raise ConfigError(f"{match[1]}={match[2]!r}: must be {allowed[match[1]]}") from error
        raise ConfigError(f"{' '.join(str(error).split())} (see --help)") from error
    flag: Any = values["config"]
    return flag.value, config_flags.get_override_values(flag), rest
