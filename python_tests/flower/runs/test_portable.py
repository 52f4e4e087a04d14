"""Packed messages: equal values, bits and strides on the other side, and refusals of anything else."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedkern.errors import Malformed
from fedkern.flower.array_bytes import pack_value, unpack_value
from fedkern.messages.states import ABOUT

DTYPES = ("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")


def test_values_come_back():
    value = {"a": [1, 2.5, None, True, "text"], 3: (math.inf, -math.inf), "deep": {"x": {"y": []}}, "empty": {}}
    assert unpack_value(pack_value(value)) == value
    assert math.isnan(unpack_value(pack_value(float("nan"))))
    assert unpack_value(pack_value({"n": np.float64(0.1), "i": np.int64(7)})) == {"n": 0.1, "i": 7}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_bit_for_bit(name):
    source = torch.arange(-6, 18).reshape(2, 3, 4).to(getattr(torch, name))
    found = unpack_value(pack_value({"t": source}))["t"]
    assert found.dtype == source.dtype
    assert torch.equal(found, source)
    found[0] = 1  # memory of its own, which may be written to


def test_bits_of_nan_and_zero():
    source = torch.tensor([0x7FC00001, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    assert torch.equal(unpack_value(pack_value(source)).view(torch.int32), source.view(torch.int32))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 1, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 4).T,
        torch.tensor(3.5),
        torch.empty(0, 3),
        torch.randn(7, 1)[:, 0],
    ],
    ids=["channels-last", "one channel", "transposed", "scalar", "empty", "column"],
)
def test_strides_stay(tensor):
    found = unpack_value(pack_value([tensor]))[0]
    assert found.stride() == tensor.stride()
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("tensor", [torch.zeros(()).expand(3, 2), torch.arange(20)[::2], torch.randn(4, 6)[:, 1:3]])
def test_views_travel_dense(tensor):
    packed = pack_value(tensor)
    assert load(packed)["t0"].numel() == tensor.numel()
    assert torch.equal(unpack_value(packed), tensor)


def test_a_tensor_in_two_places_travels_once():
    tensor = torch.randn(5)
    packed = pack_value({"a": tensor, "b": [tensor]})
    assert len(load(packed)) == 1
    found = unpack_value(packed)
    assert found["a"] is found["b"][0]


def test_large_fp32_tensors_may_travel_as_bf16():
    large, small, integers = torch.randn(40, 30), torch.randn(30), torch.arange(2000)
    packed = pack_value({"large": large.T, "small": small, "whole": integers, "again": large.T}, half=True)
    found = unpack_value(packed)
    assert torch.equal(found["large"], large.T.bfloat16().float())
    assert found["large"].stride() == large.T.stride()
    assert torch.equal(found["small"], small)
    assert torch.equal(found["whole"], integers)
    assert load(packed)["t0"].dtype == torch.bfloat16


def test_arrays_stay_arrays():
    array = np.arange(12).reshape(3, 4)[:, ::2]
    found = unpack_value(pack_value({"x": array}))["x"]
    assert isinstance(found, np.ndarray)
    assert (found == array).all()


@pytest.mark.parametrize(
    ("value", "why"),
    [({"a": object()}, r"message\['a'\] is of type object"), ({1.5: 1}, "a key of type float"),
     ([torch.eye(2).to_sparse()], "sparse")],
)  # fmt: skip
def test_what_cannot_travel(value, why):
    with pytest.raises(TypeError, match=why):
        pack_value(value)


def forge(tree, **tensors):
    """Return a message of a tree, or of its text."""
    return save(tensors, {ABOUT: tree if isinstance(tree, str) else json.dumps(tree)})


TENSOR = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "cannot be read"),
        (pack_value(TENSOR)[:-1], "cannot be read"),
        (b"\xff" * 100, "4,194,304 is the most"),
        (save({"t0": TENSOR}), "cannot be read"),
        (forge("{"), "cannot be read"),
        (forge({"tensor": ["t0", [0], False]}), "did not come with it"),
        (forge({"tensor": "t0"}, t0=TENSOR), "did not come with it"),
        (forge({"tensor": ["t0", 1, False]}, t0=TENSOR), "did not come with it"),
        (forge({"tensor": ["t0", [0], False]}, t0=TENSOR), "dimensions that it does not have"),
        (forge({"tensor": ["t0", [1, 1], False]}, t0=TENSOR), "dimensions that it does not have"),
        (forge({"tensor": ["t0", [0, -1], False]}, t0=TENSOR), "dimensions that it does not have"),
        (forge({"pickle": "x"}), "describes no value"),
        (forge({"dict": [["a"]]}), "an invalid dict"),
        (forge({"dict": [[[1], 2]]}), "an invalid dict"),
        (forge({"float": "1"}), "describes no value"),
        (forge({"list": [], "dict": []}), "describes no value"),
        (forge([]), "describes no value"),
        (forge("Infinity"), "describes no value"),
        (forge("NaN"), "describes no value"),
        (forge("1e999"), "describes no value"),
    ],
)
def test_what_is_refused(message, why):
    with pytest.raises(Malformed, match=why):
        unpack_value(message)


def test_depth_is_bounded_on_both_sides():
    deep, value = "1", 1
    for _ in range(80):
        deep, value = f'{{"list":[{deep}]}}', [value]
    with pytest.raises(Malformed, match="too deep"):
        unpack_value(forge(deep))
    with pytest.raises(TypeError, match="too deep"):
        pack_value(value)


@pytest.mark.parametrize("number", [1 << 64, -(1 << 64), int("9" * 400)])
def test_whole_numbers_have_64_bits(number):
    with pytest.raises(TypeError, match="whole number of more than 64 bits"):
        pack_value({"n": number})
    with pytest.raises(Malformed, match="whole number of more than 64 bits"):
        unpack_value(forge(number))
    assert unpack_value(pack_value((1 << 64) - 1)) == (1 << 64) - 1
