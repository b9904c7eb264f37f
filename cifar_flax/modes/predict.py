"""--mode=predict: classify image files; print a table, or write a .csv, .json or .jsonl file."""

import csv
import dataclasses
import io
import json
import os
import time
import unicodedata
import warnings
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
from cifar_flax.data.images import read_image
from cifar_flax.data.info import DatasetInfo
from cifar_flax.data.search import files_below
from cifar_flax.errors import UserError, require
from cifar_flax.report import confusion as confusion_matrix
from cifar_flax.restore import restore
from cifar_flax.runtime.environment import usable_cores
from cifar_flax.runtime.streams import printable, show

_FORMATS = (".csv", ".json", ".jsonl")
_RUNNERS_UP = 2
_FAR = 0.75  # standard deviations


@dataclass(frozen=True, slots=True)
class Prediction:
    """A file to classify, and the result if there is one; or a folder that cannot be searched, and the reason."""

    path: Path
    label: str | None = None  # class that the folder of the file is named after
    probabilities: Float32[np.ndarray, " classes"] | None = None
    mean: float = 0.0  # mean of the pixels that were classified
    error: str = ""  # reason if there are no probabilities


def predict(config: Config, workdir: Path, paths: Sequence[Path], output: Path | None) -> None:
    """Classify the image files in `paths`, which may be files and folders; print a table or write `output`.

    Files in folders named after classes count as labelled: also print their accuracy and confusion matrix.

    Raise `ConfigError` if `output` is not .csv, .json or .jsonl, and `UserError` at the end if some files could not be
    classified or some folders not be searched.
    """
    if output is not None:
        require(output.suffix in _FORMATS, "--output", str(output), f"must end with {', '.join(_FORMATS)}")
        require(output.parent.is_dir(), "--output", str(output), "its folder does not exist")
        require(not output.is_dir(), "--output", str(output), "is a folder; name a file")
    packages.load("pillow")  # before anything is compiled
    run = restore(config, workdir)
    model, start = Classifier(run), time.perf_counter()
    found = list(find(paths, model.class_names))
    widths = max((len(_name(one)) for one in found), default=4), max(map(len, ("class", *model.class_names)))
    if output is None:
        show(f"{'file':{widths[0]}}  {'class':{widths[1]}}  probability  runners-up")
    predictions = []
    for prediction in classify(model, found):
        predictions.append(prediction)
        if output is None:
            show(_row(prediction, model.class_names, widths))
    failed = [one for one in predictions if one.error]
    score = _score(predictions, model.class_names)
    if output is not None:
        about = {"workdir": str(workdir), "step": run.step, "dataset": run.info.name}
        about |= {"class_names": model.class_names} | score
        rows = [_fields(prediction, model.class_names) for prediction in predictions]
        files.replace(output, _content(output.suffix, about, rows))
    if score:
        confusion = np.asarray(score["confusion_matrix"])
        labelled = f"{np.trace(confusion):,} of {score['num_labelled']:,} in folders named after classes"
        show(f"\naccuracy {score['accuracy']:.2%} ({labelled})\n")
        if len(confusion) <= confusion_matrix.FEW_CLASSES:
            show("\n".join([*confusion_matrix.text_lines(confusion, model.class_names), ""]))
    if hint := _inverted([one.mean for one in predictions if not one.error], run.info):
        show(hint)
    if output is not None:
        seconds = time.perf_counter() - start
        show(f"{len(predictions) - len(failed):,} files classified in {seconds:.1f} s; written: {output}")
        for one in failed:
            show(f"{_name(one)}: {one.error}")
    if failed:
        raise UserError(f"{len(failed):,} of {len(predictions):,} paths could not be classified")


def find(paths: Sequence[Path], class_names: Sequence[str]) -> Iterator[Prediction]:
    """Yield the files to classify: files in `paths`, and the sorted files below folders in `paths`, except hidden ones.

    The label of a file below a folder in `paths` is the class that its top-level subfolder is named after, or else the
    class that the folder itself is named after. Links count under their own names.
    """
    classes = {name.casefold(): name for name in class_names}
    exact = set(class_names)  # two classes may differ in case only
    for path in paths:
        folder = os.path.basename(os.path.abspath(path))
        for file, error in list(files_below(path)) or [(path, "is a folder without files")]:
            entry = file.relative_to(path)
            # Class names are in NFC; file systems differ in the Unicode form of the same name.
            names = [unicodedata.normalize("NFC", name) for name in (*entry.parent.parts[:1], folder)]
            labels = [name if name in exact else classes.get(name.casefold()) for name in names]
            yield Prediction(file, next(filter(None, labels), None) if entry.parts else None, error=error)


