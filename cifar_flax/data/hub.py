"""Download CIFAR-10 and CIFAR-100 from the Hugging Face hub, into the cache folder that its libraries share.

The library `huggingface_hub` knows the addresses, checksums and cache folder. Its version 2 discards what a download
has received if it breaks off, so that the bytes are read here, and a partial file is completed by a later start.
"""

import logging
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cifar_flax import files, packages
from cifar_flax.data.config import DataConfig, alternatives
from cifar_flax.errors import UserError, one_line
from cifar_flax.runtime import processes
from cifar_flax.runtime.progress import ProgressBar

SIZE = 144_000_000  # bytes of both splits, for either dataset
_REPOSITORIES = {"cifar10": ("uoft-cs/cifar10", "plain_text"), "cifar100": ("uoft-cs/cifar100", "cifar100")}
_SLOW = 300_000  # bytes per second
_WINDOW = 20.0  # seconds


def cached(name: str) -> list[Path]:
    """Return the folders of `data.name` in the hub's cache folder that have both splits, the newest first."""
    if packages.fault("huggingface-hub"):
        return []
    repository, folder = _REPOSITORIES[name]
    owned = [_storage(each) for each in (repository, name)]  # `name` alone is the repository's earlier name
    found = [path for storage in owned for path in storage.glob(f"snapshots/*/{folder}")]
    complete = [path for path in found if all(any(path.glob(f"{split}-*.parquet")) for split in ("train", "test"))]
    return sorted(complete, key=os.path.getmtime, reverse=True)


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
    name = config.name
    try:
        if is_offline():
            raise UserError("HF_HUB_OFFLINE is set")
        return _download(config)
    except Exception as error:  # the network, the disk and the libraries may raise anything
        response = getattr(error, "response", None)
        reason = f"{response.status_code} for {response.url}" if response is not None else one_line(error)
        host = urlsplit(address()).netloc
        raise UserError(
            f"{name} cannot be downloaded from {host} ({reason}). Another start resumes. "
            f"Alternatives: {alternatives(config)}"
        ) from error


def _download(config: DataConfig) -> Path:
    hub = packages.load("huggingface-hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # failures are reported by the exception
    repository, folder = _REPOSITORIES[config.name]
    files = [f"{folder}/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    about: list[dict[str, Any]] = [
        {"repo_id": repository, "repo_type": "dataset", "filename": file, "endpoint": address()} for file in files
    ]
    blobs = [_Blob(hub.hf_hub_url(**each), _storage(repository) / "blobs") for each in about]
    missing = [blob for blob in blobs if not blob.path.exists()]
    if missing:
        total, done = (sum(sizes) for sizes in zip(*((blob.size, blob.received()) for blob in missing), strict=True))
        kept = f", of which {done / 1e6:.0f} MB are there" if done else ""
        processes.log(
            f"{config.name}: downloading {total / 1e6:.0f} MB{kept} from {address()} to {_storage(repository)}"
        )
        meter = _Meter(config, total, done)
        try:
            for blob in missing:
                blob.download(meter)
        finally:
            meter.bar.close()
    # The library adds the names to the cache folder, and downloads nothing.
    return [Path(hub.hf_hub_download(**each, token=False)).parent for each in about][-1]


def _storage(repository: str) -> Path:
    return folder() / f"datasets--{repository.replace('/', '--')}"


class _Meter:
    """Show the progress of a download, and print once if it is slow."""

    def __init__(self, config: DataConfig, total: int, done: int):
        self.bar = ProgressBar(total, "B", done)
        self._config, self._since, self._count, self._printed = config, time.monotonic(), 0, False

    def __call__(self, count: int) -> None:
        """Add `count` bytes."""
        self.bar.advance(count)
        self._count += count
        seconds = time.monotonic() - self._since
        if seconds >= _WINDOW:
            if self._count < _SLOW * seconds and not self._printed:
                self._printed = True
                rate = f"{self._config.name}: {self._count / seconds / 1000:.0f} kB/s"
                self.bar.write(f"{rate}; what may be faster: {alternatives(self._config)}")
            self._since, self._count = time.monotonic(), 0


class _Blob:
    """The content of a file of the hub, named by its SHA-256 in the hub's cache folder."""

    def __init__(self, url: str, folder: Path):
        about = packages.load("huggingface-hub").get_hf_file_metadata(url, token=False)
        if not re.fullmatch("[0-9a-f]{64}", about.etag or "") or not about.size:
            raise UserError(f"{url} has no checksum, as a mirror of the hub must have")
        self._url, self.size, self.path = url, about.size, folder / about.etag
        self._partial = folder / f"{about.etag}{files.PARTIAL}"

    def received(self) -> int:
        """Return the number of bytes that were received."""
        return self._partial.stat().st_size if self._partial.exists() else 0

    def download(self, meter: _Meter) -> None:
        """Download what is missing. Resume as often as the connection breaks off after more bytes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        locks = folder() / ".locks" / self.path.parent.parent.name  # as the library does
        locks.mkdir(parents=True, exist_ok=True)
        with files.locked(locks / f"{self.path.name}.lock", wait=True):
            while not self.path.exists() and (before := self.received()) < self.size:
                try:
                    self._receive(before, meter)
                except OSError:  # of the disk; those of the network are no OSError
                    raise
                except Exception:
                    if self.received() == before:
                        raise
            if self.path.exists():  # another process was faster
                return
            try:
                files.require_checksums(self.path.parent, {self._partial.name: self.path.name})
            except ValueError:
                self._partial.unlink()
                raise UserError(f"{self._url} does not match its SHA-256 and was removed") from None
            os.replace(self._partial, self.path)

    def _receive(self, start: int, meter: _Meter) -> None:
        """Append the bytes from `start` on to the partial file."""
        hub = packages.load("huggingface-hub")
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        timeout = packages.load("huggingface-hub", "huggingface_hub.constants").HF_HUB_DOWNLOAD_TIMEOUT
        with hub.get_session().stream("GET", self._url, headers=headers, timeout=timeout) as response:
            response.raise_for_status()
            resumes = response.status_code == 206  # otherwise the server sends all of it
            with self._partial.open("ab" if resumes else "wb") as file:
                meter(0 if resumes else -start)
                for chunk in response.iter_raw():
                    file.write(chunk)
                    meter(len(chunk))
