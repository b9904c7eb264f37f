"""Build the wheel and the source archive, check their contents, and run the commands of an installed package."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY
from processes import environment

import cifar_flax

pytestmark = pytest.mark.slow

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
NO_DOWNLOAD = ("--no-deps", "--no-build-isolation", "--no-index")
TINY = (
    "--config.train.epochs=1",
    "--config.optim.warmup_epochs=0.5",
    "--config.model.width=4",
    "--config.model.hidden=16",
)


def run(*command, cwd):
    """Run a command without the PYTHON* environment variables, so that Python does not find the repository."""
    variables = {name: value for name, value in environment().items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build_wheel(source, folder):
    run(*PIP, "wheel", *NO_DOWNLOAD, "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel):
    """Return the files in a wheel, except its RECORD, as a dictionary from names to bytes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def files_in(folder):
    names = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / folder).rglob("*") if path.is_file()}
    return {name for name in names if "__pycache__" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(REPOSITORY, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_contains_the_package_and_the_configs(wheel):
    assert wheel.name == f"cifar_flax-{cifar_flax.__version__}-py3-none-any.whl"
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert names == files_in("cifar_flax") | {f"cifar_flax/{name}" for name in files_in("configs")}
    assert "cifar_flax/report/page.css" in names


def test_the_source_archive_is_complete(wheel, tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path, cwd=REPOSITORY)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / path.name.removesuffix(".tar.gz")
    names = {file.relative_to(unpacked).as_posix() for file in unpacked.rglob("*") if file.is_file()}
    wanted = set.union(*map(files_in, ("cifar_flax", "configs", "tests", "benchmarks", "docs", ".ci")))
    wanted |= {path.name for path in REPOSITORY.glob("*.txt")} | {path.name for path in REPOSITORY.glob("*.md")}
    assert wanted | {"main.py", "pyproject.toml", "LICENSE", "Dockerfile"} <= names
    (tmp_path / "wheel").mkdir()
    assert contents(build_wheel(unpacked, tmp_path / "wheel")) == contents(wheel)


def test_the_docker_image_is_built_from_the_same_package(wheel, tmp_path):
    """The files that the Dockerfile copies and .dockerignore allows suffice to build the same wheel."""
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = re.findall(r"^COPY (.+) (\S+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    copied = {name: target for names, target in lines for name in names.split()}
    assert copied.keys() == allowed
    context = tmp_path / "context"
    for name, target in copied.items():
        if (REPOSITORY / name).is_dir():
            assert target == name  # COPY copies the contents of a folder
            shutil.copytree(REPOSITORY / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            assert target == "./"
            context.mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / name, context)
    (tmp_path / "wheel").mkdir()
    assert contents(build_wheel(context, tmp_path / "wheel")) == contents(wheel)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, wheel, tmp_path_factory):
    """Return the Python of a virtual environment with the package and the dependencies of this process."""
    folder = tmp_path_factory.mktemp(request.param) / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run(python, "-c", code, cwd=folder).stdout.strip())
    others = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (own / "others.pth").write_text("".join(f"{path}\n" for path in others))
    source = ("--editable", REPOSITORY) if request.param == "editable" else (wheel,)
    run(*PIP, "--python", python, "install", *NO_DOWNLOAD, *source, cwd=folder)
    return python


def test_the_commands_of_an_installed_package(installed, tmp_path):
    """Run the commands in a folder outside the repository."""
    command = installed.parent / "cifar-flax"
    run(command, "--config", "quickstart", *TINY, cwd=tmp_path)
    result = json.loads((tmp_path / "runs" / "quickstart" / "eval.json").read_text())
    assert result["num_examples"] == 355
    assert "<style>" in (tmp_path / "runs" / "quickstart" / "report.html").read_text()

    helps = [run(*start, "--help", cwd=tmp_path).stdout for start in ([command], [installed, "-m", "cifar_flax"])]
    assert all("--config" in text for text in helps)

    code = """
        import numpy as np, cifar_flax
        images = np.zeros((2, 32, 32, 3), np.uint8)
        print(cifar_flax.load("runs/quickstart").predict(images).shape, cifar_flax.__file__)
    """
    shape, file = run(installed, "-c", "\n".join(map(str.strip, code.splitlines())), cwd=tmp_path).stdout.rsplit(" ", 1)
    assert shape == "(2, 10)"
    editable = Path(file.strip()) == REPOSITORY / "cifar_flax" / "__init__.py"
    assert editable or Path(file.strip()).is_relative_to(installed.parent.parent)