def classify(model: Classifier, found: Sequence[Prediction]) -> Iterator[Prediction]:
    """Yield the results for `found`, in order. Files are decoded in one thread per CPU core."""

    def read(one: Prediction) -> UInt8[np.ndarray, "height width channels"] | str:
        try:
            return one.error or read_image(one.path, model.image_shape)
        except UserError as error:
            return str(error)  # the exception itself refers to the memory of the image

    for start in range(0, len(found), model.batch_size):
        batch = found[start : start + model.batch_size]
        with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(usable_cores()) as pool:
            contents = list(pool.map(read, batch))
        images = [content for content in contents if isinstance(content, np.ndarray)]
        rows = iter(model.predict(np.stack(images)) if images else ())
        for one, content in zip(batch, contents, strict=True):
            if isinstance(content, str):
                yield dataclasses.replace(one, error=content)
            else:
                yield dataclasses.replace(one, probabilities=next(rows), mean=float(content.mean()))


def _inverted(means: Sequence[float], info: DatasetInfo) -> str:
    """Return a hint if images with these mean pixels look like inverted training images, or "" if not.

    Their mean must be closer to the inverted mean of the training images than to the mean itself, by more than `_FAR`
    standard deviations. That of photos never is: inverting CIFAR-10 changes its mean by 0.2 standard deviations.
    """
    trained, std = float(np.mean(info.mean)), float(np.mean(info.std))
    found = float(np.mean(means)) if means else trained
    if not trained or abs(found - trained) - abs(found - (255 - trained)) <= _FAR * std:  # 0: normalization "unit"
        return ""
    return f"hint: dark and light may be swapped (mean pixel {found:.0f}, in the training images {trained:.0f})"


def _name(file: Prediction) -> str:
    return printable(str(file.path))


def _row(prediction: Prediction, class_names: Sequence[str], widths: tuple[int, int]) -> str:
    name, probabilities = f"{_name(prediction):{widths[0]}}", prediction.probabilities
    if probabilities is None:
        return f"{name}  not classified: {prediction.error}"
    best, *others = np.argsort(-probabilities, kind="stable")[: 1 + _RUNNERS_UP]
    runners_up = ", ".join(f"{class_names[i]} {probabilities[i]:.2%}" for i in others)
    return f"{name}  {class_names[best]:{widths[1]}}  {probabilities[best]:11.2%}  {runners_up}"


def _fields(prediction: Prediction, class_names: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"file": str(prediction.path), "label": prediction.label}
    if prediction.probabilities is None:
        return fields | {"error": prediction.error}
    values = dict(zip(class_names, prediction.probabilities.tolist(), strict=True))
    best = max(class_names, key=values.__getitem__)
    return fields | {"class": best, "probability": values[best], "probabilities": values}


def _content(suffix: str, about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bytes:
    """Return the content of an output file; `suffix` is one of `_FORMATS`."""
    if suffix == ".json":
        return json.dumps(about | {"predictions": rows}).encode()
    if suffix == ".jsonl":
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    text = io.StringIO(newline="")
    columns = ["file", "class", "probability", "label", "error", *(f"p({name})" for name in about["class_names"])]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {f"p({name})": value for name, value in row.get("probabilities", {}).items()})
    return text.getvalue().encode(errors="surrogateescape")  # file names may be any bytes


def _score(predictions: Sequence[Prediction], class_names: Sequence[str]) -> dict[str, Any]:
    """Return accuracy and confusion matrix (rows: true classes) over the labelled files, or {} if there are none."""
    confusion = np.zeros((len(class_names),) * 2, int)
    for one in predictions:
        if one.label is not None and one.probabilities is not None:
            confusion[class_names.index(one.label), np.argmax(one.probabilities)] += 1
    count = int(confusion.sum())
    accuracy = int(np.trace(confusion)) / max(count, 1)
    return {"num_labelled": count, "accuracy": accuracy, "confusion_matrix": confusion.tolist()} if count else {}
