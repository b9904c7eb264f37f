"""--mode=compare: write an HTML page that compares several runs, means over their seeds, or the settings of a study."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cifar_flax import files
from cifar_flax.errors import require
from cifar_flax.report import comparison, groups, page, results
from cifar_flax.report.groups import Group, Run
from cifar_flax.report.log import read_log
from cifar_flax.report.page import element, join
from cifar_flax.report.statistics import Difference
from cifar_flax.runtime.streams import printable, show
from cifar_flax.study import contents
from cifar_flax.study.record import FINISHED, ON_TEST, RUNS, STUDY, Plan, read_plan, read_record, write_results

# These settings only locate the data. Runs with another data.folder or data.archive have other data.
_PLACES = ("data.data_dir", "data.cache_dir", "data.source", "data.cache")
_PRINTED = 10  # most pairs of settings that the terminal shows


def compare(workdirs: Sequence[Path], output: Path | None, *, on_test: bool = False) -> None:
    """Write an HTML page that compares the runs and studies in `workdirs`, and print their accuracies.

    Runs that differ only in the seed are averaged. A study is compared on the split of its study.json, or with
    `on_test` on the evaluation split. The page is `output`, by default study.html in the folder of a single study
    (study_on_test.html if its study.json has another split), otherwise comparison.html.

    Raise `ConfigError` if there are fewer than two folders and no study, if one holds no run or is listed twice, or if
    `output` is not an HTML file; raise `OSError` if `output` cannot be written.
    """
    plans = {workdir: plan for workdir in workdirs if (plan := read_plan(workdir)) is not None}
    plan = plans.get(workdirs[0]) if len(workdirs) == 1 else None
    is_other_split = plan is not None and on_test and not plan.on_test
    content = (workdirs[0] / (ON_TEST if is_other_split else STUDY)) if plan is not None else None
    if output is None:
        output = content.with_suffix(".html") if content is not None else Path("comparison.html")
    require(not output.is_dir(), "--output", str(output), "is a folder; name a file")
    require(output.suffix in (".html", ".htm"), "--output", str(output), "must end with .html")
    listed = " ".join(map(str, workdirs))
    require(len(workdirs) >= 2 or bool(plans), "PATH", listed, "must be a study, or at least two folders of runs")
    resolved = [workdir.resolve() for workdir in workdirs]
    for i, workdir in enumerate(workdirs):
        require(resolved[i] not in resolved[:i], "PATH", str(workdir), "is listed twice")
        fits = workdir in plans or (workdir / "config.json").exists()
        require(fits, "PATH", str(workdir), "holds neither a run nor a study")
    uses_validation = len(plans) == len(workdirs) and not (on_test or any(plan.on_test for plan in plans.values()))
    found = [_read(*trial, uses_validation) for workdir in workdirs for trial in _trials(workdir, plans.get(workdir))]
    require(bool(found), "PATH", listed, "no trial of this study has started yet")
    compared = _grouped(found, are_studies=len(plans) == len(workdirs))
    pairs = groups.all_differences(compared) if groups.have_seeds(compared) else []
    title = f"Comparison of {len(found)} runs"
    if groups.have_seeds(compared):
        title = f"Comparison of {len(compared)} settings, {len(found)} runs"
    head = join([element("h1", title), element("p", _lead(compared, uses_validation, bool(plans)), class_="lead")])
    page.write(output, title, head, comparison.sections(compared, pairs, output))
    written = [str(output)]
    if plan is not None and content is not None:
        if is_other_split:
            files.write_json(content, contents.study(compared, pairs, dataclasses.replace(plan, on_test=True)))
        else:
            write_results(workdirs[0], contents.study(compared, pairs, plan))
        written.append(str(content))
    show("\n".join([*_lines(compared, pairs), "", f"written: {printable(', '.join(written))}"]))


def _trials(workdir: Path, plan: Plan | None) -> Iterator[tuple[Path, str]]:
    """Yield the folders of the runs in `workdir`: itself or, of a study, those of the trials that have begun.

    The setting of a trial is yielded with it, otherwise "".
    """
    if plan is None:
        yield workdir, ""
        return
    for setting, names in plan.settings.items():
        for name in names:
            if ((folder := workdir / RUNS / name) / "config.json").exists():
                yield folder, setting


def _read(folder: Path, setting: str, uses_validation: bool) -> Run:
    settings, record = _settings(folder), read_record(folder)
    log = read_log(folder / "metrics.jsonl")
    result: results.Result | None
    if uses_validation:
        result = record.validation if record else None
        require(result is None or results.is_result(result), "PATH", str(folder), "its trial.json is damaged")
    else:
        result = results.read_result(folder)
    batch_size = settings.get("train.batch_size", "")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        seed=settings.get("seed", ""),
        setting=setting,
        settings=settings,
        log=log,
        result=result if record is None or record.status == FINISHED else None,
        status=record.status if record else (FINISHED if result and not setting else groups.UNFINISHED),
        seconds=results.training_seconds(log, int(batch_size)) if batch_size.isdecimal() else None,
        operations=record.operations if record else None,
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
        key: Any = (run.folder.parent, run.setting)
        if not run.setting:
            tta = run.result.get("tta", "none") if run.result else run.settings.get("eval.tta", "none")
            key = tta, frozenset((path, value) for path, value in run.settings.items() if _matters(path))
        seen[key, run.seed] += 1  # another run with the same seed is of another group
        found.setdefault((key, seen[key, run.seed]), []).append(dataclasses.replace(run, name=name))
    compared = [Group("", _group_name(members), tuple(members)) for members in found.values()]
    if are_studies:
        means = {id(group): mean.mean if (mean := group.metric("accuracy")) else -1.0 for group in compared}
        compared.sort(key=lambda group: means[id(group)], reverse=True)
    return groups.keyed(compared)


def _matters(path: str) -> bool:
    """Return whether runs that differ in the setting `path` are of different groups."""
    return path not in ("seed", *_PLACES) and not path.startswith("parallel.")


def _names(folders: Sequence[Path]) -> list[str]:
    """Return for each path the shortest trailing part that is unique."""
    found = []
    for folder in folders:
        parts = folder.parts
        ends = (parts[-length:] for length in range(1, len(parts) + 1))
        end = next(end for end in ends if sum(other.parts[-len(end) :] == end for other in folders) == 1)
        found.append(str(Path(*end)))
    return found


def _group_name(members: Sequence[Run]) -> str:
    """Return the setting of trials, the name of a single run, or how the names of runs begin, without the seed."""
    names = [run.name for run in members]
    if len(names) == 1 or members[0].setting:
        return members[0].setting or names[0]
    shared = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in shared)
    return re.sub(r"[\W_]*(seed)?[\W_]*$", "", prefix) or f"{names[0]}, ..."


def _lead(compared: Sequence[Group], uses_validation: bool, is_study: bool) -> str:
    found = [group.result for group in compared if group.result]
    splits = "; ".join(dict.fromkeys(f"{result['dataset']}, {result['split']} split" for result in found))
    if not is_study or not splits:
        return splits or "No run is finished."
    if uses_validation:
        return (
            f"{splits}. Settings are compared on the validation split, not on the test split, and may be chosen by it."
        )
    return (
        f"{splits}. Settings are compared on the split for the final evaluation (--on-test): do not choose one by it."
    )


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
        if len(pairs) > 1:
            lines.append(f"  intervals and p-values are corrected for {len(pairs):,} comparisons (Bonferroni)")
        if len(pairs) > len(shown):
            lines.append(f"  {len(shown)} of {len(pairs):,} pairs are listed")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("\u202f", " ").replace("\u2212", "-") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
