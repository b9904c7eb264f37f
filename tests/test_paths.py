"""Test the paths of users: `~`, URLs of remote storage, and machines without a home folder."""

import pwd
import re
import shutil
import sys
from pathlib import Path

import namespaces
import pytest
from conftest import REPOSITORY
from processes import environment

import cifar_flax
from cifar_flax import files, restore
from cifar_flax.arguments import parse
from cifar_flax.data import sources
from cifar_flax.data.sources import DataConfig
from cifar_flax.errors import ConfigError
from cifar_flax.paths import local_path
from cifar_flax.runtime import compilation
from cifar_flax.training.trainer import Trainer


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return the home folder, which is not the current one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def homeless(monkeypatch):
    """Let the user have no HOME, no passwd entry and no XDG_CACHE_HOME."""

    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_local_path(home):
    for value, path in {"~": home, "~/a/~": home / "a" / "~", "a/~": Path("a/~"), "C:/a": Path("C:/a")}.items():
        assert local_path("x", value) == local_path("x", Path(value)) == path
    for url in ("gs://bucket/run", "s3://a", "file:///a", "dbfs:/a", "hdfs+x.y-z://a", Path("gs://bucket/run")):
        with pytest.raises(ConfigError, match="mount the bucket"):
            local_path("x", url)
    with pytest.raises(ConfigError, match="x='~no one/a': the home folder is unknown"):
        local_path("x", "~no one/a")
    Path("~$draft.png").touch()  # named in full by the shell's `*`
    assert local_path("PATH", "~$draft.png") == Path("~$draft.png")


def test_paths_of_the_command_line_are_expanded(straight, home):
    shutil.copytree(straight[0], home / "run")
    shutil.copy(REPOSITORY / "configs" / "quickstart.py", home / "mine.py")
    assert parse(["--config=~/mine.py", "--workdir=~/run"]).workdir == home / "run"
    command = parse(["--mode=predict", "--workdir=~/run", "--output=~/p.csv", "~/in", "b.png"])
    assert (command.workdir, command.output) == (home / "run", home / "p.csv")
    assert command.paths == (home / "in", Path("b.png"))
    assert parse(["--mode=doctor", "--workdir=~/run"]).workdir == home / "run"


def test_paths_of_settings_variables_and_calls_are_expanded(straight, home, tiny_config, monkeypatch):
    shutil.copytree(straight[0], home / "run")
    assert cifar_flax.load("~/run").image_shape == (32, 32, 3)
    tiny_config.train.init_from = "~/run"
    trainer = Trainer(tiny_config)
    restore.init_from(tiny_config, trainer.info, trainer.initialize_optimizer, trainer.initial_state)
    assert sources.cache_dir(DataConfig(cache_dir="~/c")) == home / "c"
    with pytest.raises(ConfigError, match=f"data.archive='{home}/a'"):
        sources.load(DataConfig(archive="~/a"), "train")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/x")
    assert files.user_cache() == home / "x" / "cifar_flax"


def test_without_a_home_folder_only_its_caches_are_missing(homeless, monkeypatch):
    updated = []
    monkeypatch.setattr(compilation.jax.config, "update", lambda *setting: updated.append(setting))
    monkeypatch.setattr(compilation, "program_cache", lambda: None)
    compilation.enable_cache()
    assert updated == []
    unknown = "XDG_CACHE_HOME='~/.cache': the home folder is unknown; name an absolute path"
    assert compilation.cache_problem() == unknown
    with pytest.raises(ConfigError, match="the home folder is unknown; name an absolute path"):
        sources.load(DataConfig(), "train")
    assert len(sources.load(DataConfig(name="digits"), "test").labels) == 355


def test_a_run_can_start_without_a_home_folder(tmp_path):
    variables = environment(MPLCONFIGDIR=str(tmp_path))
    without = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    variables = {name: value for name, value in variables.items() if name not in without}
    command = [sys.executable, str(REPOSITORY / "main.py"), "--mode=doctor", "--config", "quickstart"]
    done = namespaces.run(namespaces.NOBODY, command, cwd=tmp_path, env=variables)
    assert done.stdout.endswith("\na run can start\n"), done.stdout + done.stderr
    assert re.search("note  programs  compiled at each start: .*the home folder is unknown", done.stdout)
