"""Check what the documentation refers to: settings, files and tests."""

import re

import pytest
from conftest import REPOSITORY

from benchmarks import aot_table
from docs import settings

PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for path in REPOSITORY.glob(pattern))


def test_settings_page_is_up_to_date():
    """If this fails after a change of a setting, run `python -m docs.settings`."""
    assert settings.PAGE.read_text() == settings.render()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page):
    text = re.sub(r"^New file .*$", "", page.read_text(), flags=re.MULTILINE)
    for name in re.findall(r"`((?:cifar_flax|configs|docs|tests|benchmarks)/[\w/.]+)`", text):
        assert (REPOSITORY / name).exists(), name


def test_tests_named_in_the_reliability_page_exist():
    rows = re.findall(r"^\| \*\*.*\| ([^|]+) \|$", (REPOSITORY / "docs" / "reliability.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for row in rows:
        code = ""
        for name in re.findall(r"`([\w.]+)`", row):
            if name.endswith(".py"):
                code = (REPOSITORY / "tests" / name).read_text()
            else:
                assert re.search(rf"^def test_{name}\(", code, re.MULTILINE), name


def test_table_of_compiled_programs_is_up_to_date():
    """If this fails after a run of `benchmarks.aot`, run `python -m benchmarks.aot_table`."""
    assert aot_table.render() in aot_table.PAGE.read_text()


def test_readme_has_at_most_1200_words():
    assert len((REPOSITORY / "README.md").read_text().split()) <= 1200
