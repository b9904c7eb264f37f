"""--mode=export: write the model of a run for other programs, and check it in a separate process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cifar_flax import config as configs
from cifar_flax import files, packages
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.errors import UserError, require
from cifar_flax.export import program
from cifar_flax.restore import RestoredRun, restore
from cifar_flax.telemetry.console import show
from cifar_flax.training import evaluator

TOLERANCE = 1e-5  # maximum difference between the probabilities of evaluation and of the exported program


def export(config: Config, workdir: Path, output: Path) -> None:
    """Write the model of `workdir` to the folder `output`, which appears only when it is complete and checked.

    `model.safetensors` holds the weights, `config.json` all other values needed to rebuild the model, and `labels.txt`
    one class per line. `model.stablehlo` is the whole program, serialized by `jax.export`: it maps uint8 images of
    shape (n, height, width, channels) to probabilities, including normalization and the config's test-time augmentation
    (TTA), and runs on each of `PLATFORMS`.

    A separate process, without this package, runs the program on the evaluation split. Raise `UserError` unless it
    predicts the same classes as evaluation, with probabilities within `TOLERANCE`. Raise `ConfigError` if `output`
    exists.
    """
    require(not output.exists(), "--output", str(output), "exists already; choose another folder")
    packages.require(("safetensors", "flatbuffers"), "--mode=export")
    packages.load("flatbuffers")  # for jax.export
    save = packages.load("safetensors").save
    run = restore(config, workdir)
    with files.new_folder(output) as folder:
        (folder / "model.safetensors").write_bytes(save(program.tensors(run)))
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in run.info.class_names))
        (folder / "model.stablehlo").write_bytes(program.stablehlo(run))
        checked = _check(run, folder)
        files.write_json(folder / "config.json", _describe(run, checked))
    sizes = "".join(f"\n  {path.name:18} {path.stat().st_size:12,} bytes" for path in sorted(output.iterdir()))
    show(
        f"{output}:{sizes}\n"
        f"model.stablehlo, checked in a separate process on the {checked['num_examples']:,} images of the "
        f"{checked['split']} split: same classes as evaluation (accuracy {checked['accuracy']:.2%}), probabilities "
        f"within {checked['largest_difference_of_probabilities']:.2g}"
    )


def _check(run: RestoredRun, folder: Path) -> dict[str, Any]:
    """Run the program in `folder` in another process; return its accuracy and its difference from evaluation."""
    config = run.config
    arrays = sources.load(config.data, config.data.eval_split)
    run.info.check(arrays)
    evaluation = evaluator.final_evaluator(config, run.task, arrays)(run.state)
    assert evaluation is not None
    found = program.run_in_new_process(folder, arrays.images)
    expected = evaluation.probabilities
    same = int(np.sum(found.argmax(axis=1) == expected.argmax(axis=1)))
    difference = float(np.abs(found - expected).max())
    if same != len(expected) or not difference <= TOLERANCE:
        raise UserError(
            f"the program is not exported: it predicts the class of evaluation for {same} of {len(expected)} "
            f"{config.data.eval_split} images, and its probabilities differ by up to {difference:.2g} "
            f"(allowed: {TOLERANCE:g})"
        )
    return {
        "dataset": arrays.dataset,
        "split": config.data.eval_split,
        "num_examples": len(expected),
        "accuracy": evaluation.summary["accuracy"],
        "largest_difference_of_probabilities": difference,
    }


def _describe(run: RestoredRun, checked: Mapping[str, Any]) -> dict[str, Any]:
    info, config = run.info, run.config
    return {
        "format": 1,
        "model": configs.to_dict(config)["model"],
        "image": {
            "shape": info.image_shape,
            "layout": "height, width, channels; bytes, 0 to 255",
            "mean": info.mean,
            "std": info.std,
            "normalization": "(image - mean) / std, per channel, in float32",
        },
        "num_classes": len(info.class_names),
        "tta": config.eval.tta,
        "tta_below": config.eval.tta_below,
        "weights": {
            "file": "model.safetensors",
            "layout": "as in flax.nnx; convolutions: height, width, in, out; dense layers: in, out",
        },
        "program": {
            "file": "model.stablehlo",
            "made_by": "jax.export",
            "platforms": program.PLATFORMS,
            "input": ["uint8", ["batch", *info.image_shape]],
            "output": ["float32", ["batch", len(info.class_names)]],
        },
        "step": run.step,
        "checked": dict(checked),
        "versions": packages.versions(),
    }
