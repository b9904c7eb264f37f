"""Check that the package never executes bytes from files or from the network as code: see SECURITY.md."""

import ast

import pytest
from conftest import REPOSITORY

SOURCES = [REPOSITORY / "main.py", *sorted((REPOSITORY / "cifar_flax").rglob("*.py"))]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"read_array", "extract", "extractall", "unpack_archive", "loads_pickle", "system", "popen"}


def violations(tree):
    """Yield the unsafe operations in a file: those that may execute input or write to paths that the input chooses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            yield from (f"imports {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield f"calls {node.func.id}"
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield f"calls {node.func.attr}"
            for keyword in node.keywords:
                constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg == "allow_pickle" and constant is not False:
                    yield "allows pickle"
                if keyword.arg == "shell" and constant is not False:
                    yield "starts a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_contain_no_unsafe_operation(path):
    assert not list(violations(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.serialization",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=allowed)",
        "np.lib.format.read_array(file)",
        "tar.extractall(folder)",
        "tar.extract(member)",
        "shutil.unpack_archive(path)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_unsafe_operations_are_found(code):
    assert list(violations(ast.parse(code)))


def test_arrays_are_loaded_and_saved_without_pickle():
    """`allow_pickle=False` is explicit, so that it does not depend on NumPy's default."""
    text = "".join(path.read_text() for path in SOURCES)
    assert text.count("np.load(") + text.count("np.save(") == text.count("allow_pickle=False") > 0
