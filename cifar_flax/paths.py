"""Paths that the user names in arguments, settings, environment variables and calls."""

import os
import re
from os import PathLike
from pathlib import Path

from cifar_flax.errors import ConfigError, require

# A Windows drive has one letter. One slash: `Path` has removed the other one of gs://bucket, and dbfs:/runs has one.
_URL = re.compile(r"[A-Za-z][\w+.-]+:/")


def local_path(field: str, value: str | PathLike[str]) -> Path:
    """Return the path `value` of `field`, such as "--workdir", with a leading `~` or `~user` expanded.

    Every path of the user passes through this function. Raise `ConfigError` if `value` is a URL, or if the home folder
    is unknown and no file has the name `value`.
    """
    remote = "must be a local path; mount the bucket (with rclone, for example) or download the file first"
    require(not _URL.match(os.fspath(value)), field, str(value), remote)
    path = Path(value)
    try:
        return path.expanduser()
    except RuntimeError as error:
        if os.path.lexists(path):  # a file whose name begins with "~", as shells take it
            return path
        unknown = "the home folder is unknown; name an absolute path"
        raise ConfigError(f"{field}={str(value)!r}: {unknown}") from error
