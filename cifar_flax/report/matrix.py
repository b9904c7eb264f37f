"""Pictures of results."""

from pathlib import Path
from typing import Any

import numpy as np


def plot_confusion_matrix(path: Path, result: dict[str, Any]) -> None:
    """Writes the confusion matrix of an evaluation as a PNG: colour is the share of the true class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = np.asarray(result["confusion_matrix"])
    names = list(result["per_class"])
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(2.5 + 0.5 * len(names), 16)  # inches
    font = min(10, 400 / len(names))  # points
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=font)
    axes.set_yticks(range(len(names)), names, fontsize=font)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(
        f"{result['dataset']} {result['split']}: {result['accuracy']:.2%} of {result['num_examples']:,} correct"
    )
    if len(names) <= 20:  # more would not be readable
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
