"""Test which files `--mode=predict` finds: folders, links, classes, and paths that cannot be read."""

import re
import sys

import namespaces
from conftest import REPOSITORY, python_path
from processes import environment

from cifar_flax.modes.predict import find


def test_folders_are_searched_in_order_and_name_the_classes(tmp_path):
    for name in ("b.png", "Cat/2.png", "Cat/deep/1.png", "cat/1.png", "dogs/1.png", ".hidden/1.png", ".DS_Store"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    predictions = list(find([tmp_path / "in", tmp_path / "gone.png"], ("cat", "dog")))
    names = [str(one.path.relative_to(tmp_path)) for one in predictions]
    expected = ["in/b.png", "in/Cat/2.png", "in/Cat/deep/1.png", "in/cat/1.png", "in/dogs/1.png", "gone.png"]
    assert names == expected
    assert [one.label for one in predictions] == [None, "cat", "cat", "cat", None, None]
    below = list(find([tmp_path / "in" / "Cat", tmp_path / "in" / "b.png"], ("cat", "dog")))
    assert [one.label for one in below] == ["cat", "cat", None]
    assert [one.label for one in find([tmp_path / "in"], ("cat", "Cat"))][1:4] == ["Cat", "Cat", "cat"]
    (tmp_path / "dog" / "cat").mkdir(parents=True)
    (tmp_path / "dog" / "cat" / "1.png").touch()
    assert [one.label for one in find([tmp_path / "dog"], ("cat", "dog"))] == ["cat"]


def test_links_are_followed_under_their_own_names(tmp_path):
    """A link to a folder that contains it, and a link to nothing, are reported."""
    for name in ("far/tabby/1.png", "far/tabby/deep/2.png", "photos/dog/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {
        "cat": "../far/tabby",
        "Dogs": "../far/tabby",
        "gone": "nowhere",
        "dog/up": "..",
        "dog/over": "../..",
        "a.png": "dog/1.png",
    }
    for name, target in links.items():
        (tmp_path / "photos" / name).symlink_to(target)
    (tmp_path / "far" / "tabby" / "back").symlink_to(tmp_path / "photos")
    found = list(find([tmp_path / "photos"], ("cat", "dog")))
    rows = [(str(one.path.relative_to(tmp_path / "photos")), one.label, bool(one.error)) for one in found]
    assert rows == [
        ("a.png", None, False),
        ("gone", None, False),  # a file that cannot be read
        ("Dogs/1.png", None, False),
        ("Dogs/back", None, True),
        ("Dogs/deep/2.png", None, False),
        ("cat/1.png", "cat", False),
        ("cat/back", "cat", True),
        ("cat/deep/2.png", "cat", False),
        ("dog/1.png", "dog", False),
        ("dog/over", "dog", True),
        ("dog/up", "dog", True),
    ]
    (tmp_path / "dog").symlink_to("far")
    assert {one.label for one in find([tmp_path / "dog"], ("cat", "dog")) if not one.error} == {"dog"}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to("../far/tabby/deep")
    assert [(one.label, one.error) for one in find([tmp_path / "links"], ("cat", "dog"))] == [("cat", "")]


# Prints why each PATH is not classified, without a model.
REASONS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from cifar_flax.modes.predict import classify, find

model = SimpleNamespace(image_shape=(8, 8, 3), batch_size=100)
for one in classify(model, list(find([Path(path) for path in sys.argv[1:]], ("cat", "dog")))):
    print(one.error)
"""


def test_unreadable_folders_and_paths_are_reported_one_by_one(tmp_path):
    for folder in ("photos/cat", "photos/dog", "closed/in", "empty"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").write_bytes(b"x") if folder != "empty" else None
    (tmp_path / "photos" / "cat").chmod(0)
    (tmp_path / "closed").chmod(0)
    paths = [tmp_path / name for name in ("photos", "closed", "closed/in", "closed/in/1.png", "a" * 300, "empty")]
    try:
        done = namespaces.run(
            namespaces.NOBODY,
            [sys.executable, "-c", REASONS, *map(str, paths)],
            env=environment(PYTHONPATH=python_path(REPOSITORY), PYTHONDONTWRITEBYTECODE="1"),
        )
    finally:
        for folder in ("photos/cat", "closed"):
            (tmp_path / folder).chmod(0o700)
    assert done.returncode == 0, done.stderr
    reasons = [re.sub(r" \(PNG.*", "", line) for line in done.stdout.splitlines()]
    assert reasons == [
        "permission denied",  # photos/cat
        "not an image in a supported format",  # photos/dog/1.png
        *["permission denied"] * 3,
        "file name too long",
        "is a folder without files",
    ]
