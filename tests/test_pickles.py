"""The reader of pickles equals Python's on the files that it is for, and refuses everything else."""

import pickle
import struct
import tracemalloc
from collections import OrderedDict

import archive_files as write
import numpy as np
import pytest

from cifar_flax.data.archives import pickles
from cifar_flax.errors import UserError

VALUE = {
    "data": np.arange(12, dtype=np.uint8).reshape(2, 6),
    "labels": [6, 9],
    "batch_label": "training batch 1 of 5",
    "filenames": ["a.png", "b.png"],
}
# As cPickle of Python 2.7 with NumPy 1.16 wrote VALUE and the names of a class, with protocol 2.
PYTHON_2 = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq"
    b"\x05(K\x01K\x02K\x06\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
    b"\xff\xffK\x00tb\x89U\x0c\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0btbU\x06labelsq\x08]q\t(K\x06K\teU\x0bbatch_label"
    b"q\nU\x15training batch 1 of 5q\x0bU\tfilenamesq\x0c]q\r(U\x05a.pngq\x0eU\x05b.pngq\x0feu."
)
META = (
    b"\x80\x02}q\x01(U\x13num_cases_per_batchq\x02M\x10'U\x0blabel_namesq\x03]q\x04U\x08airplaneq\x05aU\x07num_vis"
    b"q\x06M\x00\x0cu."
)
PICKLES = {
    "Python 2": PYTHON_2,
    "Python 2, names": META,
    "Python 2, older NumPy": PYTHON_2.replace(b"\x89U\x0c", b"\x89T\x0c\x00\x00\x00"),
    "long": write.python2({"filenames": [f"{i:04}.png" for i in range(300)], "text": "x" * 300, "n": [3072]}),
    "transposed": pickle.dumps({"data": VALUE["data"].T}, protocol=4),
    "twice": pickle.dumps([VALUE["labels"], VALUE["labels"], VALUE["labels"][:1]], protocol=4),
    "text": pickle.dumps({"é\ud800": (1, -2, 300, 70000, None, True, ()), "b": b"\xff" * 300}, protocol=4),
} | {f"protocol {i}": pickle.dumps(VALUE, protocol=i) for i in (2, 3, 4)}


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_values_equal_those_of_pickle(content):
    assert same(pickles.loads(content), pickle.loads(content, encoding="bytes"))


def test_the_writer_of_these_tests_writes_as_python_2():
    assert write.python2(VALUE) == PYTHON_2
    assert write.python2({"num_cases_per_batch": 10000, "label_names": ["airplane"], "num_vis": 3072}) == META


class Call:
    def __reduce__(self):
        return print, ("executed",)


REFUSED = {
    "a function": pickle.dumps(Call(), protocol=2),
    "a function, protocol 4": pickle.dumps(Call(), protocol=4),
    "a class": pickle.dumps(OrderedDict(a=1), protocol=2),
    "os.system": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "text protocol": pickle.dumps(VALUE, protocol=0),
    "protocol 5": pickle.dumps(VALUE, protocol=5),
    "floats": pickle.dumps(VALUE["data"].astype(np.float32), protocol=2),
    "objects": pickle.dumps(np.array([{}]), protocol=2),
    "float": pickle.dumps(0.5, protocol=2),
    "persistent id": b"\x80\x02K\x01Q.",
    "extension": b"\x80\x02\x82\x01.",
    "long string": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "negative string": b"\x80\x02T\xff\xff\xff\xffabc.",
    "long text": b"\x80\x04X\xff\xff\xff\xffabc.",
    "empty stack": b"\x80\x02\x85.",
    "no mark": b"\x80\x02K\x01t.",
    "no memo": b"\x80\x02h\x01.",
    "no line": b"\x80\x02cnumpy",
    "no end": b"\x80\x02K\x01",
    "empty": b"",
    "lying shape": PYTHON_2.replace(b"K\x02K\x06\x86c", b"M\xff\xffK\x06\x86c"),
    "odd dict": b"\x80\x02}(K\x01u.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "deep key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.",
    "deep name": b"\x80\x04]" + b"\x85" * 100_000 + b"K\x01\x93.",
    "deep arguments": b"\x80\x02cnumpy\ndtype\n)" + b"\x85" * 100_000 + b"R.",
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_everything_else_is_refused(content, capsys):
    with pytest.raises(UserError) as caught:
        pickles.loads(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert not capsys.readouterr().out


TEXT = b"\x80\x02X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"q\x00"
ENCODED = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
BOMBS = {
    "lists": b"\x80\x02" + b"]" * 30_000,
    "a text encoded repeatedly": TEXT + ENCODED * 100 + b".",
    "a length above the size": b"\x80\x02T\xff\xff\xff\x7f" + b"x" * 1000,
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_memory_is_bounded(content, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST_STEPS", 10_000)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            pickles.loads(content)
        assert tracemalloc.get_traced_memory()[1] < 2e6 + 2 * len(content)
    finally:
        tracemalloc.stop()
