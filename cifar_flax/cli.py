"""The command line: arguments -> what to do, with every mistake as one line."""

import argparse
import re
import runpy
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from cifar_flax.config import LOCATIONS, Config, describe_field, may_override
from cifar_flax.errors import ConfigError, require
from cifar_flax.evaluate import saved_config

_EXAMPLES = """
examples:
  python main.py --config configs/quickstart.py
  python main.py --config configs/default.py --config.train.epochs=30 --workdir=runs/longer
  python main.py --mode=eval --workdir=runs/default
"""


@dataclass(frozen=True, slots=True)
class Command:
    mode: str
    workdir: Path
    config: Config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parse(argv: Sequence[str], modes: Sequence[str]) -> Command:
    """Reads the arguments after the program's name; raises `ConfigError` for the first that is not allowed."""
    parser = _Parser(
        prog="main.py",
        description="Trains, checkpoints and evaluates small-image classifiers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--mode", choices=modes, default="train", help="what to do (default: train)")
    parser.add_argument(
        "--config", metavar="FILE", help="train: the config file; --config.FIELD=VALUE changes a field of it"
    )
    parser.add_argument("--workdir", metavar="DIR", help="where a run lives (train: runs/<name of the config file>)")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.mode == "train":
        require(arguments.config is not None, "--config", arguments.config, "train needs a config file")
        config, workdir = _load(arguments.config), arguments.workdir or f"runs/{Path(arguments.config).stem}"
    else:
        allowed = "not used here: the config saved with the checkpoint is; name the run's folder by --workdir"
        require(arguments.config is None, "--config", arguments.config, allowed)
        require(
            arguments.workdir is not None, "--workdir", arguments.workdir, f"{arguments.mode} needs the folder of a run"
        )
        config, workdir = saved_config(Path(arguments.workdir)), arguments.workdir
    config, changed = _override(config, overrides)
    config.validate()
    if arguments.mode != "train":
        for path, value in changed.items():
            require(
                may_override(path),
                path,
                value,
                f"cannot be changed in {arguments.mode}; {', '.join(LOCATIONS)}, eval.* and parallel.* can",
            )
    return Command(arguments.mode, Path(workdir), config)


def _load(path: str) -> Config:
    """What the `get_config` of a Python file returns."""
    require(Path(path).is_file(), "--config", path, "no such file")
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:  # whatever the file does wrong
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if str(error) == "'get_config'":
            reason = "it defines no get_config()"
        raise ConfigError(f"--config={path!r}: {f'line {line}: ' if line else ''}{reason}") from error
    require(
        isinstance(config, Config), "--config", path, f"get_config() returns a {type(config).__name__}, not a Config"
    )
    return config


def _override(config: Config, arguments: list[str]) -> tuple[Config, dict[str, Any]]:
    """A copy with the fields set that arguments such as `--config.seed=1` name; and path -> new value."""
    allowed = {}
    for argument in arguments:
        if match := re.match(r"--?(?:no)?config\.([^=]*)=?(.*)", argument):
            allowed[match[1]] = describe_field(config, match[1], match[2] or "")
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=["", *arguments])
        rest = values(["main.py", *arguments])[1:]
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([^=]*)=(.*?): ", str(error), re.DOTALL)
        if match is None or match[1] not in allowed:
            raise ConfigError(" ".join(str(error).split())) from error
        raise ConfigError(f"{match[1]}={match[2]!r}: must be {allowed[match[1]]}") from error
    except flags.Error as error:
        raise ConfigError(f"{' '.join(str(error).split())} (see --help)") from error
    if rest:
        raise ConfigError(f"unknown argument {rest[0]!r} (see --help)")
    flag: Any = values["config"]
    return flag.value, config_flags.get_override_values(flag)
