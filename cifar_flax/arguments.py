"""The arguments of the command line, parsed and checked."""

import argparse
import contextlib
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from cifar_flax.config import LOCATIONS, Config, describe_field, may_override
from cifar_flax.errors import ConfigError, require
from cifar_flax.restore import saved_config

_DESCRIPTION = """
Trains small-image classifiers, and serves what was trained.

modes:
  train     a run, from its newest checkpoint if there is one; needs --config (this is the default)
  eval      counts the test split again, and writes the run's eval.json and report.html; needs --workdir
  predict   classifies the image files, and those in the folders, that PATH names; needs --workdir
  compare   the runs in the folders that PATH names, side by side on one page
  export    the network for other programs: safetensors, StableHLO; needs --workdir and --output
  doctor    what would keep a run from starting here
"""
_EXAMPLES = """
examples:
  python main.py --config configs/default.py --config.train.epochs=30 --workdir=runs/longer
  python main.py --mode=eval --workdir=runs/longer
  python main.py --mode=predict --workdir=runs/longer holiday/ cat.jpg
"""


_OVERRIDE = r"--?(?:no)?config\.([^=]*)=?(.*)"  # such as --config.seed=1


@dataclass(frozen=True, slots=True)
class _Mode:
    """The options that a mode accepts and requires, by their names on the command line."""

    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    paths: int = 0  # the minimum number of PATH arguments; 0: none are accepted


MODES = {
    "train": _Mode(takes=("--config", "--workdir", "--summary"), needs=("--config",)),
    "eval": _Mode(takes=("--workdir",), needs=("--workdir",)),
    "predict": _Mode(takes=("--workdir", "--output"), needs=("--workdir",), paths=1),
    "compare": _Mode(takes=("--output",), paths=2),
    "export": _Mode(takes=("--workdir", "--output"), needs=("--workdir", "--output")),
    "doctor": _Mode(takes=("--config", "--workdir")),
}


_WHAT = {
    "--config": "a config file: --config FILE",
    "--workdir": "the folder of a run: --workdir=DIR",
    "--output": "a folder to write to: --output=DIR",
}
_PATHS = {"predict": "image files or folders", "compare": "the folders of two runs or more"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    mode: str
    config: Config  # the file's, or the one saved in the workdir, with the fields that flags set
    workdir: Path
    paths: tuple[Path, ...]
    output: Path | None
    summary: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parse(argv: Sequence[str]) -> Command:
    """Read the arguments after the program's name; raise `ConfigError` for the first that is not allowed."""
    arguments, rest = _parser().parse_known_args(argv)
    name, mode = arguments.mode, MODES[arguments.mode]
    given = {f"--{option}": value for option, value in vars(arguments).items() if option != "mode"}
    uses_run = "--workdir" in mode.needs
    saved = ": the config saved with the checkpoint is; name the run's folder by --workdir" if uses_run else ""
    for option, value in given.items():
        instead = saved if option == "--config" else ""
        require(not value or option in mode.takes, option, value, f"not used in {name}{instead}")
    for argument in rest:
        if re.match(r"--?[a-zA-Z]", argument) and not re.match(_OVERRIDE, argument):
            raise ConfigError(f"unknown argument {argument!r} (see --help)")
    for option in mode.needs:
        if not given[option]:
            raise ConfigError(f"{name} needs {_WHAT[option]} (see --help)")
    if uses_run or (name == "doctor" and arguments.workdir and not arguments.config):
        config = saved_config(Path(arguments.workdir))
    else:
        config = _load(arguments.config) if arguments.config else Config()
    config, changed, paths = _override(config, rest)
    config.validate()
    for path, value in changed.items():
        others = f"{', '.join(LOCATIONS)}, eval.* and parallel.* can"
        require(not uses_run or may_override(path), path, value, f"cannot be changed in {name}; {others}")
        require(name != "compare", path, value, "not used in compare")
    if paths and not mode.paths:
        raise ConfigError(f"unknown argument {paths[0]!r} (see --help)")
    if len(paths) < mode.paths:
        raise ConfigError(f"{name} needs {_PATHS[name]} (see --help)")
    return Command(
        mode=name,
        config=config,
        workdir=Path(arguments.workdir or f"runs/{Path(arguments.config or name).stem}"),
        paths=tuple(map(Path, paths)),
        output=Path(arguments.output) if arguments.output else None,
        summary=arguments.summary,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        usage="main.py [--mode=MODE] [options] [PATH ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--mode", choices=tuple(MODES), default="train", help=argparse.SUPPRESS)
    run = parser.add_argument_group("which run")
    run.add_argument(
        "--config",
        metavar="FILE",
        help="train, doctor: a config file, or the name of one that ships; --config.FIELD=VALUE sets a field",
    )
    run.add_argument("--workdir", metavar="DIR", help="where the run lives (train: runs/<name of the config file>)")
    results = parser.add_argument_group("results")
    results.add_argument("--summary", action="store_true", help="train: print the network's layers first")
    results.add_argument(
        "--output",
        metavar="PATH",
        help="predict: a .csv, .json or .jsonl file; compare: the page (comparison.html); export: a folder",
    )
    return parser


def shipped_configs() -> Path:
    """Return the folder of the configs that ship with this package: inside it, or beside it in a checkout."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def _config_file(name: str) -> Path:
    """Return the file that `--config` means: a path, or a shipped config by its name alone."""
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or os.path.basename(name) != name:
        raise ConfigError(f"--config={name!r}: no such file")
    shipped = shipped_configs() / f"{name}.py"
    names = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.py")))
    require(shipped.is_file(), "--config", name, f"must be the path of a config file, or one of {names}")
    return shipped


@contextlib.contextmanager
def _siblings(folder: Path) -> Iterator[None]:
    """Let a config in `folder` import its siblings inside the block: `import other` or `from configs import other`."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path[:] = [str(folder), *path, str(folder.parent)]
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:  # another folder may have a file of the same name
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent == folder:
                del sys.modules[name]


def _load(name: str) -> Config:
    """Return what the `get_config` of a Python file returns."""
    path = str(_config_file(name))
    try:
        with _siblings(Path(path).resolve().parent):
            config = runpy.run_path(path)["get_config"]()
    except Exception as error:  # a config file may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if str(error) == "'get_config'":
            reason = "it defines no get_config()"
        raise ConfigError(f"--config={name!r}: {f'line {line}: ' if line else ''}{reason}") from error
    returned = f"get_config() returns a {type(config).__name__}, not a Config"
    require(isinstance(config, Config), "--config", name, returned)
    return config


def _override(config: Config, arguments: list[str]) -> tuple[Config, dict[str, Any], list[str]]:
    """Apply arguments such as `--config.seed=1`; return the new config, field -> new value, and the other arguments."""
    overrides = [match for argument in arguments if (match := re.match(_OVERRIDE, argument))]
    allowed = {match[1]: describe_field(config, match[1], match[2]) for match in overrides}
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may come after other arguments
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
