"""Apply the examples of docs/extending.md to a copy of the project, and use them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from processes import environment

PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
BLOCK = re.compile(r'^```(python|diff) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)

# Another network, of the most common layers of nnx.
CONVNET = """
from dataclasses import dataclass

from flax import nnx

from cifar_flax.models.layers import dropout
from cifar_flax.models.network import ModelConfig, Network


@dataclass(slots=True, kw_only=True)
class ConvNetConfig(ModelConfig):
    name: str = "convnet"


class ConvNet(Network):
    def __init__(self, config, image_shape, num_classes, *, platform, rngs):
        self.conv = nnx.Conv(image_shape[2], 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.group_norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x, dropout_keys=None):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=dropout_keys is None))
        x = self.group_norm(nnx.max_pool(x, (2, 2), strides=(2, 2))).mean(axis=(1, 2))
        return self.head(x if dropout_keys is None else dropout(x, dropout_keys, 0.25))
"""
CONVNET_ROW = """
 from cifar_flax.models.airbench import Airbench, AirbenchConfig
+from cifar_flax.models.convnet import ConvNet, ConvNetConfig
@@
     "cnn": (CNNConfig, CNN),
+    "convnet": (ConvNetConfig, ConvNet),
""".lstrip("\n")
CONVNET_CONFIG = """
from cifar_flax.config import Config
from cifar_flax.models.convnet import ConvNetConfig


def get_config():
    return Config(model=ConvNetConfig())
"""

SMALL = ("--config.data.name=digits", "--config.data.pipeline=resident", "--config.train.epochs=2",
         "--config.train.batch_size=200", "--config.train.log_every=2")  # fmt: skip
TINY_VIT = ("--config.model.width=8", "--config.model.depth=1", "--config.data.image_size=16")

# Heading on the page -> config and settings of the run that uses its example.
SECTIONS = {
    "A network": ("configs/vit.py", *SMALL, *TINY_VIT),
    "A dataset": ("configs/shapes.py", "--config.train.epochs=2"),
    "An augmentation": ("configs/default.py", *SMALL, "--config.model.width=4", "--config.model.hidden=16",
                        "--config.augment.noise=0.1", "--config.augment.mixup=0.3", "--config.augment.cutout=4"),
    "An optimizer or a schedule": ("configs/quickstart.py", *SMALL, "--config.optim.name=lion",
                                   "--config.optim.schedule=inverse_sqrt"),
    "A metric": ("configs/quickstart.py", *SMALL),
}  # fmt: skip


def examples(heading):
    """Return (kind, path, text) of each block in the section `heading` of the page."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return BLOCK.findall(section[1])


def apply(blocks, project):
    """Write new files, and apply each hunk of the diffs at the only place where it fits."""
    for kind, name, text in blocks:
        path = project / name
        if kind == "python":
            assert not path.exists(), path
            path.write_text(text)
            continue
        content = path.read_text()
        for hunk in text.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in (" ", sign)) for sign in "-+")
            assert content.count(before) == 1, (name, before)
            content = content.replace(before, after)
        path.write_text(content)


@pytest.fixture
def project(tmp_path):
    """Return a copy of the project."""
    for name in ("cifar_flax", "configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(project, *arguments):
    command = [sys.executable, str(REPOSITORY / "tests" / "extended_run.py"), *arguments]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_examples_together(project):
    """The examples of all kinds work together and pass the lint checks."""
    for heading in SECTIONS:
        apply(examples(heading), project)
    for command in (["check"], ["format", "--check"]):
        lint = [sys.executable, "-m", "ruff", *command, "--config", str(REPOSITORY / "pyproject.toml"), "."]
        done = subprocess.run(lint, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    run(
        project, "configs/vit.py", "--config.model.width=8", "--config.model.depth=1", "--config.data.name=shapes",
        "--config.data.train_split=training", "--config.data.eval_split=validation", "--config.train.epochs=2",
        "--config.train.log_every=4", "--config.augment.noise=0.1", "--config.augment.mixup=0.3",
        "--config.optim.name=lion",
    )  # fmt: skip
    lines = [json.loads(line) for line in (project / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 for line in lines if line["split"] == "train")
    brier_scores = [line["brier_score"] for line in lines if line["split"] == "validation"]
    assert len(brier_scores) == 2
    assert 0 < brier_scores[-1] < 2
    assert json.loads((project / "resumed" / "eval.json").read_text())["brier_score"] == brier_scores[-1]
    for page in ("resumed/report.html", "comparison.html"):
        html = (project / page).read_text()
        assert "Grad norm" in html
        assert html.count("rier score") >= 2  # the chart and the table


@pytest.mark.slow
@pytest.mark.parametrize("heading", SECTIONS)
def test_each_example(project, heading):
    blocks = examples(heading)
    assert {kind for kind, _, _ in blocks} <= {"python", "diff"}
    assert blocks
    apply(blocks, project)
    run(project, *SECTIONS[heading])


@pytest.mark.slow
def test_network_of_common_nnx_layers(project):
    blocks = [
        ("python", "cifar_flax/models/convnet.py", CONVNET),
        ("diff", "cifar_flax/models/__init__.py", CONVNET_ROW),
        ("python", "configs/convnet.py", CONVNET_CONFIG),
    ]
    apply(blocks, project)
    run(project, "configs/convnet.py", *SMALL)
