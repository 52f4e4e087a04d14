"""Arrays of Flower messages without Flower: bytes of .npy files and flat vectors, also from hostile clients."""

import io
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT, NUMPY, Misfit


class Sent(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


def save_array(array, stype=NUMPY):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return Sent(str(array.dtype), array.shape, stype, stream.getvalue())


ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.float64(3.5).reshape(()),
    np.zeros((0, 3), np.float16),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(5, dtype=">f4"),
    np.arange(4, dtype=np.int64),
    np.arange(4, dtype=">i2"),
    np.array([True, False]),
    np.zeros((2, 0), np.uint8),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_reads_what_numpy_saves(array):
    sent = save_array(array)
    form = array_bytes.read_header(sent, "'w'")
    assert (form.shape, form.dtype) == (array.shape, array.dtype.name)
    found = array_bytes.as_numpy(sent, form)
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype.newbyteorder("=")
    if form.dtype in array_bytes.FLOATS:
        vector = array_bytes.as_tensor(sent, form)
        assert vector.dtype == array_bytes.FLOATS[form.dtype]
        assert np.array_equal(vector.numpy(), array.reshape(-1))


@pytest.mark.parametrize("array", [a for a in ARRAYS if a.dtype.isnative], ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_numpy_reads_what_is_written(array):
    data = array_bytes.npy_bytes(np.ascontiguousarray(array), array.shape)
    found = np.load(io.BytesIO(data), allow_pickle=False)
    assert np.array_equal(found, array)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)


def test_a_tensor_lies_in_the_bytes_and_keeps_them():
    sent = save_array(np.arange(1000, dtype=np.float32))
    begin = np.frombuffer(sent.data, np.uint8).ctypes.data
    vector = array_bytes.as_tensor(sent, array_bytes.read_header(sent, "'w'"))
    assert begin < vector.data_ptr() < begin + len(sent.data)
    del sent
    assert torch.equal(vector, torch.arange(1000.0))


def test_a_flat_vector_of_bf16():
    vector = torch.randn(7).bfloat16()
    sent = Sent("bfloat16", (7,), FLAT, array_bytes.raw_bytes(vector))
    assert len(sent.data) == 14
    assert torch.equal(array_bytes.as_tensor(sent, array_bytes.read_header(sent, FLAT)), vector)


def cut(sent, data):
    return sent._replace(data=data)


GOOD = save_array(np.arange(4, dtype=np.float32))
HOSTILE = {
    "cut": (cut(GOOD, GOOD.data[:-1]), "size"),
    "longer": (cut(GOOD, GOOD.data + b"\0" * 4), "size"),
    "empty": (cut(GOOD, b""), "size"),
    "no header": (cut(GOOD, b"\0" * 64), "size"),
    "a header of 60 kB": (cut(GOOD, GOOD.data[:8] + b"\xff\xff" + b" " * 70_000), "size"),
    "a header of 4 GB": (cut(GOOD, b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99), "size"),
    "a header that is no dict": (cut(GOOD, GOOD.data[:10] + b"[" * (len(GOOD.data) - 26) + GOOD.data[-16:]), "dtypes"),
    "pickled objects": (save_array(np.array([{}], dtype=object)), "dtypes"),
    "complex": (save_array(np.zeros(2, complex)), "dtypes"),
    "texts": (save_array(np.array(["a"])), "dtypes"),
    "fp128": (save_array(np.zeros(2, np.longdouble)), "dtypes"),
    "another encoding": (GOOD._replace(stype="pickle"), "dtypes"),
    "a flat vector of whole numbers": (Sent("int64", (1,), FLAT, b"\0" * 8), "dtypes"),
    "a flat matrix": (Sent("float32", (1, 1), FLAT, b"\0" * 4), "dtypes"),
    "a flat vector of negative size": (Sent("float32", (-1,), FLAT, b""), "dtypes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bytes_that_do_not_fit_are_refused_by_name(case):
    sent, reason = HOSTILE[case]
    with pytest.raises(Misfit, match="'w'") as caught:
        array_bytes.read_header(sent, "'w'")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "arrays",
    [
        [np.arange(4, dtype=np.float32), np.float32(7).reshape(()), np.zeros((0, 2), np.float32)],
        [np.arange(4, dtype=np.float32), np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))],
        [np.arange(4, dtype=">f4"), np.arange(3, dtype=np.float32)],
        [np.arange(4, dtype=np.float32), np.arange(3.0)],
        [np.zeros((0, 3), np.float16), np.zeros(0, np.float16)],
        [np.arange(5.0)],
    ],
    ids=["same", "Fortran", "swapped", "mixed", "empty", "one"],
)
def test_joins_arrays(arrays):
    sent = [save_array(array) for array in arrays]
    found = array_bytes.join_tensors([(data, array_bytes.read_header(data, "'w'")) for data in sent])
    assert np.array_equal(found.numpy(), np.concatenate([array.reshape(-1) for array in arrays]))
    assert found.dtype == array_bytes.FLOATS[np.result_type(*arrays).name]
