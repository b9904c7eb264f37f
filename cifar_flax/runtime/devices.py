"""How steps are spread over devices: one function, written for one of them, under jit, shard_map or pmap."""

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cifar_flax.errors import UserError, one_line, require
from cifar_flax.runtime import compilation

AXIS = "data"  # the mesh's one axis: each device has its rows of every batch and all of everything else
BACKENDS = ("auto", "jit", "shard_map", "pmap")

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """Where a run takes place: nothing that changes what it computes, or that the use of its checkpoint asks for."""

    backend: str = "auto"  # jit (XLA spreads the batch) | shard_map | pmap | auto: jit on one device, else shard_map
    distributed: str = "auto"  # whether other processes take part: off | on | auto: as Slurm or a TPU slice says
    coordinator: str = ""  # where nothing says it: address:port of process 0
    num_processes: int | None = None  # with coordinator
    process_id: int | None = None  # with coordinator, from 0
    heartbeat_timeout_seconds: int = 45  # after which a silent process counts as dead, and the others end

    def validate(self) -> None:
        require(self.backend in BACKENDS, "parallel.backend", self.backend, f"must be one of {', '.join(BACKENDS)}")
        distributed = self.distributed
        require(distributed in ("auto", "off", "on"), "parallel.distributed", distributed, "must be auto, off or on")
        seconds = self.heartbeat_timeout_seconds
        require(seconds >= 10, "parallel.heartbeat_timeout_seconds", seconds, "must be at least 10")
        for name in ("num_processes", "process_id"):
            value = getattr(self, name)
            require(bool(self.coordinator) == (value is not None), f"parallel.{name}", value, "goes with a coordinator")
        if not self.coordinator:
            return
        host, _, port = self.coordinator.rpartition(":")
        fits = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
        require(fits, "parallel.coordinator", self.coordinator, "must be address:port")
        require(distributed != "off", "parallel.coordinator", self.coordinator, "needs another parallel.distributed")
        assert self.num_processes is not None
        assert self.process_id is not None
        require(self.num_processes >= 1, "parallel.num_processes", self.num_processes, "must be at least 1")
        fits, allowed = 0 <= self.process_id < self.num_processes, f"must be in [0, {self.num_processes})"
        require(fits, "parallel.process_id", self.process_id, allowed)


@dataclass(frozen=True, slots=True)
class Layout:
    """All devices of all processes in a row, and the transformation that spreads a step over them."""

    backend: str  # jit | shard_map | pmap
    mesh: Mesh
    deterministic: bool = False  # whether programs use only operations that repeat to the bit

    @property
    def axis_name(self) -> str | None:
        """What a step takes its means and sums over; None where it is written, as under jit, for the whole batch."""
        return None if self.backend == "jit" else AXIS

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        """Such as "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def __str__(self) -> str:
        """Such as "8 x NVIDIA H100 (shard_map)"."""
        kind = self.mesh.devices.flat[0].device_kind
        return kind if self.num_devices == 1 else f"{self.num_devices} x {kind} ({self.backend})"

    def require_divides(self, field: str, batch_size: int) -> None:
        """Raises `ConfigError` unless every device gets as many images of a batch."""
        allowed = f"must be a multiple of the number of devices, {self.num_devices}"
        require(batch_size % self.num_devices == 0, field, batch_size, allowed)

    def round_up(self, batch_size: int) -> int:
        """The smallest size that is not below and that the devices divide."""
        return math.ceil(batch_size / self.num_devices) * self.num_devices

    def local_slice(self, batch_size: int) -> slice:
        """Which places of a batch lie on the devices of this process: what it must read."""
        here = [i for i, device in enumerate(self.mesh.devices.flat) if device.process_index == jax.process_index()]
        each = batch_size // self.num_devices
        return slice(here[0] * each, (here[-1] + 1) * each)

    def shard_batch(self, inputs: T, batch_axis: int = 0) -> T:
        """NumPy arrays that hold this process' rows of a batch, along `batch_axis`, as arrays on all devices.

        pmap has a leading axis of devices: there it comes before the batch's.
        """
        if self.backend == "pmap":
            inputs = jax.tree.map(
                lambda x: x.reshape(*x.shape[:batch_axis], self.num_devices, -1, *x.shape[batch_axis + 1 :]), inputs
            )
        return jax.make_array_from_process_local_data(self._sharding(batch_axis), inputs)

    def replicate(self, arrays: T) -> T:
        """NumPy arrays, the same in every process, whole on each device."""
        return jax.make_array_from_process_local_data(self.replicated, arrays)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _sharding(self, batch_axis: int) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * batch_axis, AXIS))

    def parallelize(self, step: Callable[..., Any], *, shared: int, batch_axis: int = 0, donate: bool = False) -> Any:
        """`step(state, inputs, *shared)` as a function for all devices, not yet compiled.

        `inputs` are split along `batch_axis`; the state and so many `shared` arrays are whole on each device, and so
        is the result. With `donate` the state's memory is given to it.
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
        """`spread`, compiled for arguments like these, so that no rate counts the compilation."""
        spread = self.parallelize(step, shared=len(shared), batch_axis=batch_axis, donate=donate)
        options = compilation.options(self.platform, deterministic=self.deterministic)
        return spread.lower(state, inputs, *shared).compile(compiler_options=options)


def all_devices() -> list[jax.Device]:
    """Those that JAX computes on; raises `UserError` where it finds none of the kind that is asked for."""
    try:
        return jax.devices()
    except Exception as error:  # a plugin's may be of any kind
        asked = f"JAX_PLATFORMS={platforms}: " if (platforms := os.environ.get("JAX_PLATFORMS")) else ""
        raise UserError(f"{asked}{one_line(error) if str(error) else 'there is no such device'}") from error


def make_layout(
    config: ParallelConfig, devices: Sequence[jax.Device] | None = None, deterministic: bool = False
) -> Layout:
    """The layout on `devices`, by default all there are.

    Raises `ConfigError` for pmap over several processes, `UserError` where they have not as many devices each.
    """
    row = sorted(devices or all_devices(), key=lambda device: (device.process_index, device.id))
    backend = config.backend
    if backend == "auto":
        backend = "jit" if len(row) == 1 else "shard_map"
    counts = Counter(device.process_index for device in row)
    allowed = f"is for one process; there are {len(counts)}; shard_map is for any number"
    require(backend != "pmap" or len(counts) == 1, "parallel.backend", backend, allowed)
    if len(set(counts.values())) > 1:
        raise UserError(f"each process must have as many devices; they have {', '.join(map(str, counts.values()))}")
    return Layout(backend, Mesh(np.array(row), (AXIS,), axis_types=(AxisType.Auto,)), deterministic)
