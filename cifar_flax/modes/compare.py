"""--mode=compare: write an HTML page that compares several runs, means over their seeds, or the settings of a study."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_flax import files
from cifar_flax.config import LOCATIONS
from cifar_flax.errors import require
from cifar_flax.report import comparison, groups, page, results
from cifar_flax.report.groups import Group, Run
from cifar_flax.report.log import read_log
from cifar_flax.report.page import element, join
from cifar_flax.report.statistics import LEVEL, Difference
from cifar_flax.runtime.streams import printable, show
from cifar_flax.study.record import FINISHED, RUNS, STUDY, Plan, read_plan, read_record

_PRINTED = 10  # most pairs of settings that the terminal shows
VALIDATION = "validation"


def compare(workdirs: Sequence[Path], output: Path | None, *, on_test: bool = False) -> None:
    """Write an HTML page that compares the runs and studies in `workdirs`, and print their accuracies.

    Runs that differ only in the seed are averaged. A study is compared on the split of its study.json, or with
    `on_test` on the evaluation split. The page is `output`, by default study.html in the folder of a single study,
    otherwise comparison.html.

    Raise `ConfigError` if there are fewer than two folders and no study, if one holds no run or is listed twice, or if
    `output` is not an HTML file; raise `OSError` if `output` cannot be written.
    """
    plans = {workdir: plan for workdir in workdirs if (plan := read_plan(workdir)) is not None}
    if output is None:
        output = workdirs[0] / "study.html" if len(workdirs) == 1 and plans else Path("comparison.html")
    require(not output.is_dir(), "--output", str(output), "is a folder; name a file")
    require(output.suffix in (".html", ".htm"), "--output", str(output), "must end with .html")
    listed = " ".join(map(str, workdirs))
    require(len(workdirs) >= 2 or bool(plans), "PATH", listed, "must be a study, or at least two folders of runs")
    resolved = [workdir.resolve() for workdir in workdirs]
    for i, workdir in enumerate(workdirs):
        require(resolved[i] not in resolved[:i], "PATH", str(workdir), "is listed twice")
        fits = workdir in plans or (workdir / "config.json").exists()
        require(fits, "PATH", str(workdir), "holds neither a run nor a study")
    is_validation = len(plans) == len(workdirs) and not on_test
    is_validation = is_validation and all(plan.split == VALIDATION for plan in plans.values())
    folders = [folder for workdir in workdirs for folder in _trials(workdir, plans.get(workdir))]
    compared = _grouped([_read(folder, is_validation) for folder in folders], are_studies=len(plans) == len(workdirs))
    pairs = groups.all_differences(compared) if groups.have_seeds(compared) else []
    count = sum(len(group.runs) for group in compared)
    title = f"Comparison of {count} runs"
    if groups.have_seeds(compared):
        title = f"Comparison of {len(compared)} settings, {count} runs"
    head = join([element("h1", title), element("p", _lead(compared, is_validation, bool(plans)), class_="lead")])
    page.write(output, title, head, comparison.sections(compared, pairs, output))
    written = [str(output)]
    if len(workdirs) == 1:
        plan = dataclasses.replace(plans[workdirs[0]], split=VALIDATION if is_validation else "test")
        files.write_json(workdirs[0] / STUDY, _content(compared, pairs, plan))
        written.append(str(workdirs[0] / STUDY))
    show("\n".join([*_lines(compared, pairs), "", f"written: {printable(', '.join(written))}"]))


def _trials(workdir: Path, plan: Plan | None) -> list[Path]:
    """Return the folders of the runs in `workdir`: itself or, of a study, those of the trials that have begun."""
    if plan is None:
        return [workdir]
    names = [name for names in plan.settings.values() for name in names]
    return [folder for name in names if ((folder := workdir / RUNS / name) / "config.json").exists()]


def _read(folder: Path, is_validation: bool) -> Run:
    settings, record = _settings(folder), read_record(folder)
    log = read_log(folder / "metrics.jsonl")
    result: results.Result | None
    if is_validation:
        result = record.validation if record else None
        require(result is None or results.is_result(result), "PATH", str(folder), "its trial.json is damaged")
    else:
        result = results.read_result(folder)
    batch_size = settings.get("train.batch_size", "")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        seed=settings.get("seed", ""),
        settings=settings,
        log=log,
        result=result if record is None or record.status == FINISHED else None,
        status=record.status if record else (FINISHED if result else groups.UNFINISHED),
        seconds=results.training_seconds(log, int(batch_size)) if batch_size.isdecimal() else None,
        operations=record.operations if record else None,
        is_trial=record is not None,
    )


def _settings(workdir: Path) -> dict[str, str]:
    try:
        config = files.read_json(workdir / "config.json")
    except ValueError:
        config = None
    require(isinstance(config, dict), "PATH", str(workdir), "its config.json is damaged")
    return results.settings(config)


def _grouped(runs: Sequence[Run], *, are_studies: bool) -> list[Group]:
    """Return `runs` in groups of equal settings and different seeds; those of studies with the most accurate first."""
    names = _names([run.folder.resolve() for run in runs])
    seen: Counter[Any] = Counter()
    found: dict[Any, list[Run]] = {}
    for run, name in zip(runs, names, strict=True):
        key = frozenset((path, value) for path, value in run.settings.items() if _matters(path))
        seen[key, run.seed] += 1  # another run with the same seed is of another group
        found.setdefault((key, seen[key, run.seed]), []).append(dataclasses.replace(run, name=name))
    compared = [Group("", _common([run.name for run in members]), tuple(members)) for members in found.values()]
    if are_studies:
        compared = [dataclasses.replace(group, name=re.sub(r"_seed\d+$", "", group.name)) for group in compared]
        means = {id(group): mean.mean if (mean := group.metric("accuracy")) else -1.0 for group in compared}
        compared.sort(key=lambda group: means[id(group)], reverse=True)
    return groups.keyed(compared)


def _matters(path: str) -> bool:
    """Return whether runs that differ in the setting `path` are of different groups."""
    return path != "seed" and path not in LOCATIONS and not path.startswith("parallel.")


def _names(folders: Sequence[Path]) -> list[str]:
    """Return for each path the shortest trailing part that is unique."""
    found = []
    for folder in folders:
        parts = folder.parts
        ends = (parts[-length:] for length in range(1, len(parts) + 1))
        end = next(end for end in ends if sum(other.parts[-len(end) :] == end for other in folders) == 1)
        found.append(str(Path(*end)))
    return found


def _common(names: Sequence[str]) -> str:
    """Return the name of a group of runs: that of a single run, or what their names begin with, without the seed."""
    if len(names) == 1:
        return names[0]
    shared = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in shared)
    return re.sub(r"[\W_]*(seed)?[\W_]*$", "", prefix) or f"{names[0]}, ..."


def _lead(compared: Sequence[Group], is_validation: bool, is_study: bool) -> str:
    found = [group.result for group in compared if group.result]
    splits = dict.fromkeys(f"{result['dataset']}, {result['split']} split" for result in found)
    sentences = [f"{'; '.join(splits)}." if splits else "No run is finished."]
    if is_validation:
        sentences.append(
            "Settings are compared on the validation split, not on the test split, and may be chosen by it."
        )
    elif is_study:
        sentences.append("Settings are compared on the test split: do not choose one by it.")
    return " ".join(sentences) if is_study else sentences[0].removesuffix("." if splits else "")


def _content(compared: Sequence[Group], pairs: Sequence[Difference], plan: Plan) -> dict[str, Any]:
    """Return the content of study.json: the plan, and all numbers of the page, each with its split."""
    by_trial = {run.folder.name: (group, run) for group in compared for run in group.runs}
    settings, names = [], {}
    for name, trials in plan.settings.items():
        group = next((by_trial[trial][0] for trial in trials if trial in by_trial), None)
        content: dict[str, Any] = {"name": name, "values": plan.values[name]}
        if group is not None and group.result is not None:
            split = group.result["split"]
            content |= {"key": group.key, "dataset": group.result["dataset"], "split": split}
            for metric in ("accuracy", "loss", "expected_calibration_error"):
                if mean := group.metric(metric):
                    content[metric] = {"split": split, **dataclasses.asdict(mean)}
            for field, values in (
                ("operations", group.values(lambda run: run.operations)),
                ("training_seconds", group.values(lambda run: run.seconds)),
            ):
                content[field] = sum(values) / len(values) if values else None
        content["trials"] = [_trial(trial, by_trial.get(trial, (None, None))[1]) for trial in trials]
        settings.append(content)
        if group is not None:
            names[group.key] = name
    compared_pairs = [
        dataclasses.asdict(pair) | {"first": names[pair.first], "second": names[pair.second], "split": plan.split}
        for pair in pairs
    ]
    return {
        "split": plan.split,
        "confidence": LEVEL,
        "correction": f"Bonferroni, {len(pairs)} comparisons",
        "settings": settings,
        "differences": compared_pairs,
    }


def _trial(name: str, run: Run | None) -> dict[str, Any]:
    if run is None:
        return {"name": name, "status": "not started"}
    result: Mapping[str, Any] = run.result or {}
    return {
        "name": name,
        "seed": int(run.seed),
        "status": run.status,
        "split": result.get("split"),
        "accuracy": result.get("accuracy"),
        "loss": result.get("loss"),
        "operations": run.operations,
        "training_seconds": run.seconds,
    }


def _lines(compared: Sequence[Group], pairs: Sequence[Difference]) -> list[str]:
    """Return the tables of accuracies and of differences for the terminal."""
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    if groups.have_seeds(compared):
        header = ("", "setting", "seeds", "accuracy", "std", "95 % interval", "operations", "time")
        rows = [
            (
                group.key, printable(group.name), str(len(group.finished)),
                *comparison.mean_accuracy(group.metric("accuracy")),
                comparison.operations(group), comparison.training_time(group),
            )
            for group in compared
        ]  # fmt: skip
    else:
        header = ("", "run", "accuracy", "95 % interval", f"minus {compared[0].key}")
        rows = [
            (group.key, printable(group.name), *comparison.single_accuracy(group, compared[0])) for group in compared
        ]
    lines = [*_table(header, rows), *comparison.remarks(compared)]
    shown = comparison.listed(compared, pairs)[:_PRINTED]
    if shown:
        header = ("", "settings", "points", "95 % interval", "p", "method", "more seeds for 0.1 points")
        lines += ["", *_table(header, [("", *comparison.difference_cells(pair)) for pair in shown])]
        lines.append(f"  intervals and p-values are corrected for {len(pairs):,} comparisons (Bonferroni)")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("\u202f", " ").replace("\u2212", "-") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
