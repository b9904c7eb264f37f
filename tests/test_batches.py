import dataclasses
import functools
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orders import indices

from cifar_flax.data import resident, streaming
from cifar_flax.data.batches import GROUP, Batch, Indices, InputTimer, evaluation_indices, gather, to_device
from cifar_flax.data.cache import Arrays
from cifar_flax.data.info import DatasetInfo
from cifar_flax.runtime.devices import ParallelConfig, make_layout

FIELDS = ("image", "label", "index", "epoch", "mask")


@pytest.fixture(params=["tf.data", "numpy"])
def gathering(request, monkeypatch):
    """Let `streaming` use `tf.data`, with Datasets of five steps, or NumPy."""
    if request.param == "tf.data":
        request.getfixturevalue("tf")
        monkeypatch.setattr(streaming, "_MOST_STEPS", 5)
    else:
        monkeypatch.setattr(streaming, "tensorflow_fault", lambda: "tensorflow is not installed")


def make_arrays(size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, 6, 5, 3), dtype=np.uint8)
    labels = rng.integers(0, 4, size).astype(np.int32)
    return Arrays(images, labels, tuple("abcd"), "random/1.0.0")


def single_steps(examples, *, start, stop, **arguments):
    """Return the indices of calls of one step."""
    ends = range(start + 1, stop + 1)
    return resident.training_indices(examples, start=start, stop=stop, ends=ends, steps_per_call=1, **arguments)


@pytest.mark.parametrize(
    ("start", "ends", "drop_last"),
    [(0, range(1, 13), False), (3, range(4, 13), False), (3, (6, 9, 12), True), (2, (3, 7, 9, 12), False)],
)
@pytest.mark.parametrize("balanced", [False, True])
def test_pipelines_agree_byte_for_byte(gathering, start, ends, drop_last, balanced):
    """Calls may have different numbers of steps; the rows that are left are masked."""
    arrays = make_arrays(30)
    examples = np.arange(5, 30, dtype=np.int32)
    classes = arrays.labels[examples] if balanced else None
    arguments = {"batch_size": 8, "seed": 7, "start": start, "stop": 12, "drop_last": drop_last, "classes": classes}
    streamed = list(streaming.training_batches(arrays, examples, **arguments))
    calls = list(resident.training_indices(examples, ends=ends, steps_per_call=4, **arguments))
    on_device = resident.put(arrays, make_layout(ParallelConfig()))
    compiled = jax.jit(functools.partial(resident.gather, image_shape=arrays.images.shape[1:]))
    assert on_device.images.shape == (30, 128)  # rows of whole tiles of a TPU
    assert {call.index.shape for call in calls} == {(4, 8)}
    counts = np.diff([start, *ends])
    assert [call.mask.all(axis=1).tolist() for call in calls] == [[row < count for row in range(4)] for count in counts]
    rows = [Indices(*row) for call in calls for row in zip(call.index, call.epoch, call.mask, strict=True)]
    rows = [row for row in rows if row.mask.any()]
    gathered = [compiled(on_device.images, on_device.labels, row) for row in rows]
    index, epoch = indices(7, examples, 8, start, 12, drop_last, classes)
    assert len(streamed) == len(gathered) == 12 - start
    for step, batches in enumerate(zip(streamed, gathered, strict=True)):
        expected = Batch(
            arrays.images[index[step]], arrays.labels[index[step]], index[step], epoch[step], np.ones(8, bool)
        )
        for batch in batches:
            for field in FIELDS:
                got, wanted = np.asarray(getattr(batch, field)), getattr(expected, field)
                assert got.dtype == wanted.dtype
                np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 8), slice(2, 3)])
def test_a_host_reads_only_its_rows(gathering, rows):
    arrays, examples = make_arrays(30), np.arange(30, dtype=np.int32)
    arguments = {"batch_size": 8, "seed": 7, "start": 2, "stop": 9, "drop_last": False}
    for whole, part in (
        (streaming.training_batches(arrays, examples, **arguments, rows=of) for of in (slice(None), rows)),
        (single_steps(examples, **arguments, rows=of) for of in (slice(None), rows)),
    ):
        for batch, own in zip(whole, part, strict=True):
            here = rows if isinstance(batch, Batch) else (slice(None), rows)
            for field in FIELDS if isinstance(batch, Batch) else FIELDS[2:]:
                np.testing.assert_array_equal(getattr(batch, field)[here], getattr(own, field))


