"""Checks of a run: its data, its first step, its folder and the disk."""

import os
import shutil
import socket
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

import jax

from cifar_flax.checkpoints.metadata import CHECKPOINTS, saved_steps
from cifar_flax.data import cache, sources
from cifar_flax.diagnosis.installation import FAIL, NOTE, OK, Finding
from cifar_flax.diagnosis.visit import Visit
from cifar_flax.errors import UserError, one_line
from cifar_flax.runtime import compilation
from cifar_flax.training.trainer import Trainer
from cifar_flax.workdir import require_usable

_PATIENCE = 3.0  # seconds, for a host to answer
_SMALL_FILES = 20_000_000  # bytes, of all that a run writes besides checkpoints


def data(visit: Visit) -> Iterator[Finding]:
    data, splits = visit.config.data, ("train", visit.config.data.eval_split)
    if data.archive or data.name in sources.BUILT_IN:
        counts = [f"{len(sources.load(data, split).labels)} images to {split}" for split in splits]
        yield Finding(OK, f"{data.archive or data.name}: {', '.join(counts)}")
        visit.has_data = True
        return
    intact = []
    for split in splits:
        folder = sources.cache_folder(data, split)
        try:
            if folder is not None and folder.exists():
                cache.verify(folder)
                intact.append(split)
        except ValueError as error:
            yield Finding(NOTE, f"{split}: {folder} is damaged ({error}); a run will rebuild it")
    missing = [split for split in splits if split not in intact]
    if intact:
        yield Finding(OK, f"{data.name}: {' and '.join(intact)} decoded and intact in {sources.cache_dir(data)}")
    if missing:
        yield from _preparation(visit, missing)
    visit.has_data = not missing


def _preparation(visit: Visit, splits: list[str]) -> Iterator[Finding]:
    data, names = visit.config.data, " and ".join(splits)
    sources.require_tfds(data, splits[0])
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
    """Return the hosts of `urls`, or their proxies, that cannot be reached, each with the reason."""
    addresses, failed = set(), []
    for url in urls:
        parts = urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
            parts = urlsplit(proxy)
        addresses.add((parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)))
    for host, port in sorted(addresses):
        try:
            socket.create_connection((host, port), timeout=_PATIENCE).close()
        except OSError as error:
            failed.append(f"{host}:{port} ({error})")
    return failed


def start(visit: Visit) -> Iterator[Finding]:
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


def folder(visit: Visit) -> Iterator[Finding]:
    kept, steps = visit.config.checkpoint, saved_steps(visit.workdir / CHECKPOINTS)
    more = max(kept.keep + kept.keep_best - len(steps), 0) + 1  # an old one goes when a new one is there
    visit.needs.append(("the run", visit.workdir, more * visit.state_bytes + _SMALL_FILES))
    require_usable(visit.workdir, visit.config)
    yield Finding(OK, f"{visit.workdir}: {f'a run, to go on after step {steps[-1]}' if steps else 'no run yet'}")


def disk(visit: Visit) -> Iterator[Finding]:
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
        text = f"{what}: about {_size(size)}{also}, of {_size(free)} free in {place}"
        yield Finding(OK if free >= needed[device] else FAIL, text)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
