"""The run that the doctor examines."""

from dataclasses import dataclass, field
from pathlib import Path

from cifar_flax.config import Config

_STATE = 50_000_000  # bytes, if it is not known: the reference network with AdamW has 44 million


@dataclass(slots=True)
class Visit:
    """The run that is examined, and results of checks that later checks need."""

    config: Config
    workdir: Path
    platform: str = ""  # that JAX computes on
    has_data: bool = False  # nothing must be downloaded or decoded
    state_bytes: int = _STATE
    needs: list[tuple[str, Path, int]] = field(default_factory=list)  # (content, folder, minimum size in bytes)
