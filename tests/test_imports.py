"""The house keeps its order: imports go one way, and heavy libraries stay in their rooms."""

import ast
import os
import subprocess
import sys

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "cifar_flax"

# From the ground up; a module imports from lines above its own only.
LEVELS = [
    {"errors", "allocator", "environment", "imports", "files", "lifecycle", "exported", "models.pooling"},
    {"packages", "data.cache", "data.images", "data.order", "data.augment", "data.tensorflow"},
    {"models.winograd", "averaging"},
    {"compilation", "nvidia", "data.archive", "data.batches", "models.layers"},
    {"models.cnn", "models.airbench", "models.resnet", "parallel"},
    {"distributed"},
    {"data.sources", "data.streaming", "data.resident", "models"},
    {"optim", "metrics", "report", "report.page", "writers", "state", "records", "models.summary"},
    {"steps", "checkpoint", "loop", "report.matrix", "report.log", "report.settings", "report.charts"},
    {"profiling", "report.diagrams", "report.pictures", "report.results"},
    {"config"},
    {"experiment", "workdir"},
    {"trained", "report.run", "report.comparison"},
    {"evaluate", "classifier", "transfer"},
    {"cli", "train", "predict", "export"},
    {"doctor"},
]
ONLY_IN = {
    "orbax": {"checkpoint"},
    "tensorflow": {"data.tensorflow"},
    "tensorflow_datasets": {"data.sources"},
    "flax.nnx": {
        "models",
        "models.airbench",
        "models.cnn",
        "models.layers",
        "models.resnet",
        "models.summary",
        "state",
        "steps",
    },
    "tensorboardX": {"writers"},
    "ml_collections": {"cli"},
    "matplotlib": {"report.matrix"},
    "PIL": {"data.images"},
    "safetensors": {"export"},
    "sklearn": {"data.sources"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, path


def imported(path):
    """Full names of what a file imports: `from a import b` gives "a.b"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    level = {name: depth for depth, names in enumerate(LEVELS) for name in names}
    for name, path in modules():
        if name in ("data", "report"):
            assert not list(imported(path))
        if name in ("", "data", "report"):
            continue
        for target in imported(path):
            if target.startswith("cifar_flax."):
                inside = target.removeprefix("cifar_flax.")
                module = max((other for other in level if f"{inside}.".startswith(f"{other}.")), key=len)
                assert level[module] < level[name], f"{name} imports {module}"


def test_heavy_libraries_stay_in_their_rooms():
    for name, path in modules():
        for target in imported(path):
            for library, rooms in ONLY_IN.items():
                if f"{target}.".startswith(f"{library}."):
                    assert name in rooms, f"{name} imports {library}"


def test_the_package_alone_imports_nothing_heavy():
    code = "import sys, cifar_flax; print({'jax', 'numpy', 'orbax', 'flax'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_pytorch_is_left_alone_and_left_importable(tmp_path):
    """tensorboardX would import it: see writers.py."""
    (tmp_path / "torch.py").write_text("print('torch imported')")
    code = "import main; print('main imported'); import torch"
    path = f"{PACKAGE.parent}:{tmp_path}"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["main imported", "torch imported"]


def test_no_file_is_long():
    for name, path in modules():
        assert len(path.read_text().splitlines()) <= 300, name
