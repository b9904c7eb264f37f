"""Whether the packages that are installed will do."""

import importlib.metadata
import re
from collections.abc import Iterable

from cifar_flax.environment import installed_version
from cifar_flax.errors import UserError

# The oldest version of each, as in requirements.txt: of what every run needs, and of what some do.
NEEDED = {
    "jax": "0.10",
    "flax": "0.12.6",
    "optax": "0.2.6",
    "orbax-checkpoint": "0.12",
    "numpy": "2.0",
    "ml-collections": "1.1",
    "absl-py": "2.1",
    "jaxtyping": "0.3.2",
}
NEEDED_BY_SOME = {"tensorflow": "2.20", "tensorflow-datasets": "4.9.9", "scikit-learn": "1.6"}


def version(package: str) -> str | None:
    """The one installed; None where there is none."""
    if package == "tensorflow":  # comes under several names
        package = next(iter(importlib.metadata.packages_distributions().get(package, ())), package)
    return installed_version(package)


def require(packages: Iterable[str]) -> None:
    """Raises `UserError` that names those which are missing or too old."""
    oldest, wanting = NEEDED | NEEDED_BY_SOME, []
    for package in packages:
        found = version(package)
        if found is None:
            wanting.append(f"{package} is missing")
        elif numbers(found) < numbers(oldest[package]):
            wanting.append(f"{package} {found} is older than {oldest[package]}")
    if wanting:
        raise UserError(f"{', '.join(wanting)} (pip install -U -r requirements.txt)")


def numbers(version: str) -> list[int]:
    """Those that a version consists of, to be compared."""
    return [int(number) for number in re.findall(r"\d+", version)]
