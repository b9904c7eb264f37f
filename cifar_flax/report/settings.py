"""A saved config as text."""

from collections.abc import Iterator, Mapping
from typing import Any


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and value of every setting, such as ("optim.learning_rate", "0.001")."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", '""' if value == "" else str(value)


def grouped(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Part -> path inside it -> value; what belongs to no part is in "run"."""
    parts: dict[str, dict[str, str]] = {"run": {}}
    for path, value in flat(config):
        part, _, inside = path.partition(".")
        parts.setdefault(part if inside else "run", {})[inside or path] = value
    return {part: values for part, values in parts.items() if values}
