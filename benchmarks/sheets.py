"""Carry decoded data to a machine without TensorFlow and TFDS, as strips of lossless WebP in a few archives.

    python -m benchmarks.sheets pack --out sheets --parts 2         # --config.data.FIELD=VALUE selects other data
    python -m benchmarks.sheets unpack sheets/*.tar --out decoded   # then train with --config.data.cache_dir=decoded

A strip is a column of up to 500 images. The strips are dealt in turn to the archives, which are uncompressed tar files.
Each has a manifest with the checksums of its strips and the labels and checksums of all splits.
"""

import argparse
import dataclasses
import io
import json
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.arguments import at_least_one
from cifar_flax import arguments, files
from cifar_flax.data import cache, datasets, sources
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import UserError, one_line, require

_FORMAT = 1
_MANIFEST = "manifest.json"
_LARGEST_STRIP, _LARGEST_IMAGE = 16_383, 4096  # pixels; the limit of WebP, and that of Pillow for images of this height
_LARGEST_ARCHIVE, _LARGEST_SPLIT = 2**30, 2**32  # bytes; a split is decoded in memory
# A damaged or made-up archive raises one of these.
_FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, Image.DecompressionBombError)
_METHOD = 4  # of WebP, 0 to 6: higher is slower and smaller; CIFAR-10 takes 99.3 MB with 4 and 100.5 MB with 2


