"""Chips that programs are compiled for without having them: their names, their speeds and what compiles for them.

Importing this module does not import jax, which reads `ENVIRONMENT` when it is imported.
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cifar_flax.errors import ConfigError, UserError

# jax must not look for a TPU or a GPU in this machine, nor libtpu for the other hosts of a slice.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # for several processes at a time
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # for each kind of TPU; it only avoids a warning
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_H100 = Path(__file__).parent / "chips" / "h100_sxm.txtpb"


@dataclass(frozen=True, slots=True)
class Chip:
    """One device, as jax counts them."""

    kind: str  # jax's `device_kind`
    bandwidth: float  # bytes per second of the main memory, from the vendor's data sheet
    clock: float | None = None  # of a TPU: cycles per second, by which XLA's estimates become times

    @property
    def flops(self) -> float:
        """Return the dense bfloat16 operations per second."""
        from benchmarks.hardware import PEAKS

        return PEAKS[self.kind]


CHIPS = {
    "h100": Chip("NVIDIA H100 80GB HBM3", 3.35e12),
    "v4": Chip("TPU v4", 1.23e12, 1.05e9),
    "v5e": Chip("TPU v5 lite", 819e9, 1.5e9),
    "v5p": Chip("TPU v5", 2.765e12, 1.75e9),
    "v6e": Chip("TPU v6 lite", 1.64e12, 1.75e9),
    "tpu7x": Chip("TPU7x", 3.69e12),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to compile for; `name` is the chip and the topology, such as "v5e:2x2"."""

    name: str
    options: dict[str, Any]  # of `topologies.get_topology_desc`

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.split(":")[0]]

    @property
    def is_tpu(self) -> bool:
        return self.options["platform"] == "tpu"

    def devices(self) -> Any:
        """Return the devices, which can be compiled for and not used. Raise `UserError` if the compiler is missing."""
        require_compiler(self)
        from jax.experimental import topologies

        options = self.options if self.is_tpu else {**self.options, "target_config": _H100.read_text()}
        return topologies.get_topology_desc(**options).devices


def _tpu(name: str, **options: Any) -> Target:
    return Target(name, {"platform": "tpu", "topology_name": name, **options})


_TARGETS = [
    *[Target(f"h100:{count}", {"platform": "cuda", "topology": f"1x1x{count}"}) for count in (1, 2, 4, 8)],
    # A topology that is smaller than a host, or of one host instead of two, needs the number of its chips.
    _tpu("v5e:1x1", chips_per_host_bounds=[1, 1, 1]),
    _tpu("v5e:2x2"),
    _tpu("v5e:2x4", chips_per_host_bounds=[2, 4, 1]),
    _tpu("v6e:1x1", chips_per_host_bounds=[1, 1, 1]),
    _tpu("v6e:2x2"),
    _tpu("v6e:2x4", chips_per_host_bounds=[2, 4, 1]),
    _tpu("v5p:2x2x1"),
    _tpu("v4:2x2x1", chip_config_name="megacore"),  # otherwise each chip is two devices
    _tpu("tpu7x:2x2x1"),
]
TARGETS = {target.name: target for target in _TARGETS}


def find(name: str) -> Target:
    """Return the target called `name`. Raise `ConfigError` if there is none."""
    if name not in TARGETS:
        raise ConfigError(f"--target={name!r}: must be one of {', '.join(TARGETS)}")
    return TARGETS[name]


def require_compiler(target: Target) -> None:
    """Raise `UserError` unless the package that compiles for `target` is installed, in jax's version."""
    version = metadata.version("jaxlib")
    if target.is_tpu:
        missing, command = _installed("libtpu") is None, f'"jax[tpu]=={metadata.version("jax")}"'
    else:
        packages = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
        missing = any(_installed(package) != version for package in packages)
        command = f"--no-deps {' '.join(f'{package}=={version}' for package in packages)}"
    if missing:
        raise UserError(f"--target={target.name!r}: its compiler is missing. Install it: pip install {command}")


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
