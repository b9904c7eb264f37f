"""Atomic writes of files and folders, checksums, file locks, and the user's cache folder."""

import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SEAL = "seal"
PARTIAL = ".partial"  # what the names of files end with that are being written


def replace(path: Path, content: bytes) -> None:
    """Replaces `path` at once, so that no reader and no crash sees half of it; raises `OSError` that names it."""
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}{PARTIAL}"
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.replace(partial, path)
    sync_folder(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which is renamed to `folder` at the end of the block; removed if the block raises.

    Raises `OSError` that names `folder` if it exists already. Readers never see a part of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are closed to others
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, folder: Path) -> None:
    """Rename the complete folder `partial` to `folder`, durably."""
    partial.rename(folder)
    sync_folder(folder.parent)


def write_json(path: Path, value: Any) -> None:
    replace(path, json.dumps(value, indent=1).encode())


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """As `write_json`, with a checksum of `content` inside."""
    write_json(path, content | {_SEAL: json_checksum(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` was given; raises `OSError` or `ValueError` where it cannot be read or is something else."""
    content = read_json(path)
    if not isinstance(content, dict) or content.pop(_SEAL, None) != json_checksum(content):
        raise ValueError(f"{path.name} does not match its checksum")
    return content


def read_json(path: Path) -> Any:
    """Raises `OSError` or `ValueError` where `path` cannot be read or is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def json_checksum(content: Any) -> str:
    """Return the SHA-256 of `content` (of JSON), independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file in `folder` and below it; raises `OSError`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def require_checksums(folder: Path, sums: dict[str, str]) -> None:
    """Raises `OSError` or `ValueError` unless all that `checksums` found is there and has not changed."""
    for name, wanted in sums.items():
        if _sha256(folder / name) != wanted:
            raise ValueError(f"{name} does not match its checksum")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Has the names in `folder` on the disk, should the machine lose its power."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # there is no such thing on this system
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def remove_folder(folder: Path, aside: Path) -> None:
    """Removes `folder`, which has the name `aside` meanwhile: under its own name nobody finds a part of it."""
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Here, no other process is in such a block of the same `path`, which then tells who is.

    Raises `BlockingIOError` where one is and `wait` is False, `OSError` where `path` cannot be written. The lock is the
    kernel's: it ends with its process. Where the file system has none, nobody is kept out.
    """
    with path.open("a+") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def lock_holder(path: Path) -> str | None:
    """Which process is in a block that is `locked` by `path`; None where none is, or it does not show.

    Nothing is written: the lock is shared for a moment, if it can be had.
    """
    try:
        import fcntl

        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return path.read_text(errors="replace") or "another process"
    except (ImportError, OSError):
        pass
    return None


def user_cache() -> Path:
    """Return this project's folder in the user's cache folder; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar_flax"
