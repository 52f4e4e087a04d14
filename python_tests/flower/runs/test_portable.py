"""Packed messages: the same values, bits and strides on the other side, and nothing that is not one."""

import json
import math

import numpy as np
import pytest
import torch

from fedkern.flower.runs.packed_message import Malformed, PackedMessage, Raw
from fedkern.flower.runs.portable import DTYPES, pack, unpack


def test_values_come_back():
    value = {"a": [1, 2.5, None, True, "text"], 3: (math.inf, -math.inf), "deep": {"x": {"y": []}}, "empty": {}}
    assert unpack(pack(value)) == value
    assert math.isnan(unpack(pack(float("nan"))))
    assert unpack(pack({"n": np.float64(0.1), "i": np.int64(7)})) == {"n": 0.1, "i": 7}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_bit_for_bit(name):
    source = torch.arange(-6, 18).reshape(2, 3, 4).to(DTYPES[name])
    found = unpack(pack({"t": source}))["t"]
    assert found.dtype == source.dtype
    assert torch.equal(found, source)
    found[0] = 1  # memory of its own, which may be written to


def test_bits_of_nan_and_zero():
    source = torch.tensor([0x7FC00001, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    assert torch.equal(unpack(pack(source)).view(torch.int32), source.view(torch.int32))


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
    found = unpack(pack([tensor]))[0]
    assert found.stride() == tensor.stride()
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("tensor", [torch.zeros(()).expand(3, 2), torch.arange(20)[::2], torch.randn(4, 6)[:, 1:3]])
def test_views_travel_dense(tensor):
    packed = pack(tensor)
    assert packed.size == tensor.numel() * tensor.element_size()
    assert torch.equal(unpack(packed), tensor)


def test_a_tensor_in_two_places_travels_once():
    tensor = torch.randn(5)
    packed = pack({"a": tensor, "b": [tensor]})
    assert len(packed.tensors) == 1
    found = unpack(packed)
    assert found["a"] is found["b"][0]


def test_large_fp32_tensors_may_travel_as_bf16():
    large, small, whole = torch.randn(40, 30), torch.randn(30), torch.arange(2000)
    packed = pack({"large": large.T, "small": small, "whole": whole, "again": large.T}, half=True)
    found = unpack(packed)
    assert torch.equal(found["large"], large.T.bfloat16().float())
    assert found["large"].stride() == large.T.stride()
    assert torch.equal(found["small"], small)
    assert torch.equal(found["whole"], whole)
    assert len(packed.tensors["t0"].data) == 2 * large.numel()
    with pytest.raises(Malformed, match="where bf16 is said to come"):
        unpack(PackedMessage(json.dumps({"halved": ["t0", [1]]}), {"t0": GOOD}))


def test_arrays_stay_arrays():
    array = np.arange(12).reshape(3, 4)[:, ::2]
    found = unpack(pack({"x": array}))["x"]
    assert isinstance(found, np.ndarray)
    assert (found == array).all()


@pytest.mark.parametrize(
    ("value", "why"),
    [({"a": object()}, r"message\['a'\] is of type object"), ({1.5: 1}, "a key of type float"),
     ([torch.eye(2).to_sparse()], "sparse")],
)  # fmt: skip
def test_what_cannot_travel(value, why):
    with pytest.raises(TypeError, match=why):
        pack(value)


GOOD = Raw("float32", (2,), b"\0" * 8)


@pytest.mark.parametrize(
    ("tree", "tensors", "why"),
    [
        ("{", {}, "not JSON"),
        ({"tensor": ["t0", [1]]}, {}, "did not come with it"),
        (1, {"t0": GOOD}, "does not name"),
        ({"tensor": ["t0", [2]]}, {"t0": GOOD}, "leave gaps"),
        ({"tensor": ["t0", [-1]]}, {"t0": GOOD}, "strides that no tensor has"),
        ({"tensor": ["t0", [1, 1]]}, {"t0": GOOD}, "strides that no tensor has"),
        ({"tensor": ["t0", [1]]}, {"t0": GOOD._replace(data=b"\0" * 7)}, "7 bytes where 8 belong"),
        ({"tensor": ["t0", [1]]}, {"t0": GOOD._replace(shape=(-2,))}, "in a shape that no tensor has"),
        ({"tensor": ["t0", [1]]}, {"t0": GOOD._replace(dtype="object")}, "type 'object'"),
        ({"pickle": "x"}, {}, "describes no message"),
        ({"dict": [["a"]]}, {}, "dict that is none"),
        ({"dict": [[[1], 2]]}, {}, "dict that is none"),
        ({"float": "1"}, {}, "describes no message"),
        ({"list": [], "dict": []}, {}, "describes no message"),
        ([], {}, "describes no message"),
    ],
)
def test_what_is_refused(tree, tensors, why):
    with pytest.raises(Malformed, match=why):
        unpack(PackedMessage(tree if tree == "{" else json.dumps(tree), tensors))


def test_depth_and_length_are_bounded(monkeypatch):
    deep: object = 1
    for _ in range(80):
        deep = {"list": [deep]}
    with pytest.raises(Malformed, match="too deep"):
        unpack(PackedMessage(json.dumps(deep), {}))
    monkeypatch.setattr("fedkern.flower.runs.portable.LONGEST_TEXT", 10)
    with pytest.raises(Malformed, match="10 is the most"):
        unpack(pack("a text of more than ten characters"))


@pytest.mark.parametrize("number", [1 << 64, -(1 << 64), int("9" * 400)])
def test_whole_numbers_have_64_bits(number):
    with pytest.raises(TypeError, match="whole number of more than 64 bits"):
        pack({"n": number})
    with pytest.raises(Malformed, match="whole number of more than 64 bits"):
        unpack(PackedMessage(json.dumps(number), {}))
    assert unpack(pack((1 << 64) - 1)) == (1 << 64) - 1


@pytest.mark.parametrize("text", ["Infinity", "NaN", "1e999"])
def test_no_number_that_json_does_not_have(text):
    with pytest.raises(Malformed, match="describes no message"):
        unpack(PackedMessage(text, {}))
