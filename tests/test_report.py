import numpy as np
import pytest
from matplotlib import image

from cifar_flax import metrics
from cifar_flax.report.matrix import plot_confusion_matrix


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_matrix_is_drawn(tmp_path, classes):
    confusion = np.diag(np.arange(1, classes + 1))
    confusion[0, 1] = 5
    sums = {name: np.zeros(15) for name in ("bin_confidence", "bin_correct")} | {"loss": 0.0, "top5": 0}
    summary = metrics.summarize(sums | {"confusion": confusion}, tuple(f"class {i}" for i in range(classes)))
    path = tmp_path / "matrix.png"
    plot_confusion_matrix(path, {"dataset": "set/1.0.0", "split": "test"} | summary)
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.01  # not an empty page
