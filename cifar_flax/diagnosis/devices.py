"""Check the devices, the persistent compilation cache and the memory allocator."""

import contextlib
import logging
import logging.handlers
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax

from cifar_flax.diagnosis import nvidia
from cifar_flax.diagnosis.examination import Examination
from cifar_flax.diagnosis.installation import FAIL, NOTE, OK, Finding
from cifar_flax.errors import UserError, one_line
from cifar_flax.packages import has_module
from cifar_flax.runtime import allocator, compilation
from cifar_flax.runtime.devices import all_devices
from cifar_flax.runtime.environment import machine


def devices(examination: Examination) -> Iterator[Finding]:
    """Check that JAX finds devices, and report why a GPU or TPU is not used."""
    with _jax_warnings() as records:
        try:
            found = all_devices()
        except UserError as error:
            yield Finding(FAIL, str(error))
            found = []
    if found:
        examination.platform = found[0].platform
        kinds = Counter(device.device_kind for device in found)
        names = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        yield Finding(OK, f"{names}; {machine()}")
    warned = " ".join("; ".join(record.getMessage() for record in records).split())
    if examination.platform in ("", "cpu"):
        if reason := nvidia.why_unused(warned):
            yield Finding(NOTE, f"NVIDIA GPU: {reason}")
        elif found and has_module("libtpu") and not os.environ.get("JAX_PLATFORMS"):
            try:
                jax.devices("tpu")
            except RuntimeError as error:
                yield Finding(NOTE, f"TPU: libtpu is installed, but JAX finds no TPU ({one_line(error)})")
        elif warned:  # such as a TPU without libtpu
            yield Finding(NOTE, warned)


@contextlib.contextmanager
def _jax_warnings() -> Iterator[list[logging.LogRecord]]:
    """Collect the warnings that JAX and its plugins log while they search for devices, and do not print them."""
    handler, loggers = logging.handlers.BufferingHandler(1000), [logging.getLogger(n) for n in ("jax", "jax_plugins")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def programs(examination: Examination) -> Iterator[Finding]:
    """Check the persistent compilation cache."""
    if not examination.platform:
        return
    reason, folder = compilation.cache_problem(), compilation.program_cache()
    if reason:
        yield Finding(NOTE, f"compiled at each start: {reason}")
        return
    damaged = sum(compilation.is_damaged(path.read_bytes()) for path in Path(folder or "").glob("*-cache"))
    yield Finding(OK, f"compiled once and cached in {folder}")
    if damaged:
        yield Finding(NOTE, f"{damaged} damaged programs will be removed and compiled again")


def memory(examination: Examination) -> Iterator[Finding]:
    """Check that glibc malloc is tuned for training on a CPU."""
    if examination.platform != "cpu":
        return
    tunables = os.environ.get("GLIBC_TUNABLES")
    if tunables == allocator.SETTINGS["GLIBC_TUNABLES"]:
        yield Finding(OK, "glibc malloc keeps freed memory for the next step")
        return
    reason = "an accelerator plugin is installed, or the C library is not glibc"
    if tunables is not None:
        reason = "GLIBC_TUNABLES is set"
    yield Finding(NOTE, f"glibc malloc is not tuned; CPU steps are about 1.5 times slower: {reason}")
