"""Check which required and optional packages are installed, in which versions, and whether they can be imported.

Only the standard library is imported, so that missing, old and broken packages can be reported.
"""

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import cifar_flax
from cifar_flax.errors import UserError, one_line

PYTHONS = ((3, 11), (3, 14))  # oldest and newest supported version


@dataclass(frozen=True, slots=True)
class Package:
    module: str  # module to import
    oldest: str  # oldest supported version, as in pyproject.toml
    used_for: str = ""  # feature that needs the package; "": every run needs it
    extra: str = ""  # extra of this package that installs it; "": installed by default


# By the name of the distribution. Packages follow those that they import, which are then named if they are broken.
PACKAGES = {
    "numpy": Package("numpy", "2.0"),
    "jax": Package("jax", "0.10"),
    "flax": Package("flax.nnx", "0.12.6"),
    "optax": Package("optax", "0.2.6"),
    "orbax-checkpoint": Package("orbax.checkpoint", "0.12"),
    "ml-collections": Package("ml_collections", "1.1"),
    "absl-py": Package("absl", "2.1"),
    "jaxtyping": Package("jaxtyping", "0.3.2"),
    "pyarrow": Package("pyarrow.parquet", "20.0", "data.archive in Parquet"),
    "huggingface-hub": Package("huggingface_hub", "1.0", "downloading CIFAR-10 and CIFAR-100 from the hub"),
    "tensorflow": Package("tensorflow", "2.20", "tf.data pipelines and preparing TFDS datasets"),
    "tensorflow-datasets": Package("tensorflow_datasets", "4.9.10", "preparing TFDS datasets"),
    "scikit-learn": Package("sklearn.datasets", "1.6", "data.name=digits"),
    "scipy": Package("scipy.special", "1.14", "the intervals of --mode=compare and --mode=study"),
    "optuna": Package("optuna", "4.0", "ranges and --settings of --mode=study", extra="study"),
    "matplotlib": Package("matplotlib.figure", "3.9", "confusion_matrix.png"),
    "tensorboardX": Package("tensorboardX", "2.6.2", "TensorBoard events"),
    "tqdm": Package("tqdm", "4.66", "the progress bar"),
    "pillow": Package("PIL.Image", "10.1", "--mode=predict"),
    "safetensors": Package("safetensors.numpy", "0.5", "--mode=export"),
    "flatbuffers": Package("flatbuffers", "24.3.25", "--mode=export"),  # jax.export imports it without declaring it
}
# Distributions that provide the module `tensorflow`.
_TENSORFLOWS = ("tensorflow", "tensorflow-cpu", "tensorflow-macos", "tf-nightly")
REQUIRED = tuple(name for name, package in PACKAGES.items() if not package.used_for)
OPTIONAL = tuple(name for name in PACKAGES if name not in REQUIRED)
_broken: dict[str, UserError] = {}  # by name, the errors of packages that `load` could not import


def version(name: str) -> str | None:
    """Return the installed version of the distribution `name`, or None if it is not installed."""
    for each in _TENSORFLOWS if name == "tensorflow" else (name,):
        try:
            return importlib.metadata.version(each)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def versions() -> dict[str, str]:
    """Return a dict from name to version of this package, Python, jaxlib and the installed packages of `PACKAGES`."""
    found = {"cifar_flax": cifar_flax.__version__, "python": platform.python_version()}
    return found | {name: installed for name in ("jaxlib", *PACKAGES) if (installed := version(name))}


def installed(name: str) -> bool:
    """Return whether the package `name` of `PACKAGES` is installed, without importing it."""
    return has_module(PACKAGES[name].module.partition(".")[0])


