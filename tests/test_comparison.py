import json
import math
import re

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
    """Return the results of two runs on the same dataset and of one on another dataset."""
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


def test_table_of_metrics(tmp_path, folders, results, capsys):
    compare(folders, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    assert page.one("h1").text == "Comparison of 4 runs"
    assert page.one("p", class_="lead").text == "set/1.0.0, test split; other/1.0.0, test split"
    header, *rows = pages.table(page, "Metrics of the runs")
    assert [plain(row[0]) for row in rows] == ["A one", "B runs/two", "C other/two", "D young"]
    a, b = (result["accuracy"] for result in results[:2])
    error = math.sqrt((a * (1 - a) + b * (1 - b)) / 400)
    difference = f"{100 * (b - a):+.2f} ± {100 * error:.2f}"
    assert [plain(row[header.index("minus A")]) for row in rows] == ["-", difference, "-", "-"]
    assert [plain(row[1]) for row in rows[:3]] == [f"{result['accuracy']:.2%}" for result in results]
    assert [plain(cell) for cell in rows[3][1:7]] == ["-"] * 6
    rates = [[plain(cell) for cell in row[-2:]] for row in rows]
    assert rates == [["3", "1,018"], ["0.8", "1,004"], ["-", "-"], ["1.5", "1,010"]]
    for note in ("eval.json: D.", " A: C."):  # without a result; evaluated on other images
        assert note in page.text
    printed = capsys.readouterr().out
    for part in (f"{a:.2%}".replace("%", " %"), "B  runs/two", difference, str(tmp_path / "page.html")):
        assert part in printed


def test_means_over_classes_are_columns_which_older_results_lack(tmp_path, results):
    names = {"balanced accuracy": "balanced_accuracy", "macro F1": "macro_f1"}
    older = {name: value for name, value in results[1].items() if name not in names.values()}
    compare([made_up.run(tmp_path / "a", results[0]), made_up.run(tmp_path / "b", older)], tmp_path / "page.html")
    header, new, old = pages.table(pages.read(tmp_path / "page.html"), "Metrics of the runs")
    for title, name in names.items():
        assert header.count(title) == 1
        assert plain(new[header.index(title)]) == f"{results[0][name]:.2%}"
        assert plain(old[header.index(title)]) == "-"


def test_curves_of_all_runs(tmp_path, folders):
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


def test_table_of_fields_that_differ(tmp_path, folders):
    compare(folders[:2], tmp_path / "page.html")
    rows = pages.table(pages.read(tmp_path / "page.html"), "Fields that differ")
    assert rows == [
        ["field", "A", "B"],
        ["seed", "0", "1"],
        ["optim.learning_rate", "0.1", "0.2"],
        ["optim.momentum", "\u2013", "None"],
    ]
    compare([folders[0], folders[2]], tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    assert not list(page.one("section", id="config").all("table"))


def test_tables_of_classes(tmp_path, folders, results):
    compare(folders, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    for title, column in (("Recall", "recall"), ("F1", "f1")):
        header, *rows = pages.table(page, f"{title} of each class")
        assert header == ["class", "A", "B", "C"]
        for row, name in zip(rows, results[0]["per_class"], strict=True):
            assert [plain(cell) for cell in row] == [
                name, *(f"{result['per_class'][name][column]:.2%}" for result in results)
            ]  # fmt: skip


def test_different_splits_and_skipped_steps_are_noted(tmp_path):
    lines = [made_up.line(step, split) for step in (1, 2) for split in ("train", "test")]
    lines[2] |= {"skipped_steps": 3, "loss": None}
    pair = [made_up.run(tmp_path / "a"), made_up.run(tmp_path / "b", lines=lines)]
    compare(pair, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    assert len(pages.curves(pages.figure(page, "Loss, held out"))) == 2
    assert "A: validation; B: test" in page.text
    assert re.search(r"\bB\b[^.]* 3 steps", page.text)
    assert not list(page.one("section", id="classes").all("table"))


def test_names_are_escaped(tmp_path, capsys):
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


def test_page_of_many_runs_and_classes_is_small(tmp_path):
    result = made_up.evaluation(classes=1000, count=2000, side=1)[0]
    lines = [made_up.line(step, split) for step in range(1, 601) for split in ("train", "test")]
    folders = [made_up.run(tmp_path / f"run {i}", result, lines) for i in range(5)]
    compare(folders, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    pages.read(tmp_path / "page.html")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json.*damaged"),
        ("config.json", b"[]", r"config\.json.*damaged"),
        ("eval.json", b"\xff", r"eval\.json.*damaged"),
        ("eval.json", b"[" * 100_000, r"eval\.json.*damaged"),
        ("eval.json", b"[1]", r"eval\.json.*damaged"),
        ("eval.json", b"{}", r"eval\.json.*damaged"),
        ("eval.json", b'{"accuracy": NaN}', r"eval\.json.*damaged"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path, folders, name, content, message):
    (folders[0] / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        compare(folders[:2], tmp_path / "page.html")
    assert str(folders[0]) in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_invalid_paths_are_refused(tmp_path, folders, monkeypatch):
    monkeypatch.chdir(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([folders[0]], r"^PATH=.*\btwo\b"),
        ([folders[0], tmp_path / "nowhere"], r"^PATH='.*nowhere'"),
        ([tmp_path / "empty", folders[0]], r"^PATH='.*empty'"),
        ([folders[0], folders[1], folders[0].relative_to(tmp_path / "runs")], r"^PATH='one': .*twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(paths, tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"^--output=.*folder"):
        compare(folders, tmp_path / "empty")


def test_runs_on_other_data_are_neither_averaged_nor_compared_by_p_values(tmp_path, capsys):
    results = [made_up.evaluation(seed=seed)[0] for seed in range(4)]
    runs = []
    for seed, (folder, result) in enumerate(zip(("cats", "cats", "cars", "cars"), results, strict=True)):
        config = {"seed": seed, "data": {"folder": folder}}
        runs.append(made_up.run(tmp_path / f"{folder}{seed}", result | {"dataset": folder}, config=config))
    compare(runs, tmp_path / "page.html")
    page = pages.read(tmp_path / "page.html")
    assert [row[1] for row in pages.table(page, "Metrics of the runs")[1:]] == ["2", "2"]
    assert "only one setting with a finished run" in page.one("section", id="differences").text
    assert "Not evaluated on the same images as A: B." in capsys.readouterr().out
    compare([runs[0], runs[2]], tmp_path / "page.html")  # equal settings but for the data and the seed
    assert page.one("h1").text == "Comparison of 2 settings, 4 runs"


@pytest.mark.parametrize(("settings", "shown"), [(5, None), (6, "10 of 15 pairs are listed")])
def test_the_terminal_lists_ten_pairs(tmp_path, capsys, settings, shown):
    runs = []
    for number in range(2 * settings):
        config = {"seed": number // settings, "optim": {"momentum": number % settings}}
        runs.append(made_up.run(tmp_path / f"run{number}", made_up.evaluation(seed=number)[0], config=config))
    compare(runs, tmp_path / "page.html")
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ +[A-F] - [A-F] ", printed, re.MULTILINE)) == 10
    assert (shown in printed) if shown else ("pairs are listed" not in printed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("study.json", "[1]"),
        ("study.json", "{"),
        ("study.json", '{"on_test": false, "settings": [{"name": 5, "values": {}, "trials": []}]}'),
        ("study.json", '{"on_test": false, "settings": [{"name": "a", "values": {}, "trials": [{"name": "../b"}]}]}'),
        ("trial.json", "{"),
        ("trial.json", '{"a": 1}'),
        ("trial.json", '{"status": "done"}'),
        ("trial.json", '{"status": "finished", "operations": "many"}'),
        ("trial.json", '{"status": "finished", "validation": 5}'),
    ],
)
def test_damaged_files_are_reported(tmp_path, name, content):
    folder = tmp_path / "study"
    trial = folder / "runs" / "tiny_seed0"
    trial.mkdir(parents=True)
    (trial / "config.json").write_text('{"seed": 0}')
    (folder / "study.json").write_text(
        json.dumps({"on_test": False, "settings": [{"name": "tiny", "values": {}, "trials": [{"name": "tiny_seed0"}]}]})
    )
    (folder / name if name == "study.json" else trial / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"^PATH='.*': its {re.escape(name)} is damaged; remove"):
        compare([folder], None)
