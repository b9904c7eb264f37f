"""Check the data, the start, the folder and the disk space of a run."""

import contextlib
import io
import math
import os
import shutil
import socket
import tempfile
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp

from cifar_flax.checkpoints.manager import CheckpointConfig, Checkpoints
from cifar_flax.checkpoints.metadata import CHECKPOINTS, saved_steps
from cifar_flax.data import archives, cache, hub, sources, tfds
from cifar_flax.data.config import alternatives, require_splits
from cifar_flax.data.datasets import DATASETS
from cifar_flax.diagnosis import folder as folders
from cifar_flax.diagnosis.devices import Examination
from cifar_flax.diagnosis.installation import FAIL, NOTE, OK, Finding
from cifar_flax.errors import UserError, one_line
from cifar_flax.training.state import TrainState
from cifar_flax.training.trainer import Trainer, require_startable
from cifar_flax.workdir import require_usable

_TIMEOUT = 3.0  # seconds that a host has to accept a connection
_SMALL_FILES = 20_000_000  # bytes that a run writes besides checkpoints


def data(examination: Examination) -> Iterator[Finding]:
    """Check that the training and evaluation data are available or can be downloaded."""
    data, splits = examination.config.data, (examination.config.data.train_split, examination.config.data.eval_split)
    if data.is_folder:
        yield from folders.contents(examination.config)
        examination.has_data = True
        return
    if data.name in DATASETS and not data.archive:
        counts = [f"{len(sources.load(data, split).labels)} {split} images" for split in splits]
        yield Finding(OK, f"{data.name}: {', '.join(counts)}")
        examination.has_data = True
        return
    intact, uses_tfds = [], sources.uses_tfds(data, *splits)
    for split in splits:
        folder, line = tfds.find_cached(data, split) if uses_tfds else (sources.find_cached(data, split), "")
        if line:
            yield Finding(NOTE, line)
        try:
            if folder is not None:
                cache.verify(folder)
                intact.append(split)
        except ValueError as error:
            yield Finding(NOTE, f"{split}: {folder} is damaged ({error}); a run will rebuild it")
    missing = [split for split in splits if split not in intact]
    if intact:
        yield Finding(OK, f"{data.name}: {' and '.join(intact)} decoded and intact in {sources.cache_dir(data)}")
    if missing:
        yield from (_preparation if uses_tfds else _files)(examination, missing)
    examination.has_data = not missing


def _files(examination: Examination, splits: list[str]) -> Iterator[Finding]:
    """Check files that a run decodes or downloads without TFDS."""
    data = examination.config.data
    require_splits(data, ("train", "test"))
    if data.archive:
        yield _contents(examination, sources.named_archive(data), splits)
        return
    for _, path in sources.on_disk(data):
        try:
            yield _contents(examination, archives.find(path), splits)
            return
        except UserError as error:
            yield Finding(NOTE, f"not used: {error}")
    folder = hub.folder()
    examination.needs += [("decoded images", sources.cache_dir(data), hub.DECODED), ("download", folder, hub.SIZE)]
    if hub.is_offline():
        raise UserError(
            f"{data.name} is not on this machine, and HF_HUB_OFFLINE is set. Alternatives: {alternatives(data)}"
        )
    yield _download(examination, f"{data.name} is not on this machine", [hub.address()], hub.SIZE)


def _contents(examination: Examination, archive: archives.Archive, splits: list[str]) -> Finding:
    """Return what a run decodes. Raise `UserError` if it is damaged."""
    data, counts, size = examination.config.data, [], 0
    for split in splits:
        read = archive.read(split, data.name, data.image_size)
        count = sum(len(labels) for _, labels in read.batches)
        counts.append(f"{count} {split} images")
        size += count * math.prod(read.image_shape)
    examination.needs.append(("decoded images", sources.cache_dir(data), size))
    official = f" ({line})" if (line := archive.official()) else ""
    return Finding(OK, f"{archive.path}: {', '.join(counts)}{official}; a run decodes {_size(size)}")


def _preparation(examination: Examination, splits: list[str]) -> Iterator[Finding]:
    data, names = examination.config.data, " and ".join(splits)
    folder, downloads, decoded = tfds.preparation(data, splits)
    size = sum(downloads.values())
    least = decoded or (0 if data.image_size else size)  # images in files are compressed
    examination.needs.append(("decoded images", sources.cache_dir(data), least))
    if decoded:
        yield Finding(OK, f"{names}: prepared by TFDS in {folder}; a run decodes {_size(decoded)}")
        return
    examination.needs.append(("TFDS download and preparation", folder, 2 * size))
    missing = f"{data.name} is neither in the cache nor prepared in {folder}"
    yield _download(examination, missing, list(downloads), size)


