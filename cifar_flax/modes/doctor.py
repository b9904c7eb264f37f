"""--mode=doctor: check whether a run can start on this machine, and report why a GPU is not used.

The installation checks import nothing that may be missing or broken; the other checks are imported after them.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cifar_flax
from cifar_flax.diagnosis import installation
from cifar_flax.diagnosis.installation import FAIL, NOTE, Finding
from cifar_flax.errors import UserError, one_line

if TYPE_CHECKING:
    from cifar_flax.config import Config

Check = Callable[[], Iterator[Finding]]

# Do not break paths, so that they can be copied.
_wrap = textwrap.TextWrapper(100, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False).fill


def doctor(config: "Config", workdir: Path, *, online: bool = False) -> None:
    """Check whether a run of `config` in `workdir` can start; print the findings. Raise `UserError` if it cannot.

    If `online`, also connect to the hosts that a run would download the data from.
    """
    from cifar_flax.diagnosis import devices, run

    examination = devices.Examination(config, workdir, online)
    data = Path(config.data.folder).name or config.data.name
    print(f"cifar_flax {cifar_flax.__version__}: can a run with {data} start here?")
    # In printing order; a check may use the results of earlier checks.
    checks: list[tuple[str, Check]] = [
        ("python", installation.python),
        ("packages", installation.required_packages),
        ("packages", installation.optional_packages),
        ("devices", partial(devices.devices, examination)),
        # Before anything is compiled, since JAX opens the cache folder and reports its errors only once.
        ("programs", partial(devices.programs, examination)),
        ("memory", partial(devices.memory, examination)),
        ("data", partial(run.data, examination)),
        ("start", partial(run.start, examination)),
        ("workdir", partial(run.folder, examination)),
        ("disk", partial(run.disk, examination)),
    ]
    reasons = _print(checks)
    if reasons:
        raise UserError(f"a run would fail: {'; '.join(reasons)}")
    print("a run can start")


def examine_installation(error: UserError) -> None:
    """Print the installation checks, if `error` prevents the other checks from being imported."""
    print(f"cifar_flax {cifar_flax.__version__}: can a run start here?")
    _print([("python", installation.python), ("packages", installation.required_packages)])
    _print([("packages", lambda: iter([Finding(FAIL, str(error))]))])


def _print(checks: Iterable[tuple[str, Check]]) -> list[str]:
    """Print the findings of `checks`; return the failures, such as "disk: 1 MB free"."""
    reasons = []
    for name, check in checks:
        for finding in _findings(check):
            print(_wrap(f"{finding.mark:4}  {name:9} {finding.text}"))
            if finding.mark == FAIL:
                reasons.append(f"{name}: {finding.text}")
    return reasons


def _findings(check: Check) -> Iterator[Finding]:
    try:
        yield from check()
    except (UserError, OSError) as error:  # both end a run with one line
        yield Finding(FAIL, str(error))
    except Exception as error:  # the doctor must not fail on the machine that it examines
        yield Finding(NOTE, f"the check itself failed: {one_line(error)}")
