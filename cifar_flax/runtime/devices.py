"""Data parallelism: run a step function on all devices with jit, shard_map or pmap."""

import logging
import logging.handlers
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cifar_flax import packages
from cifar_flax.errors import UserError, one_line, require
from cifar_flax.runtime import compilation

AXIS = "data"  # the only mesh axis: batches are split along it, everything else is replicated
BACKENDS = ("auto", "jit", "shard_map", "pmap")

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """Devices and processes of a run. These settings may change between restarts and are not read from a checkpoint."""

    backend: str = "auto"  # jit (XLA splits the batch) | shard_map | pmap | auto: jit on one device, else shard_map
    distributed: str = "auto"  # use several processes: off | on | auto: if started by Slurm or MPI, or on a TPU slice
    coordinator: str = ""  # HOST:PORT of process 0; "": detected from the launcher
    num_processes: int | None = None  # total number of processes; only with coordinator
    process_id: int | None = None  # index of this process, from 0; only with coordinator
    heartbeat_timeout_seconds: int = 45  # a process silent for this long counts as dead, and the others exit
    one_cuda_graph: bool = False  # on NVIDIA GPUs, run all steps of a call as one CUDA graph; not measured yet

    def validate(self) -> None:
        require(self.backend in BACKENDS, "parallel.backend", self.backend, f"must be one of {', '.join(BACKENDS)}")
        distributed = self.distributed
        require(distributed in ("auto", "off", "on"), "parallel.distributed", distributed, "must be auto, off or on")
        seconds = self.heartbeat_timeout_seconds
        require(seconds >= 10, "parallel.heartbeat_timeout_seconds", seconds, "must be at least 10")
        for name in ("num_processes", "process_id"):
            value = getattr(self, name)
            fits = bool(self.coordinator) == (value is not None)
            require(fits, f"parallel.{name}", value, "must be set together with parallel.coordinator")
        if not self.coordinator:
            return
        host, _, port = self.coordinator.rpartition(":")
        fits = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
        require(fits, "parallel.coordinator", self.coordinator, "must be address:port")
        allowed = "requires parallel.distributed=auto or on"
        require(distributed != "off", "parallel.coordinator", self.coordinator, allowed)
        assert self.num_processes is not None
        assert self.process_id is not None
        require(self.num_processes >= 1, "parallel.num_processes", self.num_processes, "must be at least 1")
        fits, allowed = 0 <= self.process_id < self.num_processes, f"must be in [0, {self.num_processes})"
        require(fits, "parallel.process_id", self.process_id, allowed)


