"""What would keep a run from starting here: versions, devices, data, disk. Looks, and changes nothing."""

import contextlib
import logging
import logging.handlers
import os
import platform
import shutil
import socket
import sys
import textwrap
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import jax

import cifar_flax
from cifar_flax import allocator, compilation, nvidia, packages
from cifar_flax.config import Config
from cifar_flax.data import cache, sources
from cifar_flax.environment import machine
from cifar_flax.errors import UserError, one_line
from cifar_flax.imports import installed
from cifar_flax.parallel import all_devices
from cifar_flax.records import saved_steps
from cifar_flax.train import Trainer
from cifar_flax.workdir import CHECKPOINTS, require_usable

OK, NOTE, FAIL = "ok", "note", "FAIL"

# Paths stay whole, to be copied.
_wrap = textwrap.TextWrapper(100, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False).fill

_PYTHONS = ((3, 11), (3, 13))
# Module -> what there is not without it.
_OPTIONAL = {
    "matplotlib": "pictures",
    "tensorboardX": "events for TensorBoard",
    "tqdm": "progress bar",
    "PIL": "--mode=predict (Pillow)",
    "safetensors": "--mode=export",
}

_PATIENCE = 3.0  # seconds, for a host to answer
_PORTS = {"https": 443, "http": 80, "ftp": 21}

_STATE = 50_000_000  # bytes, where it is not known: the reference network with AdamW has 44 million
_SMALL_FILES = 20_000_000  # bytes, of all that a run writes besides checkpoints


@dataclass(frozen=True, slots=True)
class Finding:
    mark: str  # OK | NOTE | FAIL
    text: str


@dataclass(slots=True)
class _Visit:
    """What is asked for, and what the checks find that later ones need."""

    config: Config
    workdir: Path
    platform: str = ""  # that JAX computes on
    has_data: bool = False  # nothing must be downloaded or decoded
    state_bytes: int = _STATE
    needs: list[tuple[str, Path, int]] = field(default_factory=list)  # what is written, where, at least so many bytes


def doctor(config: Config, workdir: Path) -> None:
    """Prints what a run of `config` in `workdir` would meet; raises `UserError` with the reasons if it would fail."""
    print(f"cifar_flax {cifar_flax.__version__}: can a run with {config.data.name} start here?")
    visit, reasons = _Visit(config, workdir), []
    for name, check in _CHECKS.items():
        for finding in _findings(check, visit):
            print(_wrap(f"{finding.mark:4}  {name:9} {finding.text}"))
            if finding.mark == FAIL:
                reasons.append(f"{name}: {finding.text}")
    if reasons:
        raise UserError(f"a run would fail: {'; '.join(reasons)}")
    print("a run can start")


def _findings(check: Callable[[_Visit], Iterator[Finding]], visit: _Visit) -> Iterator[Finding]:
    try:
        yield from check(visit)
    except UserError as error:
        yield Finding(FAIL, str(error))
    except Exception as error:  # whatever is odd here is why the doctor has been called
        yield Finding(NOTE, f"cannot be told: {one_line(error)}")


def _python(visit: _Visit) -> Iterator[Finding]:
    oldest, newest = _PYTHONS
    mark = FAIL if sys.version_info[:2] < oldest else NOTE if sys.version_info[:2] > newest else OK
    supported = "" if mark == OK else f"; {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]} are supported"
    yield Finding(mark, f"{platform.python_version()}{supported}")


def _packages(visit: _Visit) -> Iterator[Finding]:
    data = visit.config.data
    needed = [*packages.NEEDED]
    needed += ["tensorflow"] if data.pipeline == "streaming" else []
    needed += ["scikit-learn"] if data.name == "digits" else []
    versions = {name: packages.version(name) for name in [*needed, "jaxlib"]}
    yield Finding(OK, " ".join(f"{name}=={version}" for name, version in versions.items() if version))
    packages.require(needed)
    without = [what for module, what in _OPTIONAL.items() if not installed(module)]
    if without:
        yield Finding(NOTE, f"not installed, and left out: {', '.join(without)}")


def _devices(visit: _Visit) -> Iterator[Finding]:
    with _told_by_jax() as records:
        try:
            devices = all_devices()
        except UserError as error:
            yield Finding(FAIL, str(error))
            devices = []
    if devices:
        visit.platform = devices[0].platform
        kinds = Counter(device.device_kind for device in devices)
        names = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        yield Finding(OK, f"{names}; {machine()}")
    told = " ".join("; ".join(record.getMessage() for record in records).split())
    if visit.platform in ("", "cpu"):
        if reason := nvidia.why_unused(told):
            yield Finding(NOTE, f"NVIDIA GPU: {reason}")
        elif devices and installed("libtpu") and not os.environ.get("JAX_PLATFORMS"):
            try:
                jax.devices("tpu")
            except RuntimeError as error:
                yield Finding(NOTE, f"TPU: libtpu is installed, but JAX finds none ({one_line(error)})")
        elif told:  # such as that there is a TPU, but no libtpu
            yield Finding(NOTE, told)


