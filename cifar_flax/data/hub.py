"""Download CIFAR-10 and CIFAR-100 from the Hugging Face hub, into the cache folder that its libraries share.

The library `huggingface_hub` knows the addresses, checksums and cache folder. Its version 2 discards what a download
has received if it breaks off, so that the bytes are read here, and a partial file is completed by a later start.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from cifar_flax import files, packages
from cifar_flax.data.config import DataConfig, alternatives
from cifar_flax.errors import UserError, one_line
from cifar_flax.runtime import processes
from cifar_flax.runtime.progress import ProgressBar

SIZE, DECODED = 144_000_000, 60_000 * 32 * 32 * 3  # bytes of both splits: the files, and the decoded images
_REPOSITORIES = {"cifar10": ("uoft-cs/cifar10", "plain_text"), "cifar100": ("uoft-cs/cifar100", "cifar100")}
_SLOW = 300_000  # bytes per second
_WINDOW = 20.0  # seconds


def cached(name: str) -> list[Path]:
    """Return the folders of `data.name` in the hub's cache folder, the newest first."""
    if packages.fault("huggingface-hub"):
        return []
    repository, folder = _REPOSITORIES[name]
    storages = _storage(repository), _storage(name)  # the name alone is the repository's earlier one
    found = [path for storage in storages for path in storage.glob(f"snapshots/*/{folder}")]
    return sorted(found, key=os.path.getmtime, reverse=True)


def verify(paths: Iterable[Path]) -> None:
    """Raise `UserError` if a file of the hub's cache folder does not match the SHA-256 that is its name there."""
    for path in map(Path, map(os.path.realpath, paths)):
        if re.fullmatch("[0-9a-f]{64}", path.name) and not _is_intact(path):
            raise UserError(f"{path} does not match its SHA-256")


def _is_intact(path: Path, name: str = "") -> bool:
    """Return whether the SHA-256 of the file is `name`, by default its own name."""
    with contextlib.suppress(ValueError):
        files.require_checksums(path.parent, {path.name: name or path.name})
        return True
    return False


def address() -> str:
    """Return the address of the hub or its mirror."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE forbids downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def folder() -> Path:
    """Return the hub's cache folder."""
    return Path(packages.load("huggingface-hub", "huggingface_hub.constants").HF_HUB_CACHE)


def download(config: DataConfig) -> Path:
    """Download what is missing of `data.name`, and return its folder. Raise `UserError` if this fails.

    The bytes that were received are kept, unless they do not match the checksum.
    """
    try:
        if is_offline():
            raise UserError("HF_HUB_OFFLINE is set")
        if not address().startswith(("https://", "http://")):
            raise UserError("HF_ENDPOINT must begin with https://")
        return _download(config)
    except Exception as error:  # the network, the disk and the libraries may raise anything
        if _is_of_the_disk(error):
            reason = f"cannot write the cache folder of the hub ({one_line(error)})"
            raise UserError(f"{config.name}: {reason}; HF_HUB_CACHE=DIR names another") from error
        response = getattr(error, "response", None)
        reason = f"{response.status_code} for {response.url}" if response is not None else one_line(error)
        failed = f"{config.name} is not on this machine, and cannot be downloaded from {address()} ({reason})"
        has_hub = not packages.fault("huggingface-hub")
        kept = has_hub and any(_storage(_REPOSITORIES[config.name][0]).glob(f"blobs/*{files.PARTIAL}"))
        resumes = " A later start resumes." if kept else ""
        raise UserError(f"{failed}.{resumes} Alternatives: {alternatives(config)}") from error


