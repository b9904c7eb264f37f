"""Rebuild an exported network with NumPy and SciPy alone: `independent.py FOLDER IMAGES.npy OUT.npy`.

Reads `config.json` and `model.safetensors` from FOLDER. The architectures follow the papers.
"""

import json
import sys
from pathlib import Path

import numpy as np
import scipy.special
from safetensors.numpy import load_file


def conv(x, kernel, *, stride=1, padding=0):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel, optimize=True)


def pool(x, size):
    n, h, w, c = x.shape
    return x[:, : h // size * size, : w // size * size].reshape(n, h // size, size, w // size, size, c).max((2, 4))


def norm(x, w, name, eps):
    x = (x - w[f"{name}.mean"]) / np.sqrt(w[f"{name}.var"] + eps)
    return x * w.get(f"{name}.scale", 1) + w[f"{name}.bias"]


def gelu(x):
    return x * scipy.special.ndtr(x)


def relu(x):
    return np.maximum(x, 0)


def cnn(x, w, model):
    x = pool(relu(conv(x, w["conv.kernel"]) + w["conv.bias"]), 2)
    x = norm(x, w, "norm", 1e-3).reshape(len(x), -1)
    return relu(x @ w["hidden.kernel"] + w["hidden.bias"]) @ w["head.kernel"] + w["head.bias"]


def airbench(x, w, model):
    x = gelu(conv(x, w["whitening.kernel"]) + w["whitening.bias"])
    for block in range(3):
        x = pool(conv(x, w[f"blocks.{block}.convs.0.kernel"], padding=1), 2)
        first = x = gelu(norm(x, w, f"blocks.{block}.norms.0.norm", 1e-12))
        for layer in range(1, model["depth"]):
            x = conv(x, w[f"blocks.{block}.convs.{layer}.kernel"], padding=1)
            x = norm(x, w, f"blocks.{block}.norms.{layer}.norm", 1e-12)
            x = gelu(x + first if model["residual"] and layer == model["depth"] - 1 else x)
    x = pool(x, 3).reshape(len(x), -1)
    return x @ w["head.kernel"] / (x.shape[1] if model["init"] == "muon" else 9)


def resnet18(x, w, model):
    def conv_norm(x, name, stride, padding):
        return norm(conv(x, w[f"{name}.conv.kernel"], stride=stride, padding=padding), w, f"{name}.norm.norm", 1e-5)

    x = relu(conv_norm(x, "stem", 1, 1))
    for block in range(8):
        name, stride = f"blocks.{block}", 2 if block in (2, 4, 6) else 1
        y = conv_norm(relu(conv_norm(x, f"{name}.first", stride, 1)), f"{name}.second", 1, 1)
        x = relu(y + (conv_norm(x, f"{name}.shortcut", stride, 0) if stride == 2 else x))
    return x.mean((1, 2)) @ w["head.kernel"] + w["head.bias"]


def tta_views(images, tta):
    """Yield the weight and the pixels of each test-time augmentation (TTA) view."""
    chosen = [(1, images)]
    if tta == "mirror_translate":
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        chosen = [(0.5, images), (0.25, padded[:, :-2, :-2]), (0.25, padded[:, 2:, 2:])]
    for weight, view in chosen:
        if tta == "none":
            yield weight, view
        else:
            yield weight / 2, view
            yield weight / 2, view[:, :, ::-1]


def main(folder, images, out):
    config = json.loads(Path(folder, "config.json").read_text())
    weights = load_file(Path(folder, config["weights"]["file"]))
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    network = {"cnn": cnn, "airbench": airbench, "resnet18": resnet18}[config["model"]["name"]]
    mean, std = np.array(config["image"]["mean"]), np.array(config["image"]["std"])
    pixels = np.load(images)
    logits = sum(
        weight * network((view - mean) / std, weights, config["model"])
        for weight, view in tta_views(pixels, config["tta"])
    )
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.save(out, exponentials / exponentials.sum(axis=1, keepdims=True))
    assert not [name for name in sys.modules if name.startswith(("cifar_flax", "jax", "flax"))]


main(*sys.argv[1:])
