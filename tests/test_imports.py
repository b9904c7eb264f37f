"""The layers of the package: imports go one way, between packages and between files."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter

from conftest import REPOSITORY

from cifar_flax.packages import OPTIONAL, PACKAGES

ROOT = REPOSITORY / "cifar_flax"

# Everything may import these; they import each other at most.
GROUND = {"errors", "files", "packages", "__init__"}
# Package, or file at the root -> the packages and root files that it may import beside the ground.
RULES = {
    "runtime": set(),
    "models": set(),
    "data": {"runtime"},
    "checkpoints": {"runtime"},
    "telemetry": {"runtime"},
    # config.py composes the dataclasses that the parts define for themselves, and the training loop takes the whole.
    "training": {"runtime", "models", "data", "checkpoints", "telemetry", "config"},
    "report": {"data", "training"},
    "export": {"runtime", "training", "config", "restore"},
    "diagnosis": {"runtime", "data", "checkpoints", "training", "config", "workdir"},
}
# These have the whole package at their disposal but for the command line, which nothing imports.
FREE = {"config", "workdir", "restore", "classifier", "modes"}
COMMAND_LINE = {"arguments", "cli", "__main__"}
# Library -> the packages or root files that may import it.
HOMES = {"orbax": {"checkpoints"}, "flax.nnx": {"models", "training"}, "ml_collections": {"arguments"}}


def files():
    """Yield the dotted name and the syntax tree of each file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), ast.parse(path.read_text())


FILES = dict(files())


def imports(node):
    """Yield the full names of imports in and below `node`: `from a import b` gives "a.b"."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def project_imports(tree):
    """Yield the files of this package that are imported."""
    for target in imports(tree):
        inside = target.removeprefix("cifar_flax").lstrip(".")
        if target.split(".")[0] == "cifar_flax":
            found = [name for name in FILES if f"{inside}.".startswith(f"{name}.")]
            yield max(found, key=len, default="__init__")


def unit(name):
    """Return the package, or the file at the root, that the file `name` belongs to."""
    return name.split(".")[0]


def test_packages_import_what_lies_below_them():
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert packages <= RULES.keys() | FREE, "a new package needs a rule"
    for name, tree in FILES.items():
        ours = unit(name)
        theirs = {unit(target) for target in project_imports(tree)} - {ours}
        if ours in COMMAND_LINE:
            continue
        assert not theirs & COMMAND_LINE, name
        if ours in FREE:
            assert ours == "modes" or "modes" not in theirs, name
        elif ours in GROUND:
            # cifar_flax.load imports the rest, when it is called.
            assert name == "__init__" or theirs <= GROUND, name
        else:
            assert theirs <= GROUND | RULES[ours], f"{name} imports {theirs - GROUND - RULES[ours]}"


def test_no_two_files_import_each_other():
    graph = {
        name: {target for target in project_imports(tree) if target not in (name, "__init__")}
        for name, tree in FILES.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_libraries_stay_at_home():
    for name, tree in FILES.items():
        for target in imports(tree):
            for library, homes in HOMES.items():
                assert not f"{target}.".startswith(f"{library}.") or unit(name) in homes, f"{name} imports {library}"


def test_optional_packages_are_never_imported_with_a_file():
    """They may be missing or broken: `packages.load` says so."""
    optional = {PACKAGES[name].module.split(".")[0] for name in OPTIONAL}
    for name, tree in FILES.items():
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.Try, ast.With)):
                assert not {target.split(".")[0] for target in imports(node)} & optional, name


def test_the_root_holds_what_people_look_for_first():
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_the_package_alone_imports_nothing_heavy():
    code = "import sys, cifar_flax, cifar_flax.cli; print({'jax', 'numpy', 'orbax', 'flax'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_pytorch_is_left_alone_and_left_importable(tmp_path):
    """tensorboardX would import it: see telemetry/tensorboard.py."""
    (tmp_path / "torch.py").write_text("print('torch imported')")
    code = (
        "from pathlib import Path\n"
        "from cifar_flax.telemetry.tensorboard import Events\n"
        "Events(Path('events')).close(); print('written'); import torch"
    )
    path = f"{ROOT.parent}:{tmp_path}"
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["written", "torch imported"]
