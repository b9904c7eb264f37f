"""Read CIFAR-10's official archive, `cifar-10-binary.tar.gz`, or the folder it unpacks to.

Each record is a label (1 byte) and an image (3,072 bytes): a red, a green and a blue plane of 32 rows of 32 pixels.
Source: Krizhevsky, "The CIFAR-10 dataset", cs.toronto.edu/~kriz/cifar.html, section "Binary version".
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from cifar_flax.data.cache import Arrays
from cifar_flax.errors import ConfigError, UserError

_RECORD = 1 + 3 * 32 * 32  # bytes
_FILE_SIZE = 10_000 * _RECORD
_FOLDER = "cifar-10-batches-bin"
_FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
_ALLOWED = f"must be cifar-10-binary.tar.gz (with {_FOLDER}/*.bin) or the folder it unpacks to"
_CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_archive(path: Path, split: str) -> Arrays:
    """Return the split "train" or "test" of the archive or folder `path`. Nothing is written to disk.

    Raise `ConfigError` if `path` does not exist, and `UserError` if a file of the split is missing, duplicated or
    damaged. Other files are ignored.
    """
    setting = f"data.archive={str(path)!r}"
    if not path.exists():
        raise ConfigError(f"{setting}: {_ALLOWED}")
    wanted = _FILES[split]
    found: dict[str, bytes] = {}
    others: list[str] = []
    try:
        for name, content in _members(path, wanted):
            if content is None:
                others.append(name)
                continue
            if len(content) != _FILE_SIZE or name in found:
                raise UserError(f"{setting}: {name} is damaged: must occur once and have {_FILE_SIZE} bytes")
            found[name] = content
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise UserError(f"{setting}: cannot be read ({error}); {_ALLOWED}") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        closest = min(others, key=lambda name: ("batch" not in name, name), default="")
        holds = f"{closest[:60]!r} and {len(others) - 1} more" if others else "nothing"
        raise UserError(f"{setting}: {missing[0]} not found; {_ALLOWED}. It contains {holds}")
    records = np.frombuffer(b"".join(found[name] for name in wanted), np.uint8).reshape(-1, _RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= len(_CLASS_NAMES):
        raise UserError(f"{setting}: contains label {labels.max()}; labels must be 0 to 9")
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Arrays(images, labels, _CLASS_NAMES, "cifar10/binary")


def _members(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes | None]]:
    """Yield the names of all files, in one pass, with the contents of the wanted ones, or None.

    Contents are at most one byte longer than `_FILE_SIZE`. Read an archive to its end, where gzip's checksum is:
    tarfile alone would not verify it.
    """
    if path.is_dir():
        for file in path.iterdir():
            with file.open("rb") if file.name in wanted and file.is_file() else nullcontext() as opened:
                yield file.name, opened.read(_FILE_SIZE + 1) if opened else None
        return
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            folder, _, name = member.name.rpartition("/")
            if folder == _FOLDER and name in wanted and (content := archive.extractfile(member)):
                yield name, content.read(_FILE_SIZE + 1)
            else:
                yield member.name, None
        while stream.read(2**20):
            pass
