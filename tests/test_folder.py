"""Test folders of class folders: which files they hold, how they are split, decoded and cached."""

import errno
import io
import os
import re
import unicodedata

import numpy as np
import pytest
from folders import load, many, write
from PIL import Image

from cifar_flax import files
from cifar_flax.data import class_folders, folder
from cifar_flax.data.config import DataConfig
from cifar_flax.data.images import read_image
from cifar_flax.errors import ConfigError, UserError


def listed(root, **settings):
    """Return the paths in the train and in the evaluation split, without reading them."""
    config = DataConfig(folder=str(root), **settings)
    splits = class_folders.find(config, (config.train_split, config.eval_split)).splits.values()
    return [[path for path, _ in split.files] for split in splits]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_additional_files_and_classes_move_no_other_file(tmp_path):
    train, test = listed(touch(tmp_path, *many("cat", "dog", count=100)))
    assert sorted(train + test) == sorted(many("cat", "dog", count=100))
    more_train, more_test = listed(touch(tmp_path, *many("cat", "fox", count=200)))
    assert set(train) <= set(more_train)
    assert set(test) <= set(more_test)
    assert len(more_train) + len(more_test) == 500


def test_what_is_not_used_is_printed(tmp_path, capsys):
    write(tmp_path, *many("train/a", "train/b", "test/a", "test/b", "val/a", count=2), "1.png", "train/2.png")
    (tmp_path / "train" / "empty").mkdir()
    load(tmp_path)
    printed = capsys.readouterr().out
    assert "2 classes (a, b), 4 train and 4 test files (50.0%)" in printed
    unused = re.search("not used: (.*)", printed)[1]
    assert re.fullmatch("the folder val, 1 file, 1 file in .*/train, the folder empty, which is empty", unused)


def test_the_fraction_is_that_of_the_setting_and_independent_of_the_place_of_the_folder(tmp_path):
    names = many("a", "b", count=1000)
    for fraction in (0.05, 0.2, 0.5):
        train, test = listed(touch(tmp_path / "one", *names), test_fraction=fraction)
        assert abs(len(test) / 2000 - fraction) < 0.03
        assert [train, test] == listed(touch(tmp_path / "two", *names), test_fraction=fraction)


def test_each_class_is_in_both_splits(tmp_path):
    """A class whose files are all in one split gets its file with the smallest hash in the other."""
    names = many(*map(str, range(40)), count=2)
    for fraction in (0.001, 0.999):
        train, test = listed(touch(tmp_path, *names), test_fraction=fraction)
        assert not set(train) & set(test)
        for part in (train, test):
            assert {path.split("/")[0] for path in part} == set(map(str, range(40)))
        alone = test if fraction < 0.5 else train
        assert len(alone) == 40
        for path in alone:
            name = path.split("/")[0]
            assert path == min((f"{name}/0.png", f"{name}/1.png"), key=class_folders._hash)


def test_the_unicode_form_of_a_name_does_not_matter(tmp_path):
    """A copy of a folder to another system may decompose accented letters."""
    names = [f"{name}/é{number}.png" for name in ("café", "thé") for number in range(40)]
    forms = {form: [unicodedata.normalize(form, name) for name in names] for form in ("NFC", "NFD")}
    composed, decomposed = (listed(touch(tmp_path / form, *forms[form])) for form in forms)
    assert composed == [[unicodedata.normalize("NFC", path) for path in split] for split in decomposed]
    both = [f"{split}/{name}" for split, form in (("train", "NFC"), ("test", "NFD")) for name in forms[form][::20]]
    train, test = load(write(tmp_path / "both", *both))
    assert train.class_names == test.class_names == ("café", "thé")


@pytest.mark.parametrize(("split", "settings"), [("test", {}), ("val", {"eval_split": "val"})])
def test_folders_of_splits(tmp_path, split, settings):
    touch(tmp_path, "train/b/1.png", "train/a/2.png", "train/a/deep/er/0.png", f"{split}/a/1.png", f"{split}/b/1.png")
    touch(tmp_path, "more/c/1.png")
    train, test = listed(tmp_path, **settings)
    assert train == ["train/a/2.png", "train/a/deep/er/0.png", "train/b/1.png"]
    assert test == [f"{split}/a/1.png", f"{split}/b/1.png"]


def test_class_names_are_in_natural_order_and_label_the_images(tmp_path):
    names = ["class10", "class2", "Class1", "2 x", "10 x", "é", "class02", "b\u0663"]
    train, test = load(write(tmp_path, *many(*names, count=3)))
    expected = ("2 x", "10 x", "b\u0663", "Class1", "class02", "class2", "class10", "é")
    assert train.class_names == test.class_names == expected
    for arrays in (train, test):
        assert [arrays.class_names[label] for label in arrays.labels] == [path.split("/")[0] for path in arrays.files]
        for image, path in zip(arrays.images, arrays.files, strict=True):
            np.testing.assert_array_equal(image, read_image(tmp_path / path, (16, 16, 3)))


