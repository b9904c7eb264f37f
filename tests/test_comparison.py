import math

import made_up
import numpy as np
import pages
import pytest

from cifar_flax.errors import ConfigError
from cifar_flax.modes.compare import compare


def plain(text):
    return text.replace("\u202f", "").replace("\u2002", " ").translate({0x2212: "-", 0x2013: "-"})


@pytest.fixture
def results():
    """Of two runs on the same images, and of one on others."""
    one, two, other = (made_up.evaluation(count=400, seed=seed)[0] for seed in range(3))
    return one, two, other | {"dataset": "other/1.0.0"}


@pytest.fixture
def folders(tmp_path, results):
    lines = [made_up.line(step, loss=2 / step) for step in range(1, 9)]
    config = {"seed": 1, "optim": {"name": "sgd", "learning_rate": 0.2, "momentum": None}}
    return [
        made_up.run(tmp_path / "runs" / "one", results[0]),
        made_up.run(tmp_path / "runs" / "two", results[1], lines, config),
        made_up.run(tmp_path / "other" / "two", results[2], lines=None),
        made_up.run(tmp_path / "runs" / "young", None, made_up.LINES[:3]),
    ]


def test_figures_side_by_side(tmp_path, folders, results, capsys):
    compare(folders, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    assert page.one("h1").text == "Comparison of 4 runs"
    assert page.one("p", class_="lead").text == "set/1.0.0, test split; other/1.0.0, test split"
    header, *rows = pages.table(page, "Figures of the runs")
    assert [plain(row[0]) for row in rows] == ["A one", "B runs/two", "C other/two", "D young"]
    a, b = (result["accuracy"] for result in results[:2])
    error = math.sqrt((a * (1 - a) + b * (1 - b)) / 400)
    difference = f"{100 * (b - a):+.2f} ± {100 * error:.2f}"
    assert [plain(row[header.index("minus A")]) for row in rows] == ["-", difference, "-", "-"]
    assert [plain(row[1]) for row in rows[:3]] == [f"{result['accuracy']:.2%}" for result in results]
    assert [plain(cell) for cell in rows[3][1:7]] == ["-"] * 6
    rates = [[plain(cell) for cell in row[7:]] for row in rows]
    assert rates == [["3", "1,018"], ["0.8", "1,004"], ["-", "-"], ["1.5", "1,010"]]
    for sentence in ("Not finished, as there is no eval.json: D.", "Evaluated on other images than A: C."):
        assert sentence in page.text
    printed = capsys.readouterr().out
    for part in (f"{a:.2%}".replace("%", " %"), "B  runs/two", difference, f"written: {tmp_path / 'page.html'}"):
        assert part in printed


def test_curves_of_all(tmp_path, folders):
    compare(folders, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    train = pages.curves(pages.figure(page, "Loss, train"))
    logged = [made_up.LINES[:6], [made_up.line(step, loss=2 / step) for step in range(1, 9)], made_up.LINES[:3]]
    for (piece,), lines in zip(train, logged, strict=True):
        np.testing.assert_allclose(piece[0], [line["epoch"] for line in lines], atol=2e-3)
        np.testing.assert_allclose(piece[1], [line["loss"] for line in lines], atol=1e-3)
    (held_out,) = pages.curves(pages.figure(page, "Accuracy, validation"))
    np.testing.assert_allclose(held_out[0][1], [0.5] * 3, atol=1e-3)
    legend = page.one("ul", class_="legend")
    assert [plain(item.text) for item in legend.all("li")] == ["A one", "B runs/two", "C other/two", "D young"]


def test_only_what_differs(tmp_path, folders):
    compare(folders[:2], tmp_path / "page.html")
    rows = pages.table(pages.read(tmp_path / "page.html"), "Fields that differ")
    assert rows == [
        ["field", "A", "B"],
        ["seed", "0", "1"],
        ["optim.learning_rate", "0.1", "0.2"],
        ["optim.momentum", "\u2013", "None"],
    ]
    compare([folders[0], folders[2]], tmp_path / "page.html")
    assert "every field has the same value" in pages.read(tmp_path / "page.html").text


def test_classes_side_by_side(tmp_path, folders, results):
    compare(folders, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    for title, column in (("Recall", "recall"), ("F1", "f1")):
        header, *rows = pages.table(page, f"{title} of each class")
        assert header == ["class", "A", "B", "C"]
        for row, name in zip(rows, results[0]["per_class"], strict=True):
            assert [plain(cell) for cell in row] == [
                name, *(f"{result['per_class'][name][column]:.2%}" for result in results)
            ]  # fmt: skip


def test_splits_that_differ_and_steps_that_were_skipped(tmp_path):
    lines = [made_up.line(step, split) for step in (1, 2) for split in ("train", "test")]
    lines[2] |= {"skipped_steps": 3, "loss": None}
    pair = [made_up.run(tmp_path / "a"), made_up.run(tmp_path / "b", lines=lines)]
    compare(pair, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    assert len(pages.curves(pages.figure(page, "Loss, held out"))) == 2
    assert "Held out are, A: validation; B: test." in page.text
    assert "B left out 3 steps" in page.text
    assert "None of the runs is finished." in page.text


def test_names_from_outside_are_text(tmp_path, capsys):
    result = made_up.evaluation(names=made_up.HOSTILE)[0] | {"dataset": made_up.HOSTILE[0]}
    lines = [made_up.line(step, split) for step in (1, 2) for split in ("train", made_up.HOSTILE[0])]
    config = {"seed": made_up.HOSTILE[0], made_up.HOSTILE[1]: "\ud800"}
    pair = [
        made_up.run(tmp_path / made_up.HOSTILE[3], result, lines, config),
        made_up.run(tmp_path / "b\x1b[31m", result),
    ]
    compare(pair, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    assert [row[0] for row in pages.table(page, "F1 of each class")[1:]] == list(made_up.HOSTILE)
    assert made_up.HOSTILE[3] in page.text
    assert "\x1b" not in capsys.readouterr().out


def test_many_runs_of_many_classes_fit(tmp_path):
    result = made_up.evaluation(classes=1000, count=2000, side=1)[0]
    lines = [made_up.line(step, split) for step in range(1, 601) for split in ("train", "test")]
    folders = [made_up.run(tmp_path / f"run {i}", result, lines) for i in range(5)]
    compare(folders, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    pages.read(tmp_path / "page.html")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "its config.json is damaged"),
        ("config.json", b"[]", "its config.json is damaged"),
        ("eval.json", b"\xff", "its eval.json is damaged"),
        ("eval.json", b"[" * 100_000, "its eval.json is damaged"),
        ("eval.json", b"[1]", "its eval.json is damaged"),
        ("eval.json", b"{}", "its eval.json is damaged"),
        ("eval.json", b'{"accuracy": NaN}', "its eval.json is damaged"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path, folders, name, content, message):
    (folders[0] / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        compare(folders[:2], tmp_path / "page.html")
    assert str(folders[0]) in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_what_is_no_comparison_is_refused(tmp_path, folders, monkeypatch):
    monkeypatch.chdir(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([folders[0]], "at least two"),
        ([folders[0], tmp_path / "nowhere"], "nowhere'.*holds no run"),
        ([tmp_path / "empty", folders[0]], "empty'.*holds no run"),
        ([folders[0], folders[1], folders[0].relative_to(tmp_path / "runs")], "'one'.*given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(paths, tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"--output=.*is a folder"):
        compare(folders, tmp_path / "empty")