@dataclass(frozen=True, slots=True)
class Layout:
    """A one-dimensional mesh of all devices of all processes, and how step functions run on it."""

    backend: str  # jit | shard_map | pmap
    mesh: Mesh
    deterministic: bool = False  # whether programs use only bitwise reproducible operations
    one_cuda_graph: bool = False  # whether a call on an NVIDIA GPU is one CUDA graph

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Return XLA's options for the steps."""
        return compilation.options(self.platform, deterministic=self.deterministic, one_cuda_graph=self.one_cuda_graph)

    @property
    def axis_name(self) -> str | None:
        """Return the axis name for `jax.lax.pmean` and `psum` in a step, or None for jit: its step sees all rows."""
        return None if self.backend == "jit" else AXIS

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        """Return the platform of the devices, such as "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def __str__(self) -> str:
        """Return a description such as "8 x NVIDIA H100 (shard_map)"."""
        kind = self.mesh.devices.flat[0].device_kind
        return kind if self.num_devices == 1 else f"{self.num_devices} x {kind} ({self.backend})"

    def require_divides(self, field: str, batch_size: int) -> None:
        """Raise `ConfigError` unless the number of devices divides `batch_size`."""
        allowed = f"must be a multiple of the number of devices, {self.num_devices}"
        require(batch_size % self.num_devices == 0, field, batch_size, allowed)

    def round_up(self, batch_size: int) -> int:
        """Return `batch_size` rounded up to a multiple of the number of devices."""
        return math.ceil(batch_size / self.num_devices) * self.num_devices

    def local_slice(self, batch_size: int) -> slice:
        """Return the rows of a batch that are on the devices of this process."""
        here = [i for i, device in enumerate(self.mesh.devices.flat) if device.process_index == jax.process_index()]
        each = batch_size // self.num_devices
        return slice(here[0] * each, (here[-1] + 1) * each)

    def shard_batch(self, inputs: T, batch_axis: int = 0) -> T:
        """Return `inputs` as JAX arrays, split over all devices along `batch_axis`.

        `inputs` are NumPy arrays with this process's rows of the batch. For pmap, an axis of devices is inserted before
        the batch axis.
        """
        if self.backend == "pmap":
            inputs = jax.tree.map(
                lambda x: x.reshape(*x.shape[:batch_axis], self.num_devices, -1, *x.shape[batch_axis + 1 :]), inputs
            )
        return jax.make_array_from_process_local_data(self._sharding(batch_axis), inputs)

    def replicate(self, arrays: T) -> T:
        """Return NumPy `arrays` as JAX arrays replicated on each device. All processes must pass the same values."""
        return jax.make_array_from_process_local_data(self.replicated, arrays)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _sharding(self, batch_axis: int) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * batch_axis, AXIS))

    def parallelize(self, step: Callable[..., Any], *, shared: int, batch_axis: int = 0, donate: bool = False) -> Any:
        """Return `step(state, inputs, *shared)` as a function on all devices, not yet compiled.

        `inputs` are split along `batch_axis`. The state, the `shared` further arguments and the result are replicated.
        With `donate`, the result reuses the state's buffers.
        """
        donated = (0,) if donate else ()
        if self.backend == "pmap":
            axes = (None, batch_axis, *[None] * shared)
            devices = list(self.mesh.devices.flat)
            return jax.pmap(step, AXIS, in_axes=axes, out_axes=None, devices=devices, donate_argnums=donated)
        shardings = (self.replicated, self._sharding(batch_axis), *[self.replicated] * shared)
        if self.backend == "shard_map":
            specs = tuple(sharding.spec for sharding in shardings)
            step = jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec())
        return jax.jit(step, in_shardings=shardings, out_shardings=self.replicated, donate_argnums=donated)

    def compile(
        self, step: Callable[..., Any], state: Any, inputs: Any, *shared: Any, batch_axis: int = 0, donate: bool = False
    ) -> jax.stages.Compiled:
        """Return `parallelize(step)` compiled for arguments like these, so that no measured rate includes compilation.

        `shared` are the arguments of `step` after `state` and `inputs`.
        """
        function = self.parallelize(step, shared=len(shared), batch_axis=batch_axis, donate=donate)
        return function.lower(state, inputs, *shared).compile(compiler_options=self.compiler_options)


def all_devices(warn: Callable[[str], object] = _logger.warning) -> list[jax.Device]:
    """Return the devices that JAX uses. Raise `UserError` if the requested platform has none.

    Call `warn` with the warnings of JAX and its plugins on one line, without the tracebacks that they log.
    """
    records, loggers = logging.handlers.BufferingHandler(1000), [logging.getLogger(n) for n in ("jax", "jax_plugins")]
    found, reasons = [], []
    for logger in loggers:
        logger.addHandler(records)
        logger.propagate = False
    try:
        found = jax.devices()
    except Exception as error:  # plugins may raise anything
        reasons = [one_line(error) if str(error) else "there is no such device"]
    for logger in loggers:
        logger.removeHandler(records)
        logger.propagate = True
    warned = [f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}" for record in records.buffer]
    text = " ".join("; ".join(reasons + warned).split())
    if found:
        if text:
            warn(text)
        return found
    asked = os.environ.get("JAX_PLATFORMS", "")
    if {"cuda", "gpu"} & set(asked.split(",")) and (fault := packages.cuda_fault()):
        text = f'{fault}; pip install -U "jax[cuda13]"'
    raise UserError(f"JAX_PLATFORMS={asked}: {text}" if asked else text)


def make_layout(
    config: ParallelConfig, devices: Sequence[jax.Device] | None = None, deterministic: bool = False
) -> Layout:
    """Return the layout on `devices`, by default all devices.

    Raise `ConfigError` if the backend is pmap and there are several processes, and `UserError` if the processes have
    different numbers of devices.
    """
    row = sorted(devices or all_devices(), key=lambda device: (device.process_index, device.id))
    backend = config.backend
    if backend == "auto":
        backend = "jit" if len(row) == 1 else "shard_map"
    counts = Counter(device.process_index for device in row)
    allowed = f"supports one process only, but there are {len(counts)}. Use shard_map"
    require(backend != "pmap" or len(counts) == 1, "parallel.backend", backend, allowed)
    if len(set(counts.values())) > 1:
        raise UserError(f"processes must have equal numbers of devices, not {', '.join(map(str, counts.values()))}")
    mesh = Mesh(np.array(row), (AXIS,), axis_types=(AxisType.Auto,))
    return Layout(backend, mesh, deterministic, config.one_cuda_graph)
