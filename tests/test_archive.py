import io
import tarfile

import numpy as np
import pytest

from cifar_flax.data import archive
from cifar_flax.errors import ConfigError, UserError

NEEDED = (
    "data_batch_1.bin not found; must be cifar-10-binary.tar.gz (with cifar-10-batches-bin/*.bin) or the folder it "
    "unpacks to"
)
RECORDS = 6  # per file of the test archives; a file of the real archive has 10,000
NAMES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(archive, "_FILE_SIZE", RECORDS * 3073)


@pytest.fixture
def contents():
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (len(NAMES), RECORDS, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    return {name: record.tobytes() for name, record in zip(NAMES, records, strict=True)}


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def official(contents):
    return [(f"cifar-10-batches-bin/{name}", content) for name, content in contents.items()]


def test_archive_and_folder_agree_with_the_format(tmp_path, contents):
    tar = write_tar(tmp_path / "a.tar.gz", [("cifar-10-batches-bin/readme.html", b"hello"), *official(contents)])
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for split, names in (("train", NAMES[:5]), ("test", NAMES[5:])):
        joined = b"".join(contents[name] for name in names)
        for path in (tar, folder):
            arrays = archive.read_archive(path, split)
            assert arrays.images.shape == (len(names) * RECORDS, 32, 32, 3)
            for i in (0, RECORDS - 1):
                record = joined[i * 3073 : (i + 1) * 3073]
                assert arrays.labels[i] == record[0]
                for row, column, channel in ((0, 0, 0), (1, 2, 1), (31, 31, 2)):
                    assert arrays.images[i, row, column, channel] == record[1 + channel * 1024 + row * 32 + column]
    assert not list(tmp_path.glob("*.bin")), "the archive was unpacked"


def test_members_may_come_in_any_order(tmp_path, contents):
    in_order = write_tar(tmp_path / "a.tar.gz", official(contents))
    reverse = write_tar(tmp_path / "b.tar.gz", official(contents)[::-1])
    images = [archive.read_archive(path, "train").images for path in (in_order, reverse)]
    np.testing.assert_array_equal(*images)


def changed(contents, name, content):
    return official({**contents, name: content})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda c: official(c)[1:], r"data_batch_1\.bin.*not found"),
        (lambda c: changed(c, "data_batch_3.bin", c["data_batch_3.bin"][:-1]), r"data_batch_3\.bin.*damaged"),
        (lambda c: changed(c, "data_batch_3.bin", c["data_batch_3.bin"] + b"x"), r"data_batch_3\.bin.*damaged"),
        (lambda c: official(c) + official(c)[:1], r"data_batch_1\.bin.*damaged"),
        (lambda c: changed(c, "data_batch_2.bin", b"\x0a" + c["data_batch_2.bin"][1:]), "label 10"),
        (lambda c: [(name.replace("cifar", "../cifar"), content) for name, content in official(c)], "bin.*not found"),
        (lambda c: [(f"/etc/{name}", content) for name, content in official(c)], "bin.*not found"),
    ],
    ids=["missing", "short", "long", "twice", "label", "parent folder", "absolute"],
)
def test_damaged_archives_are_refused(tmp_path, contents, members, message):
    with pytest.raises(UserError, match=message):
        archive.read_archive(write_tar(tmp_path / "a.tar.gz", members(contents)), "train")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_archives_are_refused(tmp_path, contents, keep):
    path = write_tar(tmp_path / "a.tar.gz", official(contents))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=r"data\.archive"):
        archive.read_archive(path, "test")


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ("./cifar-10-batches-bin/{}.bin", "'./cifar-10-batches-bin/data_batch_1.bin'"),
        ("{}.bin", "'data_batch_1.bin'"),
        ("cifar-10-batches-py/{}", "'cifar-10-batches-py/data_batch_1'"),
    ],
    ids=["dot", "flat", "Python version"],
)
def test_what_other_archives_contain_is_reported(tmp_path, contents, members, found):
    named = [(members.format(name.removesuffix(".bin")), content) for name, content in contents.items()]
    with pytest.raises(UserError) as caught:
        archive.read_archive(write_tar(tmp_path / "a.tar.gz", named), "train")
    assert str(caught.value).endswith(f"a.tar.gz': {NEEDED}. It contains {found} and 5 more")


def test_what_other_folders_contain_is_reported(tmp_path):
    (tmp_path / "parent" / "cifar-10-batches-bin").mkdir(parents=True)
    (tmp_path / "parent" / "another").touch()
    for folder, found in (("parent", "'cifar-10-batches-bin' and 1 more"), ("parent/cifar-10-batches-bin", "nothing")):
        with pytest.raises(UserError) as caught:
            archive.read_archive(tmp_path / folder, "train")
        assert str(caught.value).endswith(f"/{folder}': {NEEDED}. It contains {found}")


def test_links_are_not_followed(tmp_path, contents):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in NAMES:
            link = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    with pytest.raises(UserError, match=r"data_batch_1\.bin.*not found"):
        archive.read_archive(path, "train")


def test_absent_archive_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.archive=.*nowhere"):
        archive.read_archive(tmp_path / "nowhere.tar.gz", "train")