def test_files_of_systems_and_of_this_program_are_skipped(tmp_path):
    write(tmp_path, *many("cat", "dog", count=2))
    junk = ["Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", ".hidden/0.png", "Desktop.ini", "@eaDir/0.png"]
    touch(tmp_path, *junk, *(f"cat/{name}" for name in junk))
    run = ["config.json", "checkpoints/1/record.json", "confusion_matrix.png", "report.html"]
    touch(tmp_path, *(f"runs/one/{name}" for name in run), *(f"cat/run/{name}" for name in run))
    touch(tmp_path, "export/config.json", "export/model.stablehlo", "predictions.csv")
    touch(tmp_path, *(f"cache/cifar_flax/folders/0/train_64px.0/{name}" for name in ("manifest.json", "images.npy")))
    train, test = load(tmp_path)
    assert train.class_names == ("cat", "dog")
    assert sorted([*train.files, *test.files]) == sorted(many("cat", "dog", count=2))
    assert train.skipped == test.skipped == []


def test_links_are_followed_and_loops_are_not(tmp_path):
    write(tmp_path / "far", *many("tabby", count=12))
    write(tmp_path / "in", *many("dog", count=12))
    (tmp_path / "in" / "cat").symlink_to("../far/tabby")
    (tmp_path / "in" / "dog" / "link.png").symlink_to("0.png")
    (tmp_path / "in" / "dog" / "up").symlink_to("../..")
    (tmp_path / "in" / "dog" / "gone.png").symlink_to("nowhere")
    train, test = load(tmp_path / "in")
    assert sorted([*train.files, *test.files]) == sorted([*many("cat", "dog", count=12), "dog/link.png"])
    skipped = dict([*train.skipped, *test.skipped])
    assert skipped.keys() == {"dog/up", "dog/gone.png"}
    assert "contains it" in skipped["dog/up"]


def test_folders_that_link_to_each_other_are_searched_once(tmp_path):
    """Otherwise the number of paths would grow like the factorial of the number of folders."""
    names = [f"dog/{number}" for number in range(9)]
    touch(tmp_path, *many(*names, "cat", count=2))
    for one in range(9):
        for other in range(9):
            if one != other:
                (tmp_path / "dog" / str(one) / f"to{other}").symlink_to(f"../{other}")
    train, test = listed(tmp_path)
    assert len(train) + len(test) == 20


def test_both_splits_are_of_one_search(tmp_path, monkeypatch):
    """A folder that changes while it is decoded must not have a file in both splits."""
    root, decode = write(tmp_path / "in", *many("a", "b", count=3)), folder._decode
    (other,) = [path for path in listed(root)[1] if path.startswith("a/")]

    def remove(*args):
        arrays = decode(*args)
        (root / other).unlink(missing_ok=True)
        return arrays

    monkeypatch.setattr(folder, "_decode", remove)
    with pytest.raises(UserError, match="no test image of the class 'a'"):
        load(root)


def test_errors_of_the_machine_are_not_cached(tmp_path, monkeypatch):
    """Too many open files, for example, may be over at the next start."""
    root = write(tmp_path / "in", *many("a", "b", count=3))

    def fail(path, shape):
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError as error:
            raise UserError("too many open files") from error

    with monkeypatch.context() as patched:
        patched.setattr(folder, "read_image", fail)
        with pytest.raises(UserError, match=r"data\.folder: a/\d\.png: too many open files"):
            load(root)
    train, test = load(root)
    assert len(train.labels) + len(test.labels) == 6
    assert train.skipped == test.skipped == []