def _download(config: DataConfig) -> Path:
    hub = packages.load("huggingface-hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # failures are reported by the exception
    (repository, name), wanted = _REPOSITORIES[config.name], {}
    storage = _storage(repository)
    for split in ("train", "test"):
        file = f"{name}/{split}-00000-of-00001.parquet"
        where = {"repo_id": repository, "repo_type": "dataset", "filename": file, "endpoint": address()}
        about = hub.get_hf_file_metadata(url := hub.hf_hub_url(**where), token=False)
        if not re.fullmatch("[0-9a-f]{64}", about.etag or "") or not about.size:
            raise UserError(f"{url} has no SHA-256, which the hub and its mirrors send")
        wanted[url] = storage / "blobs" / about.etag, about.size, where
    sizes = [(size, _received(path)) for path, size, _ in wanted.values()]
    total, received = map(sum, zip(*sizes, strict=True))
    left = f"{(total - received) / 1e6:.1f} MB of {total / 1e6:.1f} MB"
    processes.log(f"{config.name}: downloading {left} from {address()} to {storage}")
    (locks := folder() / ".locks" / storage.name).mkdir(parents=True, exist_ok=True)  # those of the library
    with contextlib.closing(_Meter(config, total, received)) as meter:
        for url, (path, size, _) in wanted.items():
            with files.locked(locks / f"{path.name}.lock", wait=True):
                _complete(url, path, size, meter)
    # The library names the files, and downloads nothing.
    return [Path(hub.hf_hub_download(**where, token=False)).parent for _, _, where in wanted.values()][-1]


def _is_of_the_disk(error: Exception) -> bool:
    """Return whether a file could not be read or written. An error that a server reports has no errno."""
    return isinstance(error, OSError) and bool(error.errno) and not isinstance(error, ConnectionError | TimeoutError)


def _storage(repository: str) -> Path:
    return folder() / f"datasets--{repository.replace('/', '--')}"


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}{files.PARTIAL}")


def _received(path: Path) -> int:
    """Return the number of bytes of `path` that are there."""
    return sum(each.stat().st_size for each in (path, _partial(path)) if each.exists())


def _complete(url: str, path: Path, size: int, meter: "_Meter") -> None:
    """Download what is missing of `path`, whose name is its SHA-256. Resume as long as more bytes are received."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    if path.exists():
        if _is_intact(path):
            return
        path.unlink()
    while (before := _received(path)) < size:
        failure: Exception = UserError("it sends no more bytes")
        try:
            _receive(url, partial, before, size, meter)
        except Exception as error:
            if _is_of_the_disk(error):
                raise
            failure = error
        if _received(path) <= before:
            raise failure
    if not _is_intact(partial, path.name):
        partial.unlink()
        raise UserError(f"{url} does not match its SHA-256 and was removed")
    os.replace(partial, path)


def _receive(url: str, partial: Path, start: int, size: int, meter: "_Meter") -> None:
    """Append the bytes from `start` on to `partial`, and stop after `size` bytes."""
    hub = packages.load("huggingface-hub")
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    timeout = hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    with hub.get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        response.raise_for_status()
        with partial.open("ab") as file:
            if response.status_code != 206:  # the server sends all of it
                file.truncate(0)
            for chunk in response.iter_raw():
                file.write(chunk)
                meter.advance(len(chunk))
                if file.tell() > size:  # the checksum will not match
                    return


class _Meter(ProgressBar):
    """Show the progress of a download, by a bar or lines, and print once if it is slow."""

    def __init__(self, config: DataConfig, total: int, start: int):
        super().__init__(total, "B", start)
        self._config, self._left, self._since, self._count = config, total - start, time.monotonic(), 0
        self._may_be_slow = True

    def advance(self, count: int) -> None:
        super().advance(count)
        self._count += count
        seconds = time.monotonic() - self._since
        if seconds < _WINDOW:
            return
        self._left -= self._count
        rate = self._count / seconds
        line = f"{rate / 1000:.0f} kB/s, {self._left / 1e6:.0f} MB and {self._left / rate / 60:.0f} min left"
        if rate < _SLOW and self._may_be_slow:
            self._may_be_slow = False
            self.write(f"{line}. A later start resumes. What may be faster: {alternatives(self._config)}")
        elif self.tqdm is None:
            self.write(line)
        self._since, self._count = time.monotonic(), 0
