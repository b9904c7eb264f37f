"""Check the import rules: packages and files import only from lower layers, without cycles."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter

from conftest import REPOSITORY, python_path

from cifar_flax.packages import OPTIONAL, PACKAGES

ROOT = REPOSITORY / "cifar_flax"

# Every file may import these; they may import only each other.
GROUND = {"errors", "files", "packages", "paths", "__init__"}
# Package or root-level file -> the packages and root-level files that it may import in addition to GROUND.
RULES = {
    "runtime": set(),
    "models": set(),
    "data": {"runtime"},
    "checkpoints": {"runtime"},
    "telemetry": {"runtime"},
    # config.py combines the config dataclasses of all packages; the training loop needs the whole Config.
    "training": {"runtime", "models", "data", "checkpoints", "telemetry", "config"},
    "report": {"runtime", "data", "training", "telemetry"},
    "export": {"runtime", "training", "config", "restore"},
    "study": {"runtime", "telemetry", "config", "report"},
    "diagnosis": {"runtime", "data", "checkpoints", "training", "config", "workdir"},
}
# These may import any package except `modes`. Only the command line imports `modes`; nothing imports the command line.
FREE = {"config", "workdir", "restore", "classifier", "modes"}
COMMAND_LINE = {"arguments", "cli", "__main__"}
# Library -> the packages or root-level files that may import it.
IMPORTERS = {"orbax": {"checkpoints"}, "flax.nnx": {"models", "training"}, "ml_collections": {"arguments"}}


def files():
    """Yield the dotted name and the syntax tree of each file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), ast.parse(path.read_text())


FILES = dict(files())


def imports(node):
    """Yield the full names that `node` and its descendants import; for `from a import b`, "a.b"."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def project_imports(tree):
    """Yield the dotted names of the files of this package that `tree` imports."""
    for target in imports(tree):
        inside = target.removeprefix("cifar_flax").lstrip(".")
        if target.split(".")[0] == "cifar_flax":
            matches = [name for name in FILES if f"{inside}.".startswith(f"{name}.")]
            yield max(matches, key=len, default="__init__")


def unit(name):
    """Return the package, or the file at the root, that the file `name` belongs to."""
    return name.split(".")[0]


def test_packages_import_only_from_lower_layers():
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert packages <= RULES.keys() | FREE, "add a rule for the new package to RULES"
    for name, tree in FILES.items():
        ours = unit(name)
        theirs = {unit(target) for target in project_imports(tree)} - {ours}
        if ours in COMMAND_LINE:
            continue
        assert not theirs & COMMAND_LINE, name
        if ours in FREE:
            assert ours == "modes" or "modes" not in theirs, name
        elif ours in GROUND:
            # `cifar_flax.load` imports other packages, but only when it is called.
            assert name == "__init__" or theirs <= GROUND, name
        else:
            assert theirs <= GROUND | RULES[ours], f"{name} imports {theirs - GROUND - RULES[ours]}"


def test_there_are_no_import_cycles():
    graph = {
        name: {target for target in project_imports(tree) if target not in (name, "__init__")}
        for name, tree in FILES.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_libraries_are_imported_only_where_allowed():
    for name, tree in FILES.items():
        for target in imports(tree):
            for library, allowed in IMPORTERS.items():
                assert not f"{target}.".startswith(f"{library}.") or unit(name) in allowed, f"{name} imports {library}"


def test_optional_packages_are_not_imported_at_module_level():
    """They may be missing or broken, which `packages.load` reports when they are needed."""
    optional = {PACKAGES[name].module.split(".")[0] for name in OPTIONAL}
    for name, tree in FILES.items():
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.Try, ast.With)):
                assert not {target.split(".")[0] for target in imports(node)} & optional, name


def test_the_package_has_at_most_12_root_level_files():
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_importing_the_package_does_not_import_large_libraries():
    code = "import sys, cifar_flax, cifar_flax.cli; print({'jax', 'numpy', 'orbax', 'flax'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_tensorboard_events_do_not_import_pytorch(tmp_path):
    """tensorboardX would import PyTorch: see telemetry/tensorboard.py. PyTorch can still be imported later."""
    (tmp_path / "torch.py").write_text("print('torch imported')")
    code = (
        "from pathlib import Path\n"
        "from cifar_flax.telemetry.tensorboard import Events\n"
        "Events(Path('events')).close(); print('written'); import torch"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run,
        env=os.environ | {"PYTHONPATH": python_path(REPOSITORY, tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["written", "torch imported"]
