"""The folder of a study: places that cannot be one."""

import pytest
from test_study import run

from cifar_flax.data import sources
from cifar_flax.errors import ConfigError, UserError


def test_the_folder_must_not_be_inside_the_data(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match=r"--workdir=.*must not be inside data\.folder"):
        run(tmp_path / "photos" / "study", f"--config.data.folder={tmp_path / 'photos'}", "--config.data.name=folder")


def test_a_folder_that_cannot_be_made_is_refused_before_the_data_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "load_both", lambda config: pytest.fail("the data was loaded first"))
    (tmp_path / "study").touch()
    with pytest.raises(UserError, match=r"--workdir=.*cannot be used as the folder of a study: File exists"):
        run(tmp_path / "study")