@contextlib.contextmanager
def _told_by_jax() -> Iterator[list[logging.LogRecord]]:
    """What JAX and its plugins warn of while they look for devices, instead of on the screen."""
    handler, loggers = logging.handlers.BufferingHandler(1000), [logging.getLogger(n) for n in ("jax", "jax_plugins")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _programs(visit: _Visit) -> Iterator[Finding]:
    if not visit.platform:
        return
    if reason := compilation.why_not_kept():
        yield Finding(NOTE, f"compiled at each start: {reason}")
    else:
        yield Finding(OK, f"compiled once, and kept in {compilation.programs_folder()}")


def _memory(visit: _Visit) -> Iterator[Finding]:
    if visit.platform != "cpu":
        return
    found = os.environ.get("GLIBC_TUNABLES")
    if found == allocator.SETTINGS["GLIBC_TUNABLES"]:
        yield Finding(OK, "what a step frees is kept for the next")
    else:
        why = "an accelerator's plugin is installed, or this is not glibc" if found is None else "GLIBC_TUNABLES is set"
        yield Finding(NOTE, f"what a step frees goes back to the system, a third of its time: {why}")


def _data(visit: _Visit) -> Iterator[Finding]:
    data, splits = visit.config.data, ("train", visit.config.data.eval_split)
    if data.archive or data.name in sources.BUILT_IN:
        counts = [f"{len(sources.load(data, split).labels)} images to {split}" for split in splits]
        yield Finding(OK, f"{data.archive or data.name}: {', '.join(counts)}")
        visit.has_data = True
        return
    missing, intact = [], []
    for split in splits:
        folder = sources.cache_folder(data, split)
        if folder is None or not folder.exists():
            missing.append(split)
            continue
        try:
            cache.verify(folder)
            intact.append(split)
        except ValueError as error:
            missing.append(split)
            yield Finding(NOTE, f"{split}: {folder} is damaged ({error}); a run decodes it anew")
    if intact:
        yield Finding(OK, f"{data.name}: {' and '.join(intact)} decoded and intact in {sources.cache_dir(data)}")
    if missing:
        yield from _preparation(visit, missing)
    visit.has_data = not missing


def _preparation(visit: _Visit, splits: list[str]) -> Iterator[Finding]:
    data, names = visit.config.data, " and ".join(splits)
    sources.require_tfds(data, splits[0])
    packages.require(["tensorflow", "tensorflow-datasets"])
    work = sources.preparation(data, splits)
    size = sum(work.downloads.values())
    decoded = work.decoded or (0 if data.image_size else size)  # files hold images compressed
    visit.needs.append(("decoded images", sources.cache_dir(data), decoded))
    if work.is_prepared:
        yield Finding(OK, f"{names}: a run decodes {_size(work.decoded)} that TFDS has prepared in {work.folder}")
        return
    visit.needs.append(("what TFDS downloads and prepares", work.folder, 2 * size))
    failed = _unreachable(work.downloads)
    if failed:
        raise UserError(
            f"{data.name} is neither in the cache nor prepared in {work.folder}, and to download it "
            f"{', '.join(failed)} cannot be reached. Ways out: {sources.ways_out(data)}"
        )
    hosts = ", ".join(sorted({str(urlsplit(url).hostname) for url in work.downloads})) or "where it knows"
    yield Finding(NOTE, f"{names}: TFDS downloads {_size(size)} from {hosts}")


def _unreachable(urls: Iterable[str]) -> list[str]:
    """Those of the hosts, or of the proxies before them, that do not answer, and why."""
    addresses, failed = set(), []
    for url in urls:
        parts = urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
            parts = urlsplit(proxy)
        addresses.add((parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 80)))
    for host, port in sorted(addresses):
        try:
            socket.create_connection((host, port), timeout=_PATIENCE).close()
        except OSError as error:
            failed.append(f"{host}:{port} ({error})")
    return failed


def _start(visit: _Visit) -> Iterator[Finding]:
    """All that a run does before its first step, on the devices, but for the writing."""
    if not (visit.platform and visit.has_data):
        missing = "the images have still to be decoded" if visit.platform else "there is no device"
        yield Finding(NOTE, f"not tried: {missing}")
        return
    with compilation.nothing_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer = Trainer(visit.config)
        except UserError:
            raise
        except Exception as error:
            raise UserError(one_line(error)) from error
    visit.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.initial_state))
    yield Finding(OK, f"config, data and devices fit: {trainer.total_steps} steps on {trainer.layout}")


def _folder(visit: _Visit) -> Iterator[Finding]:
    kept, steps = visit.config.checkpoint, saved_steps(visit.workdir / CHECKPOINTS)
    more = max(kept.keep + kept.keep_best - len(steps), 0) + 1  # an old one goes when a new one is there
    visit.needs.append(("the run", visit.workdir, more * visit.state_bytes + _SMALL_FILES))
    require_usable(visit.workdir, visit.config)
    yield Finding(OK, f"{visit.workdir}: {f'a run, to go on after step {steps[-1]}' if steps else 'no run yet'}")


def _disk(visit: _Visit) -> Iterator[Finding]:
    needed: Counter[int] = Counter()  # device -> bytes
    for what, folder, size in visit.needs:
        place = folder.expanduser().absolute()
        while not os.path.exists(place):  # not Path's: it raises where a folder may not be read
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            yield Finding(FAIL, f"{place} cannot be written to, for {what}")
            continue
        device = place.stat().st_dev
        needed[device] += size
        free = shutil.disk_usage(place).free
        also = "" if needed[device] == size else f", with the above {_size(needed[device])}"
        yield Finding(
            OK if free >= needed[device] else FAIL,
            f"{what}: about {_size(size)}{also}, of {_size(free)} free in {place}",
        )


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# In the order in which they are shown: a check may need what those before it have found.
_CHECKS = {
    "python": _python,
    "packages": _packages,
    "devices": _devices,
    "programs": _programs,  # before others compile: JAX opens the folder once, and tells once what is wrong with it
    "memory": _memory,
    "data": _data,
    "start": _start,
    "workdir": _folder,
    "disk": _disk,
}
