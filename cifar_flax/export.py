"""A trained network for other programs, checked by one of them."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cifar_flax import config as configs
from cifar_flax import environment, evaluate, experiment, exported, files, steps
from cifar_flax.config import Config
from cifar_flax.data import sources
from cifar_flax.errors import ConfigError, UserError, require
from cifar_flax.imports import installed
from cifar_flax.parallel import ParallelConfig
from cifar_flax.state import named_leaves
from cifar_flax.trained import Trained, restore
from cifar_flax.writers import show

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5  # between the probabilities of evaluation and of the exported program


def export(config: Config, workdir: Path, output: Path) -> None:
    """Writes the network of `workdir` to the folder `output`, which appears when it is complete and has been checked.

    `model.safetensors` has the weights, `config.json` what else one must know to rebuild the network, `labels.txt` a
    class per line. `model.stablehlo` is the whole program, as `jax.export` serializes it: from bytes of the shape
    (n, height, width, channels) to probabilities, normalised and with test-time augmentation as evaluation has it, on
    each of `PLATFORMS`.

    Another process runs the program on all images of the split that evaluation counts. Raises `UserError` unless it
    finds the same classes, and probabilities within `TOLERANCE`; `ConfigError` where `output` exists already.
    """
    require(not output.exists(), "--output", str(output), "exists already; choose another folder")
    if not installed("safetensors"):
        raise ConfigError("weights cannot be written: safetensors is not installed (pip install safetensors)")
    from safetensors.numpy import save

    trained = restore(config, workdir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(save(tensors(trained)))
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in trained.info.class_names))
        (folder / "model.stablehlo").write_bytes(program(trained))
        checked = _check(trained, folder)
        files.write_json(folder / "config.json", _describe(trained, checked))
        folder.rename(output)
    show(_text(output, checked))


def tensors(trained: Trained) -> dict[str, np.ndarray]:
    """Name -> weights, such as "conv.kernel"; parameters and batch statistics, as they are evaluated."""
    params, batch_stats = trained.weights
    arrays = named_leaves(params, ".") | named_leaves(batch_stats, ".")  # no name is in both
    return {name: np.ascontiguousarray(jax.device_get(array)) for name, array in arrays.items()}


def program(trained: Trained) -> bytes:
    """The network, its weights inside, as one program for any number of images and for all of `PLATFORMS`."""
    config, info = trained.config, trained.info
    alone = configs.from_dict(configs.to_dict(config))
    alone.parallel = ParallelConfig()  # on one device
    device = jax.local_devices()[:1]
    weights = jax.device_put(jax.device_get(trained.weights), device[0])

    def step(platform: str) -> Any:
        task, _ = experiment.build(alone, info, device, platform=platform)
        return lambda image: steps.predict_step(
            task, weights, image, tta=config.eval.tta, tta_below=config.eval.tta_below
        )

    on_cpu, on_accelerator = step("cpu"), step("cuda")

    def probabilities(image: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        # A network may be written, or be of another precision, for each.
        return jax.lax.platform_dependent(image, cpu=on_cpu, default=on_accelerator)

    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *info.image_shape), np.uint8)
    return bytes(jax.export.export(jax.jit(probabilities), platforms=PLATFORMS)(shape).serialize())


def _check(trained: Trained, folder: Path) -> dict[str, Any]:
    """What another process finds with the program in `folder`, beside what evaluation does."""
    config = trained.config
    arrays = sources.load(config.data, config.data.eval_split)
    trained.info.check(arrays)
    evaluation = evaluate.final_evaluator(config, trained.task, arrays)(trained.state)
    assert evaluation is not None
    found = _run(folder, arrays.images)
    expected = evaluation.probabilities
    same = int(np.sum(found.argmax(axis=1) == expected.argmax(axis=1)))
    difference = float(np.abs(found - expected).max())
    if same != len(expected) or not difference <= TOLERANCE:
        raise UserError(
            f"the exported program is not written: of {len(expected)} {config.data.eval_split} images it classifies "
            f"{same} as evaluation does, with probabilities that differ by up to {difference:.2g} "
            f"({TOLERANCE:g} is allowed)"
        )
    return {
        "dataset": arrays.dataset,
        "split": config.data.eval_split,
        "num_examples": len(expected),
        "accuracy": evaluation.summary["accuracy"],
        "largest_difference_of_probabilities": difference,
    }


def _run(folder: Path, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n classes"]:
    with tempfile.TemporaryDirectory() as temporary:
        given, answer = Path(temporary) / "images.npy", Path(temporary) / "probabilities.npy"
        np.save(given, images, allow_pickle=False)
        # -P: the folder of this package is not where it looks for modules.
        command = [sys.executable, "-P", exported.__file__, str(folder), str(given), str(answer)]
        leave_memory = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(command, env=leave_memory, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"the exported program is not written: another process cannot run it ({reason})")
        probabilities: np.ndarray = np.load(answer, allow_pickle=False)
        return probabilities


def _describe(trained: Trained, checked: Mapping[str, Any]) -> dict[str, Any]:
    info, config = trained.info, trained.config
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
            "layout": "convolutions: height, width, in, out; dense layers: in, out; images: height, width, channels",
        },
        "program": {
            "file": "model.stablehlo",
            "made_by": "jax.export",
            "platforms": PLATFORMS,
            "input": ["uint8", ["batch", *info.image_shape]],
            "output": ["float32", ["batch", len(info.class_names)]],
        },
        "step": trained.step,
        "checked": dict(checked),
        "versions": environment.versions(),
    }


def _text(output: Path, checked: Mapping[str, Any]) -> str:
    names = sorted(path.name for path in output.iterdir())
    sizes = "\n".join(f"  {name:18} {(output / name).stat().st_size:12,} bytes" for name in names)
    return (
        f"{output}:\n{sizes}\n"
        f"model.stablehlo, run by another process on the {checked['num_examples']:,} images of the {checked['split']} "
        f"split: the same classes (accuracy {checked['accuracy']:.2%}), probabilities within "
        f"{checked['largest_difference_of_probabilities']:.2g}"
    )