def split_into_strips(split: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return a dict from name to images (a view) of each strip; its height is at most that of WebP."""
    step = min(500, _LARGEST_STRIP // images.shape[1])
    return {f"{split}_{i // step}.webp": images[i : i + step] for i in range(0, len(images), step)}


def _encode(images: np.ndarray) -> bytes:
    """Return the uint8 `images`, of shape (n, height, width, 1 or 3), as a WebP image of n * height rows."""
    rgb = np.broadcast_to(images, (*images.shape[:3], 3))  # WebP stores gray images as RGB, too
    strip, file = Image.fromarray(rgb.reshape(-1, images.shape[2], 3)), io.BytesIO()
    strip.save(file, "WEBP", lossless=True, quality=100, method=_METHOD, exact=True)
    return file.getvalue()


def _decode_into(images: np.ndarray, content: bytes) -> None:
    """Decode a strip into `images`, of shape (n, height, width, channels). Raise `ValueError` if it does not fit."""
    n, height, width, channels = images.shape
    with Image.open(io.BytesIO(content), formats=["WEBP"]) as strip:
        if strip.size != (width, n * height):  # known before the pixels are decoded
            raise ValueError(f"a strip has {strip.size[0]}x{strip.size[1]} pixels, not {width}x{n * height}")
        images[:] = np.asarray(strip.convert("RGB")).reshape(n, height, width, 3)[..., :channels]


def pack(config: DataConfig, parts: int, out: Path) -> list[Path]:
    """Write the train and test splits that `config` names to `parts` archives in `out`; return their paths.

    Raise `ConfigError` if the data does not come from TFDS or does not fit, `UserError` if `sources.load` does.
    """
    config = dataclasses.replace(config, source="tfds")  # `unpack` needs TFDS's version
    is_cached = not config.archive and config.name not in datasets.DATASETS
    require(is_cached, "data.name", config.name, "must be read from TFDS, since other data is not cached")
    splits = {split: sources.load(config, split) for split in (config.train_split, config.eval_split)}
    strips: dict[str, np.ndarray] = {}
    data: dict[str, Any] = {
        "format": _FORMAT, "dataset": splits[config.train_split].dataset, "parts": parts, "splits": {},
        "class_names": splits[config.train_split].class_names, "image_size": config.image_size,
    }  # fmt: skip
    for split, arrays in splits.items():
        images, size = np.ascontiguousarray(arrays.images), max(arrays.images.shape[1:3])
        require(size <= _LARGEST_IMAGE, "data.image_size", size, f"must be at most {_LARGEST_IMAGE}")
        strips |= split_into_strips(split, images)
        data["splits"][split] = {
            "shape": images.shape,
            "labels": arrays.labels.tolist(),
            "sha256": sha256(images).hexdigest(),
        }
    require(parts <= len(strips), "--parts", parts, f"must be at most {len(strips)}, the number of strips")
    with ThreadPoolExecutor() as pool:  # Pillow encodes and decodes without Python's global lock
        encoded = list(zip(strips, pool.map(_encode, strips.values()), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{data['dataset'].replace('/', '_')}_{part}of{parts}.tar" for part in range(1, parts + 1)]
    for part, path in enumerate(paths):
        members = dict(encoded[part::parts])
        checksums = {name: sha256(content).hexdigest() for name, content in members.items()}
        manifest = {"data": data, "part": part + 1, "strips": checksums}
        sealed = json.dumps(manifest | {"seal": files.json_checksum(manifest)}, separators=(",", ":")).encode()
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, content in ({_MANIFEST: sealed} | members).items():
                (info := tarfile.TarInfo(name)).size = len(content)
                archive.addfile(info, io.BytesIO(content))
        files.replace(path, file.getvalue())
    return paths


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return manifest and members of an archive, without extracting them. Raise `UserError` if it is damaged."""
    try:
        if path.stat().st_size > _LARGEST_ARCHIVE:
            raise ValueError(f"larger than {_LARGEST_ARCHIVE} bytes")
        with tarfile.open(path, "r:") as archive:
            # Sparse members are larger than the archive.
            content = {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and not m.issparse()}
        manifest = json.loads(content[_MANIFEST])
        if manifest.pop("seal") != files.json_checksum(manifest) or manifest["data"]["format"] != _FORMAT:
            raise ValueError(f"{_MANIFEST} does not match its checksum or has another format")
        for name, checksum in manifest["strips"].items():
            if sha256(content[name]).hexdigest() != checksum:
                raise ValueError(f"{name} does not match its checksum")
    except (tarfile.TarError, *_FAULTS) as error:
        raise UserError(f"ARCHIVE={str(path)!r}: unreadable, or not written by pack ({one_line(error)})") from error
    return manifest, content


def _decode_split(split: str, described: dict[str, Any], strips: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of a split. Raise `ValueError` unless they are as `described` in the manifest."""
    shape, labels = tuple(described["shape"]), np.array(described["labels"])
    n, height, width, channels = shape
    fits = labels.shape == (n,) and labels.dtype.kind == "i" and n * height * width * channels <= _LARGEST_SPLIT
    if not fits or not 0 < height <= _LARGEST_IMAGE or not 0 < width <= _LARGEST_IMAGE or channels not in (1, 3):
        raise ValueError(f"images of shape {shape} and labels of shape {labels.shape}")
    images = np.empty(shape, np.uint8)
    targets = split_into_strips(split, images)
    with ThreadPoolExecutor() as pool:
        list(pool.map(_decode_into, targets.values(), [strips[name] for name in targets]))
    if sha256(images).hexdigest() != described["sha256"]:
        raise ValueError("the images do not match their checksum")
    return images, labels


def unpack(paths: Sequence[Path], cache_dir: Path) -> list[Path]:
    """Store the splits in the archives `paths`, of one call of `pack`, in the data cache; return their folders.

    Nothing is written before all images are decoded and checked. Raise `UserError` if an archive is missing or damaged.
    """
    parts, strips, decoded = set(), {}, {}
    try:
        for path in paths:
            manifest, its_strips = _read(path)
            data = data if parts else manifest["data"]
            require(data == manifest["data"], "ARCHIVE", str(path), f"holds other data than {paths[0]}")
            parts, strips = parts | {manifest["part"]}, strips | its_strips
        require(len(parts) == data["parts"], "ARCHIVE", sorted(parts), f"must be all {data['parts']} parts")
        name, _, version = data["dataset"].rpartition("/")
        config = DataConfig(name=f"{name}:{version}", image_size=int(data["image_size"]), cache_dir=str(cache_dir))
        config.train_split, config.eval_split = data["splits"]
        config.validate()  # names become folders
        for split, described in data["splits"].items():
            decoded[split] = _decode_split(split, described, strips)
    except _FAULTS as error:  # the seal does not prove that pack wrote it
        raise UserError(f"ARCHIVE={str(paths[0])!r}: unreadable, or not written by pack ({one_line(error)})") from error
    folders = []
    for split, (images, labels) in decoded.items():
        folders.append(sources.cache_folder(config, split, version))
        stored = cache.store(
            folders[-1], [(images, labels)], num_examples=len(images), image_shape=images.shape[1:],
            class_names=tuple(data["class_names"]), dataset=data["dataset"],
        )  # fmt: skip
        same = np.array_equal(stored.images, images) and np.array_equal(stored.labels, labels)
        require(same, "--out", str(cache_dir), f"{folders[-1]} exists with other data")
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write archives; --config.data.FIELD=VALUE selects the data")
    packing.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the archives")
    packing.add_argument("--parts", type=at_least_one, default=2, help="number of archives (default: 2)")
    unpacking = commands.add_parser("unpack", help="fill a data cache from archives")
    unpacking.add_argument("archives", type=Path, nargs="+", metavar="ARCHIVE", help="all archives of the data")
    unpacking.add_argument("--out", type=Path, required=True, metavar="CACHE_DIR", help="the later data.cache_dir")
    args, overrides = parser.parse_known_args()
    if overrides and args.command == "unpack":
        parser.error(f"unrecognized argument {overrides[0]}")
    start = time.perf_counter()
    try:
        if args.command == "pack":
            config = arguments.parse(["--config", "default", *overrides]).config.data
            paths = pack(config, args.parts, args.out)
        else:
            paths = unpack(args.archives, args.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print(*paths, f"{time.perf_counter() - start:.1f} s", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
