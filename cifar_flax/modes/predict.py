"""Image files -> their classes: a table for people, or a file for programs."""

import csv
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from cifar_flax import files, packages
from cifar_flax.classifier import Classifier
from cifar_flax.config import Config
from cifar_flax.data.images import read_image, reading
from cifar_flax.errors import UserError, require
from cifar_flax.report import confusion as confusion_matrix
from cifar_flax.restore import restore
from cifar_flax.telemetry.console import printable, show

_RUNNERS_UP = 2


@dataclass(frozen=True, slots=True)
class Found:
    """A file to classify, and the class that its folder says it is of."""

    path: Path
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    found: Found
    probabilities: Float32[np.ndarray, " classes"] | None = None
    error: str = ""  # why there are none


def predict(config: Config, workdir: Path, paths: Sequence[Path], output: Path | None) -> None:
    """Classifies the image files among `paths` and in the folders among them; prints a table or writes `output`.

    Files in a folder that has the name of a class, inside one of `paths`, are taken to be of it: then accuracy and
    confusion matrix are told too.

    Raises `ConfigError` for an `output` of another kind than .csv, .json and .jsonl, `UserError` at the end if some of
    the files could not be classified.
    """
    if output is not None:
        require(output.suffix in _FORMATS, "--output", str(output), f"must end with {', '.join(_FORMATS)}")
        require(output.parent.is_dir(), "--output", str(output), "its folder does not exist")
    packages.require(["pillow"], "image files cannot be read")
    run = restore(config, workdir)
    model, begin = Classifier(run), time.perf_counter()
    found = list(find(paths, model.class_names))
    widths = max((len(_name(one)) for one in found), default=4), max(map(len, ("class", *model.class_names)))
    if output is None:
        show(f"{'file':{widths[0]}}  {'class':{widths[1]}}  probability  runners-up")
    predictions = []
    for prediction in classify(model, found):
        predictions.append(prediction)
        if output is None:
            show(_row(prediction, model.class_names, widths))
    if output is not None:
        about = {"workdir": str(workdir), "step": run.step, "dataset": run.info.name}
        files.replace(output, _FORMATS[output.suffix](about, predictions, model.class_names))
    seconds, failed = time.perf_counter() - begin, [one for one in predictions if one.error]
    if score := _score(predictions, model.class_names):
        show(_score_text(score, model.class_names))
    if output is not None:
        show(f"{len(predictions) - len(failed):,} files classified in {seconds:.1f} s; written: {output}")
    for one in failed if output is not None else ():
        show(f"{_name(one.found)}: {one.error}")
    if failed:
        raise UserError(f"{len(failed):,} of {len(predictions):,} files could not be classified")


def find(paths: Sequence[Path], class_names: Sequence[str]) -> Iterator[Found]:
    """The files among `paths` and, in order of their names, all in and below the folders among them but hidden ones.

    The class of a file is that of the folder right below the one among `paths`, or of this one itself.
    """
    classes = {name.casefold(): name for name in class_names}
    for path in paths:
        if not path.is_dir():
            yield Found(path)
            continue
        is_empty = True
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith("."):
                    is_empty, below = False, Path(folder).relative_to(path).parts[:1]
                    labels = [
                        classes[one.casefold()] for one in (*below, path.resolve().name) if one.casefold() in classes
                    ]
                    yield Found(Path(folder) / name, labels[0] if labels else None)
        if is_empty:
            yield Found(path)  # to be told


def classify(model: Classifier, found: Sequence[Found]) -> Iterator[Prediction]:
    """A prediction for each, in order; files are decoded by as many threads as there are cores."""

    def read(one: Found) -> UInt8[np.ndarray, "height width channels"] | UserError:
        try:
            return read_image(one.path, model.image_shape)
        except UserError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool, reading():
        for start in range(0, len(found), model.batch_size):
            some = found[start : start + model.batch_size]
            contents = list(pool.map(read, some))
            images = [content for content in contents if isinstance(content, np.ndarray)]
            rows = iter(model.predict(np.stack(images)) if images else ())
            for one, content in zip(some, contents, strict=True):
                if isinstance(content, UserError):
                    yield Prediction(one, error=str(content))
                else:
                    yield Prediction(one, next(rows))


def _name(found: Found) -> str:
    return printable(str(found.path))


def _row(prediction: Prediction, class_names: Sequence[str], widths: tuple[int, int]) -> str:
    name = f"{_name(prediction.found):{widths[0]}}"
    if prediction.probabilities is None:
        return f"{name}  not classified: {prediction.error}"
    order = np.argsort(-prediction.probabilities, kind="stable")[: 1 + _RUNNERS_UP]
    first, *others = [(class_names[i], float(prediction.probabilities[i])) for i in order]
    runners_up = ", ".join(f"{name} {value:.2%}" for name, value in others)
    return f"{name}  {first[0]:{widths[1]}}  {first[1]:11.2%}  {runners_up}"


def _fields(prediction: Prediction, class_names: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"file": str(prediction.found.path), "label": prediction.found.label}
    if prediction.probabilities is None:
        return fields | {"error": prediction.error}
    best = int(np.argmax(prediction.probabilities))
    values = prediction.probabilities.tolist()
    return fields | {
        "class": class_names[best],
        "probability": values[best],
        "probabilities": dict(zip(class_names, values, strict=True)),
    }


def _csv(about: dict[str, Any], predictions: Sequence[Prediction], class_names: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", "label", "error", *(f"p({name})" for name in class_names)])
    for prediction in predictions:
        row = _fields(prediction, class_names)
        named = [row.get(name) for name in ("file", "class", "probability", "label", "error")]
        writer.writerow([*named, *row.get("probabilities", dict.fromkeys(class_names)).values()])
    return text.getvalue().encode(errors="surrogateescape")  # names of files are bytes


def _jsonl(about: dict[str, Any], predictions: Sequence[Prediction], class_names: Sequence[str]) -> bytes:
    return "".join(f"{json.dumps(_fields(one, class_names))}\n" for one in predictions).encode()


def _json(about: dict[str, Any], predictions: Sequence[Prediction], class_names: Sequence[str]) -> bytes:
    score = _score(predictions, class_names)
    rows = [_fields(one, class_names) for one in predictions]
    return json.dumps(about | {"class_names": class_names} | score | {"predictions": rows}).encode()


_FORMATS = {".csv": _csv, ".json": _json, ".jsonl": _jsonl}


def _score(predictions: Sequence[Prediction], class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracy and confusion matrix (rows: true classes) over the files of a known class; empty if there are none."""
    confusion = np.zeros((len(class_names),) * 2, int)
    for one in predictions:
        if one.found.label is not None and one.probabilities is not None:
            confusion[class_names.index(one.found.label), np.argmax(one.probabilities)] += 1
    count = int(confusion.sum())
    if not count:
        return {}
    accuracy = int(np.trace(confusion)) / count
    return {"num_labelled": count, "accuracy": accuracy, "confusion_matrix": confusion.tolist()}


def _score_text(score: dict[str, Any], class_names: Sequence[str]) -> str:
    count, confusion = score["num_labelled"], np.asarray(score["confusion_matrix"])
    correct = f"{score['accuracy']:.2%} ({np.trace(confusion):,} of {count:,} in folders named after classes)"
    lines = [f"\naccuracy {correct}\n"]
    if len(class_names) <= confusion_matrix.FEW_CLASSES:
        lines += [*confusion_matrix.text_lines(confusion, class_names), ""]
    return "\n".join(lines)