def _download(examination: Examination, missing: str, urls: list[str], size: int) -> Finding:
    """Return what a run downloads. With --online, raise `UserError` if a host of `urls` cannot be reached."""
    if examination.online and (failed := _unreachable(urls)):
        reasons = f"{missing}, and its download host cannot be reached: {', '.join(failed)}"
        raise UserError(f"{reasons}. Alternatives: {alternatives(examination.config.data)}")
    hosts = ", ".join(sorted({str(urlsplit(url).hostname) for url in urls})) or "an unknown host"
    tried = "it can be reached" if examination.online else "not tried, which needs --online"
    return Finding(NOTE, f"{missing}; a run downloads {_size(size)} from {hosts} ({tried})")


def _unreachable(urls: Iterable[str]) -> list[str]:
    """Return the hosts of `urls` (or their proxies) that cannot be reached, each with the reason."""
    addresses, failed = set(), []
    for url in urls:
        parts = urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
            parts = urlsplit(proxy)
        addresses.add((parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)))
    for host, port in sorted(addresses):
        try:
            socket.create_connection((host, port), timeout=_TIMEOUT).close()
        except OSError as error:
            failed.append(f"{host}:{port} ({error})")
    return failed


def start(examination: Examination) -> Iterator[Finding]:
    """Load the data and build the initial state as a run does, without writing files.

    For a folder of images, also compile the step and estimate the time of the run.
    """
    if examination.platform:
        require_startable(examination.config)
    if not (examination.platform and examination.has_data):
        missing = "the images are not decoded yet" if examination.platform else "no device found"
        yield Finding(NOTE, f"not tried: {missing}")
        return
    # The check of the data has printed what loading a folder prints.
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        try:
            trainer = Trainer(examination.config)
        except Exception as error:
            raise UserError(one_line(error)) from error
    if trainer.no_tensorflow:
        yield Finding(NOTE, trainer.no_tensorflow)
    examination.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.initial_state))
    yield Finding(OK, f"config, data and devices work together: {trainer.total_steps} steps on {trainer.layout}")
    if examination.config.data.is_folder:
        yield from folders.estimate(trainer)


def folder(examination: Examination) -> Iterator[Finding]:
    """Check that the run can use --workdir, and save and restore a checkpoint in it."""
    kept, steps = examination.config.checkpoint, saved_steps(examination.workdir / CHECKPOINTS)
    more = max(kept.keep + kept.keep_best - len(steps), 0) + 1  # an old one is deleted after a new one is saved
    examination.needs.append(("the run", examination.workdir, more * examination.state_bytes + _SMALL_FILES))
    require_usable(examination.workdir, examination.config)
    if examination.platform:
        _try_checkpoint(examination.workdir)
    yield Finding(OK, f"{examination.workdir}: {f'a run to resume from step {steps[-1]}' if steps else 'no run yet'}")


def _try_checkpoint(workdir: Path) -> None:
    """Save and restore a checkpoint as in `workdir`, and leave nothing behind. Raise an error if this fails."""
    state = TrainState(jnp.int32(1), jnp.uint32(0), {"kernel": jnp.ones(1)}, {}, (), ())
    place = _existing(workdir)
    with tempfile.TemporaryDirectory(prefix=".doctor.", dir=place) as folder:
        inside = Path(folder, workdir.absolute().relative_to(place))
        with Checkpoints(inside, CheckpointConfig()) as checkpoints:
            checkpoints.save(state, {})
            checkpoints.wait()
            checkpoints.restore(1, state)


def _existing(folder: Path) -> Path:
    """Return `folder`, or the first of its parents that exists."""
    place = folder.absolute()
    while not os.path.exists(place):  # not Path.exists, which raises if a folder is not readable
        place = place.parent
    return place


def disk(examination: Examination) -> Iterator[Finding]:
    """Check that each disk has room for what earlier checks found to be needed."""
    needed: Counter[int] = Counter()  # device -> bytes
    for what, folder, size in examination.needs:
        place = _existing(folder)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            yield Finding(FAIL, f"{place} is not writable ({what})")
            continue
        device = place.stat().st_dev
        needed[device] += size
        free = shutil.disk_usage(place).free
        total = "" if needed[device] == size else f" ({_size(needed[device])} with the above)"
        text = f"{what}: needs about {_size(size)}{total}; {_size(free)} free in {place}"
        yield Finding(OK if free >= needed[device] else FAIL, text)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
