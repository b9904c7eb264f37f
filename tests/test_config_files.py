"""How `--config` finds its file, and imports between config files."""

import sys

import pytest
from conftest import REPOSITORY

from cifar_flax import arguments
from cifar_flax.errors import ConfigError

CHILD = """
from {parent} import get_config as parent

def get_config():
    config = parent()
    config.seed += 1
    return config
"""


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py")))
def test_shipped_configs_have_names(name, tmp_path):
    command = arguments.parse([f"--config={name}"])
    assert command.config == arguments.parse([f"--config={REPOSITORY / 'configs' / name}.py"]).config
    assert str(command.workdir) == f"runs/{name}"


def test_the_error_for_an_unknown_name_lists_the_names():
    with pytest.raises(ConfigError, match=r"^--config='defalt': .*airbench94, .*quickstart"):
        arguments.parse(["--config=defalt"])


@pytest.mark.parametrize("path", ["configs/default", "default.py", "./default"])
def test_paths_are_not_looked_up_as_names(path):
    with pytest.raises(ConfigError, match=f"^--config='{path}': no such file"):
        arguments.parse([f"--config={path}"])


def test_a_local_file_takes_precedence_over_a_shipped_config(tmp_path):
    (tmp_path / "default").write_text("from cifar_flax.config import Config\nget_config = lambda: Config(seed=7)\n")
    assert arguments.parse(["--config=default"]).config.seed == 7


@pytest.mark.parametrize("parent", ["base", "configs.base"])
def test_a_config_can_import_a_file_next_to_it(tmp_path, parent):
    """Two folders have files of the same names; neither is the current folder."""
    for number, folder in enumerate((tmp_path / "one" / "configs", tmp_path / "two" / "configs")):
        folder.mkdir(parents=True)
        base = f"from cifar_flax.config import Config\ndef get_config(): return Config(seed={10 * number})\n"
        (folder / "base.py").write_text(base)
        (folder / "child.py").write_text(CHILD.format(parent=parent))
    path, modules = list(sys.path), set(sys.modules)
    seeds = [arguments.parse(["--config=one/configs/child.py"]).config.seed]
    seeds.append(arguments.parse([f"--config={tmp_path}/two/configs/child.py"]).config.seed)
    assert seeds == [1, 11]
    assert sys.path == path
    assert not {"base", "configs.base"} & (sys.modules.keys() - modules)
