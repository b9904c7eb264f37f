"""The weights and the program of a trained network, for other programs."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from cifar_flax import config as configs
from cifar_flax.errors import UserError
from cifar_flax.export import run_program
from cifar_flax.restore import RestoredRun
from cifar_flax.runtime.devices import ParallelConfig
from cifar_flax.runtime.trees import named_leaves
from cifar_flax.training import steps
from cifar_flax.training.setup import setup

PLATFORMS = ("cpu", "cuda", "tpu")


def tensors(run: RestoredRun) -> dict[str, np.ndarray]:
    """Return name, such as "conv.kernel", -> array: the parameters and batch statistics of evaluation."""
    params, batch_stats = run.weights
    arrays = named_leaves(params, ".") | named_leaves(batch_stats, ".")  # no name is in both
    return {name: np.ascontiguousarray(jax.device_get(array)) for name, array in arrays.items()}


def stablehlo(run: RestoredRun) -> bytes:
    """Serialize the network with its weights as one program, for any batch size and all of `PLATFORMS`."""
    config, info = run.config, run.info
    alone = configs.from_dict(configs.to_dict(config))
    alone.parallel = ParallelConfig()  # on one device
    device = jax.local_devices()[:1]
    weights = jax.device_put(jax.device_get(run.weights), device[0])

    def step(platform: str) -> Any:
        task, _ = setup(alone, info, device, platform=platform)
        return lambda image: steps.predict_step(
            task, weights, image, tta=config.eval.tta, tta_below=config.eval.tta_below
        )

    on_cpu, on_accelerator = step("cpu"), step("cuda")

    def probabilities(image: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        # The kernels and the precision may depend on the platform.
        return jax.lax.platform_dependent(image, cpu=on_cpu, default=on_accelerator)

    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *info.image_shape), np.uint8)
    return bytes(jax.export.export(jax.jit(probabilities), platforms=PLATFORMS)(shape).serialize())


def run_in_new_process(folder: Path, images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n classes"]:
    with tempfile.TemporaryDirectory() as temporary:
        given, answer = Path(temporary) / "images.npy", Path(temporary) / "probabilities.npy"
        np.save(given, images, allow_pickle=False)
        # -P: do not search the folder of the script for modules.
        command = [sys.executable, "-P", run_program.__file__, str(folder), str(given), str(answer)]
        leave_memory = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(command, env=leave_memory, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"the exported program is not written: another process cannot run it ({reason})")
        probabilities: np.ndarray = np.load(answer, allow_pickle=False)
        return probabilities
