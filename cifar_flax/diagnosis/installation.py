"""Check Python and the installed packages. Imports only the standard library."""

import contextlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from cifar_flax import packages
from cifar_flax.errors import UserError

OK, NOTE, FAIL = "ok", "note", "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    mark: str  # OK | NOTE | FAIL
    text: str


def python() -> Iterator[Finding]:
    """Check the Python version."""
    oldest, newest = packages.PYTHONS
    mark = FAIL if sys.version_info[:2] < oldest else NOTE if sys.version_info[:2] > newest else OK
    supported = "" if mark == OK else f"; {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]} are supported"
    yield Finding(mark, f"{platform.python_version()}{supported}")


def required_packages() -> Iterator[Finding]:
    """Report the versions of the packages that every run requires; the command line has checked them."""
    versions = {name: packages.version(name) for name in (*packages.REQUIRED, "jaxlib")}
    yield Finding(OK, " ".join(f"{name}=={version}" for name, version in versions.items() if version))


def optional_packages() -> Iterator[Finding]:
    """Check the optional packages. The checks of the data and of the start fail if the run needs a missing one."""
    for name in packages.OPTIONAL:
        if not name.startswith("tensorflow"):  # its import takes seconds; later checks import it if the run does
            with contextlib.suppress(UserError):
                packages.load(name)
        if packages.PACKAGES[name].extra and not packages.installed(name):
            continue
        if reason := packages.fault(name):
            yield Finding(NOTE, f"{reason}, for {packages.PACKAGES[name].used_for}")
