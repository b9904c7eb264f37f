"""Write docs/settings.md from the config dataclasses and the comments on their fields: `python -m docs.settings`."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar_flax import config as configs
from cifar_flax import models
from cifar_flax.training.optimizers import GROUPS

PAGE = Path(__file__).with_suffix(".md")
_COMMENT = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)

_INTRODUCTION = """\
# Settings

```bash
python main.py --config configs/default.py --config.seed=1 --config.optim.learning_rate=1e-3
```

Each setting is a field of a dataclass and a flag, `--config.` followed by its name. The defaults below are those of the
dataclasses; the shipped configs change some of them. `--mode=eval`, `predict` and `export` use the config that is saved
with the checkpoint. There, only `{locations}`, `eval.*` and `parallel.*` may
be changed.
`python -m docs.settings` writes this page from the code.
"""


def render() -> str:
    """Return the content of the page."""
    config = configs.Config()
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sections = [_INTRODUCTION.format(locations="`, `".join(configs.LOCATIONS))]
    sections.append(_section("The run", _rows(config, "")))
    for name, part in parts.items():
        if name == "model":
            for network, (kind, _) in models.MODELS.items():
                sections.append(_section(f"`model` of the network `{network}`", _rows(kind(), "model.")))
        elif dataclasses.is_dataclass(part):
            sections.append(_section(f"`{name}`", _rows(part, f"{name}.")))
        if name == "optim":
            title = "Groups of parameters: `optim." + "`, `optim.".join(GROUPS) + "`"
            sections.append(_section(title, _rows(configs.GroupConfig(), f"optim.{GROUPS[0]}.")))
    return "\n".join(sections)


def _rows(part: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and description of each setting; raise `KeyError` for a field without a comment."""
    comments: dict[str, str] = {}
    for kind in reversed(type(part).__mro__[:-1]):
        comments |= dict(_COMMENT.findall(inspect.getsource(kind)))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, configs.GroupConfig):
            yield f"{prefix}{field.name}.*", "", f"settings of a group, see below: {comments[field.name]}"
        elif not dataclasses.is_dataclass(value):
            yield f"{prefix}{field.name}", repr(value), comments[field.name]


def _section(title: str, rows: Iterator[tuple[str, str, str]]) -> str:
    lines = [f"## {title}", "", "| setting | default | description |", "|---|---|---|"]
    for name, default, description in rows:
        text = description.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {f'`{default}`' if default else ''} | {text} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(render())
