"""Memory of runs on sets that are larger than the memory, by the benchmark at reduced size."""

import pytest
from conftest import needs_tensorflow

from benchmarks import large_sets

COUNTS = (60_000, 200_000)  # the images of the large set take 614 MB
SMALL = ["--config.model.width=4", "--config.model.hidden=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("large")


@pytest.mark.slow
@pytest.mark.parametrize("gathered_by", ["NumPy", pytest.param("tf.data", marks=needs_tensorflow)])
def test_anonymous_memory_does_not_grow_with_the_images(tmp_path, folder, gathered_by):
    peaks = []
    for count in COUNTS:
        data = large_sets.random_set(folder, count)
        row = large_sets.run(data, count, gathered_by, tmp_path / str(count), SMALL)
        peaks.append(row["peak_anonymous_mb"])
    assert peaks[1] - peaks[0] < 150