def test_phone_formats_are_named(tmp_path, capsys):
    write(tmp_path, *many("train/a", "train/b", "test/a", "test/b", count=3))
    (tmp_path / "train" / "a" / "IMG_1.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    load(tmp_path)
    assert "IMG_1.jpg: HEIC or AVIF" in capsys.readouterr().out


def bad(root, count):
    """Write unreadable files of several kinds."""
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    kinds = [b"", b"GIF", whole.getvalue()[:1500], b"a note", whole.getvalue()[:20]]
    for number in range(count):
        (root / f"bad{number}.jpg").write_bytes(kinds[number % len(kinds)])


def test_a_few_unreadable_files_are_reported_and_skipped(tmp_path, capsys):
    write(tmp_path, *many("train/a", "train/b", "test/a", "test/b", count=3))
    bad(tmp_path / "train" / "a", 5)
    train, test = load(tmp_path)
    assert (len(train.labels), len(test.labels)) == (6, 6)
    assert not any("bad" in path for path in train.files)
    printed = capsys.readouterr().out
    assert re.search(r"train files cannot be read", printed)
    for number, reason in enumerate(("is empty", "not an image", "truncated", "not an image", "")):
        assert re.search(rf"train/a/bad{number}\.jpg: .*{reason}", printed)
    load(tmp_path)  # from the cache
    assert "train/a/bad3.jpg" in capsys.readouterr().out


def test_many_unreadable_files_end_the_run(tmp_path, capsys):
    write(tmp_path, *many("train/a", "train/b", "test/a", "test/b", count=3))
    bad(tmp_path / "train" / "a", 25)
    with pytest.raises(UserError, match=r"data\.max_bad_fraction=0\.01: 25 of 31 train files .*train/a/bad0\.jpg"):
        load(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("bad") == 20
    assert "and 5 more" in printed
    assert len(load(tmp_path, max_bad_fraction=0.9)[0].labels) == 6


def test_a_class_without_readable_images_ends_the_run(tmp_path):
    write(tmp_path, *many("a", "b", count=2))
    (tmp_path / "c").mkdir()
    bad(tmp_path / "c", 3)
    with pytest.raises(UserError, match=r"class 'c'"):
        load(tmp_path)


@pytest.fixture
def decodings(monkeypatch):
    """Return a list of the files that are decoded from now on."""
    decoded = []

    def read(path, shape):
        decoded.append(path.name)
        return read_image(path, shape)

    monkeypatch.setattr(folder, "read_image", read)
    return decoded


def test_another_fraction_leaves_the_cache_of_the_first(tmp_path, decodings):
    root = write(tmp_path / "in", *many("a", "b", count=20))
    for fraction in (0.2, 0.4, 0.2, 0.4):
        load(root, test_fraction=fraction)
    assert len(decodings) == 80


@pytest.mark.parametrize("change", ["time", "size", "name", "new", "removed", "moved"])
def test_changed_files_are_decoded_again_and_replace_their_arrays(tmp_path, decodings, capsys, change):
    root = write(tmp_path / "in", *many("train/a", "train/b", "test/a", "test/b", count=3))
    load(root)
    assert len(decodings) == 12
    decodings.clear()
    load(root)
    assert decodings == []
    path = root / "train" / "a" / "1.png"
    if change == "time":
        os.utime(path, (0, 0))
    elif change == "size":
        stamp = path.stat()
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif change == "name":
        path.rename(path.with_name("7.png"))
    elif change == "new":
        write(root, "train/b/9.png", seed=1)
    elif change == "removed":
        path.unlink()
    else:
        path.rename(root / "train" / "b" / "1b.png")
    capsys.readouterr()
    train, test = load(root)
    assert len(decodings) == {"new": 7, "removed": 5}.get(change, 6)
    assert "the train files have changed" in capsys.readouterr().out
    assert (len(train.labels), len(test.labels)) == (len(decodings), 6)
    (place,) = (files.user_cache() / "folders").iterdir()
    assert len([entry for entry in place.iterdir() if entry.is_dir()]) == 2


def test_sizes_have_arrays_of_their_own(tmp_path, decodings):
    root = write(tmp_path / "in", *many("a", "b", count=3))
    for side in (16, 24, 16, 24):
        assert load(root, image_size=side)[0].images.shape[1:] == (side, side, 3)
    assert len(decodings) == 12
    assert load(root, image_size=0)[0].images.shape[1:] == (64, 64, 3)


def test_copies_in_both_splits_are_counted(tmp_path):
    root = write(tmp_path, *many("train/a", "train/b", "test/a", "test/b", count=3))
    write(root / "test", *many("a", "b", count=3), seed=1)
    assert folder.duplicates(*load(root)) == ""
    content = (root / "train" / "a" / "2.png").read_bytes()
    (root / "test" / "a" / "1.png").write_bytes(content)
    Image.open(io.BytesIO(content)).save(root / "test" / "b" / "0.bmp")  # the same pixels
    line = folder.duplicates(*load(root))
    assert line.startswith("2 of 7 images")
    assert line.endswith("test/a/1.png of train/a/2.png")


def test_nothing_is_written_to_the_folder(tmp_path):
    root = write(tmp_path / "in", *many("a", "b", count=3))
    before = {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}
    load(root)
    assert before == {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}


def test_a_class_folder_that_cannot_be_searched_is_named(tmp_path, monkeypatch):
    root, listdir = write(tmp_path, *many("a", "b", "c", count=3)), os.listdir

    def refuse(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ConfigError, match=r"'b' has 0 \(b: permission denied\)"):
        load(root)
