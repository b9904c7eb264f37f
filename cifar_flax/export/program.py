"""Export the weights and the program of a trained model, to be used without this package."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cifar_flax.errors import UserError
from cifar_flax.export import run_program
from cifar_flax.restore import RestoredRun
from cifar_flax.runtime import settings
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.runtime.trees import named_leaves
from cifar_flax.training import steps
from cifar_flax.training.setup import setup

PLATFORMS = ("cpu", "cuda", "tpu")


def tensors(run: RestoredRun) -> dict[str, np.ndarray]:
    """Return a dict from name, such as "conv.kernel", to array: the weights and batch statistics for evaluation."""
    params, batch_stats = run.weights
    arrays = named_leaves(params, ".") | named_leaves(batch_stats, ".")  # their names differ
    return {name: np.ascontiguousarray(jax.device_get(array)) for name, array in arrays.items()}


def stablehlo(run: RestoredRun) -> bytes:
    """Serialize the model and its weights as one program, for any batch size and all of `PLATFORMS`."""
    config, info = run.config, run.info
    alone = dataclasses.replace(config, parallel=ParallelConfig())  # on one device
    device = jax.local_devices()[:1]
    weights = jax.device_put(jax.device_get(run.weights), device[0])

    def step(platform: str) -> Any:
        task, _ = setup(alone, info, device, platform=platform)
        return lambda image: steps.predict_step(task, weights, image, tta=config.eval.tta)

    on_cpu, on_accelerator = step("cpu"), step("cuda")

    def probabilities(image: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        # Kernels and precision may depend on the platform.
        return jax.lax.platform_dependent(image, cpu=on_cpu, default=on_accelerator)

    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *info.image_shape), np.uint8)
    return bytes(jax.export.export(jax.jit(probabilities), platforms=PLATFORMS)(shape).serialize())


def run_in_new_process(
    folder: Path, images: UInt8[np.ndarray, "n h w c"], platform: str
) -> tuple[Float[np.ndarray, "n classes"], str]:
    """Run the program in `folder` on `images` in a new process; return its probabilities and the platform it used.

    `platform` is that of this process. Raise `UserError` if the new process fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        inputs, outputs = Path(temporary) / "images.npy", Path(temporary) / "probabilities.npy"
        np.save(inputs, images, allow_pickle=False)
        # -P: do not import modules from the script's folder.
        command = [sys.executable, "-P", run_program.__file__, str(folder), str(inputs), str(outputs)]
        environment = {name: value for name, value in os.environ.items() if name.lower() not in settings.PINNED}
        environment |= variables_beside(platform)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no error message"])[-1]
            raise UserError(f"the program is not exported: another process cannot run it ({reason})")
        probabilities: np.ndarray = np.load(outputs, allow_pickle=False)
        return probabilities, done.stdout.split()[-1]


def variables_beside(platform: str) -> dict[str, str]:
    """Return environment variables for a process that uses JAX while this process uses the devices of `platform`."""
    if platform == "tpu":
        return {"JAX_PLATFORMS": "cpu"}  # only one process can use a TPU
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # this process may hold most of a GPU's memory
