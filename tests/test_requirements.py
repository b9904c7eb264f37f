"""Check that the requirements in pyproject.toml, requirements*.txt, constraints.txt and packages.py agree."""

import re
import tomllib

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cifar_flax.packages import PACKAGES, PYTHONS

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
MACOS = {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"}
WINDOWS = {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"}
# Machine -> environment markers, and the name of the TensorFlow package that has wheels for this platform.
PLATFORMS = {
    "x86_64": (LINUX | {"platform_machine": "x86_64"}, "tensorflow-cpu"),
    "aarch64": (LINUX | {"platform_machine": "aarch64"}, "tensorflow"),
    "arm64": (MACOS | {"platform_machine": "arm64"}, "tensorflow"),
    "AMD64": (WINDOWS | {"platform_machine": "AMD64"}, "tensorflow-cpu"),
}


def read(name):
    """Return the requirements in a file, without those of the files that it includes."""
    lines = [re.split(r"(?:^|\s)#", line)[0].strip() for line in (REPOSITORY / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def parsed(lines):
    return {Requirement(line) for line in lines}


def applies(requirement, python, machine="x86_64"):
    environment = PLATFORMS[machine][0] | {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def oldest(requirement):
    """Return the version of a requirement that has the form `name>=version`."""
    (specifier,) = requirement.specifier
    assert specifier.operator == ">="
    return specifier.version


def test_pyproject_and_requirements_files_have_the_same_requirements():
    requirements = read("requirements.txt")
    assert len(set(requirements)) == len(requirements)
    (pytest_itself,) = (requirement for requirement in requirements if requirement.name == "pytest")
    assert parsed(PROJECT["dependencies"]) == set(requirements) - {pytest_itself}
    extras = PROJECT["optional-dependencies"]
    assert parsed(extras["dev"]) == {*read("requirements-dev.txt"), pytest_itself}
    assert (REPOSITORY / "requirements-dev.txt").read_text().startswith("-r requirements.txt\n")


def test_minimum_versions_equal_those_of_the_doctor():
    minimums = {}
    for requirement in read("requirements.txt"):
        name = "tensorflow" if requirement.name == "tensorflow-cpu" else requirement.name
        assert minimums.setdefault(name, oldest(requirement)) == oldest(requirement)
    table = {name: package.oldest for name, package in PACKAGES.items() if not package.extra}
    assert {name: version for name, version in minimums.items() if name in table} == table
    assert minimums.keys() - table == {"pytest", "importlib_resources"}  # required by tests and by tensorflow-datasets


def test_extras_require_the_packages_of_the_table():
    optional = {name: package for name, package in PACKAGES.items() if package.extra}
    assert {package.extra for package in optional.values()} == PROJECT["optional-dependencies"].keys() - {
        "dev",
        "gpu",
        "tpu",
    }
    for name, package in optional.items():
        (requirement,) = parsed(PROJECT["optional-dependencies"][package.extra])
        assert (requirement.name, oldest(requirement)) == (name, package.oldest)
        assert requirement in parsed(PROJECT["optional-dependencies"]["dev"])  # for its tests


@pytest.mark.parametrize("extra", ["gpu", "tpu"])
def test_extras_for_accelerators_require_the_same_jax(extra):
    (requirement,) = parsed(PROJECT["optional-dependencies"][extra])
    assert (requirement.name, oldest(requirement)) == ("jax", PACKAGES["jax"].oldest)
    assert len(requirement.extras) == 1


def test_supported_python_versions():
    (first, last), prefix = PYTHONS, "Programming Language :: Python :: "
    assert PROJECT["requires-python"] == ">={}.{}".format(*first)
    listed = [text.removeprefix(prefix) for text in PROJECT["classifiers"] if text.startswith(f"{prefix}3.")]
    assert listed == [f"3.{minor}" for minor in range(first[1], last[1] + 1)]


@pytest.mark.parametrize("machine", PLATFORMS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_each_platform_gets_the_tensorflow_that_has_wheels_for_it(python, machine):
    names = [requirement.name for requirement in read("requirements.txt") if applies(requirement, python, machine)]
    assert len(set(names)) == len(names)
    tensorflow = {name for name in names if name.startswith("tensorflow")}
    assert tensorflow == (set() if python == "3.14" else {PLATFORMS[machine][1], "tensorflow-datasets"})


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_pin_one_version_of_each_requirement(python):
    pins = {}
    for line in read("constraints.txt"):
        (specifier,) = line.specifier
        assert (specifier.operator, line.extras) == ("==", set())
        assert "*" not in specifier.version
        if applies(line, python):
            assert canonicalize_name(line.name) not in pins, f"constraints.txt has two versions of {line.name}"
            pins[canonicalize_name(line.name)] = specifier.version
    for requirement in (*read("requirements.txt"), *read("requirements-dev.txt")):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{pin} in constraints.txt does not satisfy {requirement}"


def test_development_requirements_include_the_build_backend():
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["build-system"]
    assert parsed(build["requires"]) <= set(read("requirements-dev.txt"))
