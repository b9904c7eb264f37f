"""The run that the doctor examines."""

from dataclasses import dataclass, field
from pathlib import Path

from cifar_flax.config import Config

_STATE = 50_000_000  # bytes, if not known; the reference network with AdamW has 44 million


@dataclass(slots=True)
class Examination:
    """The run to examine, and results of checks that later checks use."""

    config: Config
    workdir: Path
    platform: str = ""  # platform that JAX uses, such as "gpu"; "": no device found
    has_data: bool = False  # whether the data is decoded and ready
    state_bytes: int = _STATE  # size of the train state
    needs: list[tuple[str, Path, int]] = field(default_factory=list)  # (content, folder, minimum size in bytes)
