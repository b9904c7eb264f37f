"""--mode=export: write the model of a run for other programs, and check it in a separate process."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from cifar_flax import config as configs
from cifar_flax import files, packages
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.errors import UserError, require
from cifar_flax.export import program
from cifar_flax.models.network import activation_dtype
from cifar_flax.restore import RestoredRun, restore
from cifar_flax.runtime.streams import show
from cifar_flax.training import evaluator

_ON_CPU, _ON_ACCELERATORS = 1e-5, 2.0**-8  # see `tolerance`


def export(config: Config, workdir: Path, output: Path) -> None:
    """Write the model of `workdir` to the folder `output`, which appears only when it is complete and checked.

    `model.safetensors` holds the weights, `config.json` all other values needed to rebuild the model, and `labels.txt`
    one class per line. `model.stablehlo` is the whole program, serialized by `jax.export`: it maps uint8 images of
    shape (n, height, width, channels) to probabilities, including normalization and the config's test-time augmentation
    (TTA), and runs on each of `PLATFORMS`.

    A separate process, without this package, runs the program on the evaluation split: on a CPU if this process uses a
    TPU, else on JAX's default platform. Raise `UserError` unless its probabilities are within `tolerance` of
    evaluation's, with the same classes except for near ties (see `changed_classes`). Raise `ConfigError` if `output`
    exists.
    """
    require(not output.exists(), "--output", str(output), "exists already; choose another folder")
    packages.require(("safetensors", "flatbuffers"), "--mode=export")
    packages.load("flatbuffers")  # for jax.export
    save = packages.load("safetensors").save
    run = restore(config, workdir)
    with files.new_folder(output) as folder:
        (folder / "model.safetensors").write_bytes(save(program.tensors(run)))
        (folder / "labels.txt").write_bytes("".join(f"{name}\n" for name in run.info.class_names).encode())
        (folder / "model.stablehlo").write_bytes(program.stablehlo(run))
        checked = _check(run, folder)
        files.write_json(folder / "config.json", _describe(run, checked))
    ties = checked["num_near_ties_of_another_class"]
    except_ties = f" except for {ties} images with two nearly equal probabilities" if ties else ""
    sizes = "".join(f"\n  {path.name:18} {path.stat().st_size:12,} bytes" for path in sorted(output.iterdir()))
    show(
        f"{output}:{sizes}\n"
        f"model.stablehlo, checked in a separate process on the {checked['num_examples']:,} images of the "
        f"{checked['split']} split, on platform {checked['platform']}: same classes as evaluation{except_ties}, "
        f"accuracy {checked['accuracy']:.2%}, "
        f"probabilities within {checked['largest_difference_of_probabilities']:.2g}"
    )


def tolerance(dtype: str, *platforms: str) -> float:
    """Return the allowed difference of probabilities between two programs of a network that run on these `platforms`.

    `dtype` is that of the config. Programs round in different places. On a CPU, float32 results then differ by less
    than 1e-5. Accelerators by default round the factors of float32 products, to 8 bits in the worst case (bfloat16 on
    TPUs; NVIDIA's TF32 has 11). Activations of 16 bits round the logits too: a logit from 8 to 16 may change by
    8 epsilon, where epsilon is that of the dtype, and a probability by at most half the largest change of a logit.
    The less precise platform determines the result.
    """
    epsilon = max(float(jnp.finfo(activation_dtype(dtype, platform)).eps) for platform in platforms)
    return max(4 * epsilon, _ON_CPU if set(platforms) == {"cpu"} else _ON_ACCELERATORS)


def changed_classes(
    found: Float[np.ndarray, "n classes"], expected: Float[np.ndarray, "n classes"], allowed: float
) -> tuple[int, int]:
    """Return the number of images whose predicted class differs: clear ones, and near ties.

    In a near tie, the two largest of the `expected` probabilities differ by at most 2 * `allowed`: if one decreases and
    the other increases by `allowed`, their order may change.
    """
    second, first = np.sort(expected, axis=1)[:, -2:].T
    differs, is_tie = found.argmax(axis=1) != expected.argmax(axis=1), first - second <= 2 * allowed
    return int(np.sum(differs & ~is_tie)), int(np.sum(differs & is_tie))


def _check(run: RestoredRun, folder: Path) -> dict[str, Any]:
    """Run the program in `folder` in another process; return its accuracy and its difference from evaluation.

    As in the program, TTA is for all images of the evaluation.
    """
    config = dataclasses.replace(run.config, eval=dataclasses.replace(run.config.eval, tta_fraction=1.0))
    arrays = sources.load(config.data, config.data.eval_split)
    run.info.check(arrays)
    evaluation = evaluator.final_evaluator(config, run.task, arrays)(run.state)
    assert evaluation is not None
    platform = run.task.layout.platform
    found, platform_found = program.run_in_new_process(folder, arrays.images, platform)
    expected = evaluation.probabilities
    allowed = tolerance(config.model.dtype, platform, platform_found)
    changed, changed_ties = changed_classes(found, expected, allowed)
    difference = float(np.abs(found - expected).max())
    if changed or not difference <= allowed:
        raise UserError(
            f"the program is not exported: it predicts another class than evaluation for {changed} of {len(expected)} "
            f"{config.data.eval_split} images, and its probabilities differ by up to {difference:.2g} "
            f"(allowed: {allowed:.2g})"
        )
    return {
        "dataset": arrays.dataset,
        "split": config.data.eval_split,
        "num_examples": len(expected),
        "accuracy": evaluation.summary["accuracy"],
        "platform": platform_found,
        "platform_of_evaluation": platform,
        "num_near_ties_of_another_class": changed_ties,
        "largest_difference_of_probabilities": difference,
        "allowed_difference_of_probabilities": allowed,
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