@given(
    size=st.integers(1, 60),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    hosts=st.sampled_from([1, 2, 3, 4]),
    group=st.integers(1, 7),
    data=st.data(),
)
def test_batches_depend_on_neither_prefetching_nor_number_of_hosts(size, drop_last, seed, hosts, group, data):
    """The rows of all hosts, prefetched in groups of `group` batches, are those of one host without prefetching."""
    batch_size = hosts * data.draw(st.integers(1, max(size // hosts, 1)))
    if batch_size > size:
        return
    examples = np.arange(size, dtype=np.int32)
    start = data.draw(st.integers(0, 5))
    arguments = {"batch_size": batch_size, "seed": seed, "start": start, "stop": start + 6, "drop_last": drop_last}
    single_host = list(single_steps(examples, **arguments))
    per_host = []
    for host in range(hosts):
        rows = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
        own = single_steps(examples, **arguments, rows=rows)
        per_host.append(list(to_device(own, lambda positions: positions, group)))
    assert len(single_host) == 6
    for whole, *parts in zip(single_host, *per_host, strict=True):
        for field in FIELDS[2:]:
            together = np.concatenate([getattr(part, field) for part in parts], axis=1)
            np.testing.assert_array_equal(getattr(whole, field), together)


@pytest.mark.parametrize("depth", [1, 9])
def test_streamed_batches_do_not_depend_on_the_prefetch_depth(tf, monkeypatch, depth):
    arrays, examples = make_arrays(30), np.arange(30, dtype=np.int32)
    arguments = {"batch_size": 8, "seed": 7, "start": 2, "stop": 20}
    before = list(streaming.training_batches(arrays, examples, **arguments))
    monkeypatch.setattr(streaming, "_PREFETCH", depth)
    for one, other in zip(before, streaming.training_batches(arrays, examples, **arguments), strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


class Decoded:
    """Images that are decoded when they are indexed by an array."""

    def __init__(self, images):
        self._images = images
        self.shape, self.dtype, self.nbytes = images.shape, images.dtype, images.nbytes

    def __getitem__(self, index: np.ndarray):
        return self._images[index]


def test_images_that_are_not_an_array_are_gathered_by_their_own_method():
    arrays, examples = make_arrays(30), np.arange(30, dtype=np.int32)
    decoded = dataclasses.replace(arrays, images=Decoded(arrays.images))
    assert decoded.checksum() == arrays.checksum()
    assert DatasetInfo.of(decoded, examples[3:], "standard") == DatasetInfo.of(arrays, examples[3:], "standard")
    both = [
        streaming.training_batches(one, examples, batch_size=8, seed=7, start=2, stop=9) for one in (arrays, decoded)
    ]
    for batch, own in zip(*both, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(batch, field), getattr(own, field))


def evaluation_batches(arrays, examples, batch_size):
    for positions in evaluation_indices(examples, batch_size):
        yield gather(arrays.images, arrays.labels, positions)


@pytest.mark.parametrize("batch_size", [1, 7, 20, 25, 64])
def test_evaluation_counts_every_example_once(batch_size):
    arrays = make_arrays(25)
    seen = []
    for batch in evaluation_batches(arrays, np.arange(25, dtype=np.int32), batch_size):
        assert batch.image.shape == (batch_size, 6, 5, 3)
        np.testing.assert_array_equal(batch.image, arrays.images[batch.index])
        np.testing.assert_array_equal(batch.label, arrays.labels[batch.index])
        seen += batch.index[batch.mask].tolist()
    assert seen == list(range(25))


def test_batches_are_put_on_the_device_ahead_of_time():
    taken = []

    def source():
        for batch in evaluation_batches(make_arrays(60), np.arange(60, dtype=np.int32), 2):
            taken.append(batch)
            yield batch

    batches = to_device(source())
    wait_until(lambda: len(taken) == GROUP)  # before the first batch is requested
    received = [next(batches)]
    wait_until(lambda: len(taken) == 2 * GROUP)
    received += itertools.islice(batches, GROUP - 1)
    time.sleep(0.05)
    assert len(taken) == 2 * GROUP  # no more before the second group is requested
    received += batches
    assert all(isinstance(batch.image, jax.Array) for batch in received)
    assert np.concatenate([batch.index for batch in received]).tolist() == list(range(60))


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_errors_of_the_source_are_raised_after_its_batches():
    def source():
        yield from evaluation_batches(make_arrays(GROUP), np.arange(GROUP, dtype=np.int32), 1)
        raise OSError("the disk is gone")

    batches = to_device(source())
    assert [int(batch.index[0]) for batch in itertools.islice(batches, GROUP)] == list(range(GROUP))
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_closing_does_not_wait_for_the_thread():
    """The garbage collector may close the iterator while another thread starts, which deadlocked in Python 3.12."""
    closed, seen = threading.Event(), []

    def source():
        yield from evaluation_batches(make_arrays(GROUP), np.arange(GROUP, dtype=np.int32), 1)
        seen.append(closed.wait(10))

    batches = to_device(source())
    next(batches)
    batches.close()  # while the thread waits in `source`
    assert not seen
    closed.set()
    wait_until(lambda: seen == [True])


def test_time_spent_waiting_for_batches_is_measured(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    batches = list(evaluation_batches(make_arrays(4), np.arange(4, dtype=np.int32), 2))
    timer = InputTimer(iter(batches))
    assert list(timer) == batches
    assert timer.seconds == 2.0 + 3.0 + 0.5