def has_module(module: str) -> bool:
    """Return whether the top-level `module` is installed, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules has an entry without a spec
        return False


def fault(name: str) -> str | None:
    """Return why the package `name` cannot be used (missing, too old, or `load` failed), or None."""
    if name in _broken:
        return str(_broken[name])
    wanted, found = PACKAGES[name].oldest, version(name)
    if not installed(name):
        if not _is_available(name):
            return f"{name} is not available for this version of Python; use Python 3.11 to 3.13"
        return f"{name} is not installed; {name}>={wanted} is needed"
    if found is not None and numbers(found) < numbers(wanted):
        return f"{name} {found} is too old; {name}>={wanted} is needed"
    return None


def _is_available(name: str) -> bool:
    """Return whether the package exists for this version of Python."""
    return sys.version_info < (3, 14) or not name.startswith("tensorflow")


def require(names: Iterable[str], purpose: str = "") -> None:
    """Raise `UserError` if packages in `names` are missing or too old; `purpose` begins the message."""
    faults = {name: reason for name in names if (reason := fault(name))}
    if faults:
        advice = _advice(name for name in faults if _is_available(name) and name not in _broken)
        raise UserError(f"{purpose}{': ' if purpose else ''}{'; '.join(faults.values())}{advice}")


def load(name: str, module: str = "") -> ModuleType:
    """Import and return `module` of the package `name`, by default the one in `PACKAGES`.

    Raise `UserError` that names the required version if the package is missing, too old or cannot be imported.
    """
    if name in _broken:
        raise _broken[name]
    package = PACKAGES[name]
    require([name], package.used_for)
    try:
        loaded = importlib.import_module(module or package.module)
        if loaded.__file__ is None:  # the folder is left of an uninstalled package
            raise ImportError("its files are missing")
        return loaded
    except Exception as error:  # importing incompatible packages can raise anything
        _broken[name] = broken(culprit(error) or name, error)
        # Libraries that use the package if it is there ignore only the ImportError of a missing one.
        sys.modules.setdefault(package.module.partition(".")[0], None)  # type: ignore[arg-type]
        raise _broken[name] from error


def culprit(error: Exception) -> str | None:
    """Return the package whose import raised `error`, or None if it is not in `PACKAGES`."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    named = [str(error.name)] if isinstance(error, ImportError) else []
    # A missing module is at fault itself. A module that lacks a name may have been imported by an older package.
    modules = named + frames[::-1] if isinstance(error, ModuleNotFoundError) else frames[::-1] + named
    by_module = {package.module.partition(".")[0]: name for name, package in PACKAGES.items()} | {"jaxlib": "jax"}
    return next(filter(None, (by_module.get(module.partition(".")[0]) for module in modules)), None)


def cuda_fault() -> str | None:
    """Return why JAX cannot use CUDA: its plugin is not installed, or has another version than jaxlib."""
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin"):  # JAX prefers the newer one
        if found := version(name):
            jaxlib = version("jaxlib") or ""
            differ = f"{name} is {found}, jaxlib {jaxlib}: their versions must be equal"
            return None if numbers(found) == numbers(jaxlib) else differ
    return "JAX's CUDA plugin is not installed"


def broken(name: str, error: Exception) -> UserError:
    """Return the error to raise if importing the package `name` raised `error`."""
    found, wanted = version(name) or "(version unknown)", f"{name}>={PACKAGES[name].oldest} is needed"
    return UserError(f"{name} {found} cannot be imported ({one_line(error)}); {wanted}{_advice([name])}")


def _advice(names: Iterable[str]) -> str:
    wanted = [f'"{name}>={PACKAGES[name].oldest}"' for name in names]
    return f" (pip install -U {' '.join(wanted)})" if wanted else ""


def numbers(version: str) -> list[int]:
    """Return the release segment of `version` as numbers, such as [2, 20, 0] for "2.20.0rc1"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in match[0].split(".")] if match else []


@contextmanager
def without(module: str) -> Iterator[None]:
    """Make imports of `module` fail inside the block, unless it is already imported.

    This saves time: some libraries import large modules only to recognize their objects as arguments.
    """
    there = module in sys.modules
    sys.modules.setdefault(module, None)  # type: ignore[arg-type]  # importing a module that is None fails
    try:
        yield
    finally:
        if not there:
            del sys.modules[module]
