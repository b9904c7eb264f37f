"""Read CIFAR-10's official archive, `cifar-10-binary.tar.gz`, or the folder it unpacks to.

Each record is a label (1 byte) and an image (3,072 bytes): a red, a green and a blue plane of 32 rows of 32 pixels.
Source: Krizhevsky, "The CIFAR-10 dataset", cs.toronto.edu/~kriz/cifar.html, section "Binary version".
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
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
    read_members = _folder_members if path.is_dir() else _tar_members
    try:
        for name, content in read_members(path, wanted, others):
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


def _folder_members(path: Path, wanted: tuple[str, ...], others: list[str]) -> Iterator[tuple[str, bytes]]:
    others += [file.name for file in path.iterdir() if file.name not in wanted]
    for name in wanted:
        if (path / name).is_file():
            with (path / name).open("rb") as file:
                yield name, file.read(_FILE_SIZE + 1)


def _tar_members(path: Path, wanted: tuple[str, ...], others: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the wanted members, in one pass; content is at most one byte longer than `_FILE_SIZE`.

    Append the names of the other files to `others`. Read the file to its end, where gzip's checksum is: tarfile alone
    would not verify it.
    """
    with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if folder == _FOLDER and name in wanted and member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                yield name, file.read(_FILE_SIZE + 1)
            elif member.isfile():
                others.append(member.name)
        while stream.read(2**20):
            pass
