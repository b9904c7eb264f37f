"""Atomic writes of files and folders, checksums, file locks, and the user's cache folder."""

import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cifar_flax.paths import local_path

_SEAL = "seal"
_LOCK = ".writing"  # in a temporary folder: its process holds a lock on it
PARTIAL = ".partial"  # suffix of files that are still being written


def replace(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: readers see the old file or the new one, even after a crash.

    Raise `OSError` that names `path` if it cannot be written.
    """
    partial = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}{PARTIAL}"  # `path` may have the longest name
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # such as a full disk
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which is renamed to `folder` at the end of the block.

    Readers never see an incomplete `folder`. If the block raises, the temporary folder is removed. Temporary folders of
    killed processes are removed first. Raise `OSError` that names `folder` if it already exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}."
    for lock in folder.parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
        with suppress(OSError), locked(lock, wait=False) as is_locked:
            if is_locked:
                shutil.rmtree(lock.parent, ignore_errors=True)
    partial = folder.with_name(f"{prefix}{secrets.token_hex(4)}")
    partial.mkdir()  # with the permissions of the umask, which those of mkdtemp ignore
    try:
        with locked(partial / _LOCK, wait=True):
            yield partial
            (partial / _LOCK).unlink()
            publish(partial, folder)
    except OSError as error:  # such as a full disk
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, folder: Path) -> None:
    """Rename the complete folder `partial` to `folder`, so that the rename survives a power loss."""
    partial.rename(folder)
    sync_folder(folder.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically."""
    replace(path, json.dumps(value, indent=1).encode())


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write `content` and its checksum to `path` as JSON, atomically."""
    write_json(path, content | {_SEAL: json_checksum(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the content that `write_sealed` wrote. Raise `OSError` or `ValueError` if it is unreadable or damaged."""
    content = read_json(path)
    if not isinstance(content, dict) or content.pop(_SEAL, None) != json_checksum(content):
        raise ValueError(f"{path.name} does not match its checksum")
    return content


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`. Raise `OSError` or `ValueError` if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def json_checksum(content: Any) -> str:
    """Return the SHA-256 of the JSON value `content`, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Return a dict from relative path to SHA-256 of all files below `folder`. Raise `OSError` if one is unreadable."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _LOCK)
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def require_checksums(folder: Path, sums: dict[str, str]) -> None:
    """Raise `OSError` or `ValueError` unless all files in `sums` exist in `folder` and match their checksums."""
    for name, wanted in sums.items():
        if checksum(folder / name) != wanted:
            raise ValueError(f"{name} does not match its checksum")


def checksum(path: Path) -> str:
    """Return the SHA-256 of the file `path`. Raise `OSError` if it is unreadable."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush the entries of `folder` to disk, so that renames survive a power loss."""
    with suppress(OSError):  # some systems cannot open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_folder(folder: Path, aside: Path) -> None:
    """Remove `folder`, renamed to `aside` first so that no reader finds it half deleted."""
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on `path`; the file records the holder's PID and host.

    The kernel releases the lock when the process ends. On file systems without locks, yield False. Raise
    `BlockingIOError` if another process holds the lock and `wait` is False, `OSError` if `path` cannot be written.
    """
    with path.open("a+", encoding="utf-8") as file:
        works = True
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except (ImportError, OSError):
            works = False
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield works


def lock_holder(path: Path) -> str | None:
    """Return the process that holds the lock on `path`, such as "process 12 on host"; None if it is free or unknown.

    Nothing is written: the test takes a shared lock for a moment.
    """
    try:
        import fcntl

        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return path.read_text("utf-8", errors="replace") or "another process"
    except (ImportError, OSError):
        pass
    return None


def user_cache() -> Path:
    """Return this project's folder in the user's cache folder; it may not exist.

    Raise `ConfigError` if the home folder is unknown and XDG_CACHE_HOME is not set, or names no local folder.
    """
    return local_path("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cifar_flax"
