"""The error messages for folders of images: more rows of the table in `test_messages.py`, which need files."""

import sys

import pytest
from conftest import REPOSITORY
from folders import many, write

from cifar_flax import cli
from cifar_flax.runtime import compilation

CONFIG = str(REPOSITORY / "configs" / "folder.py")
BAD = "x"  # content of files that are not images

# Images in the folder, files that are not images, settings, exit code, part of the message ({in} is the folder).
BAD_INPUT = [
    ([], [], "data.folder=", 2, "data.folder='': must be the path of a folder: --config.data.folder=DIR"),
    ([], [], "data.folder=nowhere", 2, "data.folder='nowhere': no such folder"),
    (
        [],
        ["photos.zip"],
        "data.folder={in}/photos.zip",
        2,
        "photos.zip': must be a folder, not a file; unpack an archi",
    ),
    ([], [], "data.folder=gs://bucket", 2, "data.folder='gs://bucket': must be a local path"),
    ([], [], "", 2, "data.folder='{in}': must hold at least two folders of images, one per class; it holds 0"),
    (["1.png", "2.png"], [], "", 2, "it holds 2 files, but no folders; sort the images into one folder per class"),
    (many("cat"), [], "", 2, "must hold at least two folders of images, one per class; it holds 1"),
    (many("photos/cat", "photos/dog"), [], "", 2, "must hold at least two folders of images, one per class; did you m"),
    (["cat/1.png", *many("dog")], [], "", 2, "each class needs at least 2 images, but 'cat' has 1"),
    (many("a\nb", "c"), [], "", 2, "the name of its class folder 'a\\nb' must be printable"),
    ([], [f"{number}/1.png" for number in range(2001)], "", 2, "must hold at most 2,000 classes, not 2,001"),
    (many("cat", "Test"), [], "", 2, "needs the folders train and test, which data.train_split and data.eval_split n"),
    (many("Training/cat", "Testing/cat"), [], "", 2, "it holds Testing, Training, which must not be names of classes"),
    (
        many("train/cat", "train/dog", "val/cat", "val/dog"),
        [],
        "",
        2,
        "it holds train, val, which must not be names of",
    ),
    (
        many("cat", "dog"),
        [],
        "data.eval_split=val",
        2,
        "data.eval_split='val': must be test, since {in} has no folders",
    ),
    (many("train/cat", "train/dog", "test/cat", "test/dog", "test/owl"), [], "", 2, "train lacks classes of the oth"),
    (many("train/cat", "train/dog", "train/owl", "test/cat", "test/dog"), [], "", 2, "test lacks classes of the oth"),
    (many("cat", "dog"), [], "workdir={in}", 2, "--workdir='{in}': must not be data.folder, whose folders are classes"),
    (
        many("cat", "dog", count=4),
        [],
        "data.validation_fraction=0.8 train.batch_size=1",
        2,
        "data.validation_fraction=0.8: must leave at",
    ),
    (many("cat", "dog"), [], "data.image_size=257", 2, "data.image_size=257: must be 16 to 256 for data.folder"),
    (many("cat", "dog"), [], "data.image_size=15", 2, "data.image_size=15: must be 16 to 256 for data.folder"),
    (many("cat", "dog"), [], "data.test_fraction=1", 2, "data.test_fraction=1.0: must be above 0 and below 1"),
    (many("cat", "dog"), [], "data.max_bad_fraction=2", 2, "data.max_bad_fraction=2.0: must be in [0, 1]"),
    (many("cat", "dog"), [], "data.archive=a", 2, "data.archive='a': must be empty if data.folder is set"),
    (many("cat", "dog", count=40), many("cat/bad", count=40), "", 1, "data.max_bad_fraction=0.01: "),
    ([], many("cat", "dog"), "", 1, "data.max_bad_fraction=0.01: "),
    (many("cat", "dog"), ["owl/1.txt", "owl/2.txt"], "", 1, "no train image of the class 'owl' can be read; remove"),
    (many("cat", "dog"), [], "train.batch_size=50", 2, "train.batch_size=50: must be at most the"),
]


EXAMINED = [row for row in BAD_INPUT if row[3] == 1 or row[2].startswith(("data.folder", "workdir", "data.valid"))]


@pytest.mark.parametrize(
    ("mode", "images", "others", "settings", "code", "message"),
    [("train", *row) for row in BAD_INPUT] + [("doctor", *row) for row in EXAMINED],
    ids=lambda value: value.replace("/", "_").replace("{in}", "") if isinstance(value, str) else "",
)
def test_bad_folders_print_one_line_and_are_not_changed(
    tmp_path, monkeypatch, capsys, mode, images, others, settings, code, message
):
    folder = write(tmp_path / "in", *images)
    folder.mkdir(exist_ok=True)
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(BAD)
    argv = ["main.py", "--mode", mode, "--config", CONFIG, f"--config.data.folder={folder}", "--workdir=run"]
    flags = [f"--config.{setting}" for setting in settings.format(**{"in": folder}).split()]
    monkeypatch.setattr(sys, "argv", [*argv, *(flag.replace("--config.workdir", "--workdir") for flag in flags)])
    monkeypatch.setattr(compilation, "cache_problem", lambda: None)  # the probe of the doctor takes long
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    found = cli.main()
    assert found == (code if mode == "train" else 1) or (code == 2 and found == 2)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message.format(**{"in": folder}) in lines[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "cache"}
