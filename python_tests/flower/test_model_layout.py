"""Layouts of models and the check of replies against them, without Flower."""

import json

import numpy as np
import pytest
import torch

from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT, LISTING, Misfit
from fedkern.flower.model_layout import Layout, Model
from python_tests.flower.test_array_bytes import Sent, save_array

MODEL = {
    "conv.weight": np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32),
    "bn.weight": np.ones(5, np.float32),
    "bn.running_var": np.full(5, 0.5, np.float32),
    "bn.num_batches_tracked": np.array(7),
    "head": np.arange(6, dtype=np.float32).reshape(2, 3),
}


def record(model):
    return {key: save_array(np.asarray(value)) for key, value in model.items()}


def flat(model, dtype="float32", **changes):
    floats = [np.asarray(v).ravel() for v in model.values() if np.asarray(v).dtype.kind == "f"]
    vector = torch.from_numpy(np.concatenate(floats)).to(array_bytes.FLOATS[dtype])
    rows = [[key, list(np.shape(value)), np.asarray(value).dtype.name] for key, value in model.items()]
    made = {
        FLAT: Sent(dtype, (len(vector),), FLAT, array_bytes.raw_bytes(vector)),
        LISTING: Sent("uint8", (1,), LISTING, json.dumps(rows).encode()),
    }
    made |= {key: save_array(np.asarray(value)) for key, value in model.items() if np.asarray(value).dtype.kind != "f"}
    return made | changes


LAYOUT = Layout.of(record(MODEL))


def test_places_lie_one_after_another_and_small_neighbours_share_a_segment():
    places = [(entry.key, entry.begin, entry.end) for entry in LAYOUT.floating]
    assert places == [
        ("conv.weight", 0, 10_000), ("bn.weight", 10_000, 10_005), ("bn.running_var", 10_005, 10_010),
        ("head", 10_010, 10_016),
    ]  # fmt: skip
    assert [[entry.key for entry in run] for run in LAYOUT.segments] == [
        ["conv.weight"], ["bn.weight", "bn.running_var", "head"]
    ]  # fmt: skip
    assert (LAYOUT.size, LAYOUT.dtype) == (10_016, torch.float32)
    assert [entry.key for entry in LAYOUT.integers] == ["bn.num_batches_tracked"]
    assert [entry.key for entry in LAYOUT.floating if entry.variance] == ["bn.running_var"]


@pytest.mark.parametrize("sent", [record(MODEL), flat(MODEL)], ids=["plain", "flat"])
def test_a_model_gives_the_same_numbers_plain_and_flat(sent):
    model = Model(sent, LAYOUT)
    model.check_numbers()
    wanted = np.concatenate([value.ravel() for value in MODEL.values() if value.dtype.kind == "f"])
    assert np.array_equal(model.vector().numpy(), wanted)
    assert np.array_equal(torch.cat(list(model.segments())).numpy(), wanted)
    assert model.integers["bn.num_batches_tracked"] == 7
    assert np.array_equal(model.entry(LAYOUT.floating[3]).numpy(), np.arange(6))


def test_large_entries_and_flat_vectors_are_not_copied():
    for sent in (record(MODEL), flat(MODEL)):
        data = sent[FLAT].data if FLAT in sent else sent["conv.weight"].data
        begin = np.frombuffer(data, np.uint8).ctypes.data
        part = next(Model(sent, LAYOUT).segments())
        assert begin <= part.data_ptr() < begin + len(data)


def test_a_reply_may_have_another_floating_dtype():
    wide = {key: value.astype(np.float64) if value.dtype.kind == "f" else value for key, value in MODEL.items()}
    assert Model(record(wide), LAYOUT).vector().dtype == torch.float32
    half = Model(flat(MODEL, "bfloat16"), LAYOUT)
    assert torch.equal(half.vector(), Model(record(MODEL), LAYOUT).vector().bfloat16().float())


def change_model(**entries):
    model = {**MODEL, **{key.replace("__", "."): value for key, value in entries.items()}}
    return {key: value for key, value in model.items() if value is not None}


def with_nan(value):
    value = value.copy()
    value.flat[-1] = np.nan
    return value


BAD = {
    "lacks": (record(change_model(head=None)), "keys", "lacks 'head'"),
    "more": (record(change_model(more=np.zeros(2))), "keys", "should not hold 'more'"),
    "shape": (record(change_model(head=np.zeros((3, 2), np.float32))), "shapes", r"'head' of shape \[3, 2\]"),
    "whole for floating": (record(change_model(head=np.zeros((2, 3), int))), "dtypes", "a floating dtype is expected"),
    "floating for whole": (record(change_model(bn__num_batches_tracked=np.array(1.0))), "dtypes", "int64 is expected"),
    "int32 for int64": (record(change_model(bn__num_batches_tracked=np.array(1, np.int32))), "dtypes", "int32"),
    "flat of another length": (
        flat(MODEL, **{FLAT: Sent("float32", (3,), FLAT, b"\0" * 12)}), "size", "3 elements where 10016",
    ),
    "flat as .npy": (flat(MODEL, **{FLAT: save_array(np.zeros(10_016, int))}), "dtypes", "another encoding"),
    "flat without a list": ({k: v for k, v in flat(MODEL).items() if k != LISTING}, "keys", "lacks"),
    "flat with a foreign list": (flat(change_model(head=None, heads=MODEL["head"])), "keys", "lacks 'head'"),
    "flat in another order": (flat(dict(reversed(MODEL.items()))), "keys", "another order"),
    "flat and plain": (flat(MODEL, head=save_array(MODEL["head"])), "keys", "should not hold 'head'"),
    "a list that is no list": (flat(MODEL, **{LISTING: Sent("uint8", (1,), LISTING, b"7")}), "keys", "cannot be read"),
    "a list of lists": (flat(MODEL, **{LISTING: Sent("uint8", (1,), LISTING, b"[" * 9**5)}), "keys", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_record_that_does_not_fit_is_refused_by_name(case):
    sent, reason, text = BAD[case]
    with pytest.raises(Misfit, match=text) as caught:
        Model(sent, LAYOUT)
    assert caught.value.reason == reason


NUMBERS = {
    "NaN in a large entry": (change_model(conv__weight=with_nan(MODEL["conv.weight"])), "finite", "conv.weight"),
    "NaN in a small entry": (change_model(head=with_nan(MODEL["head"])), "finite", "'head'"),
    "fp64 that fp32 cannot hold": (change_model(head=np.full((2, 3), 1e300)), "finite", "'head'"),
    "infinity": (change_model(bn__weight=np.full(5, np.inf, np.float32)), "finite", "bn.weight"),
    "negative variance": (change_model(bn__running_var=np.full(5, -1e-9, np.float32)), "variance", "running_var"),
}


@pytest.mark.parametrize("form", [record, flat], ids=["plain", "flat"])
@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_checked(case, form):
    model, reason, text = NUMBERS[case]
    with pytest.raises(Misfit, match=text) as caught:
        Model(form(model), LAYOUT).check_numbers()
    assert caught.value.reason == reason


def test_numbers_whose_sum_overflows_are_finite():
    Model(record(change_model(conv__weight=np.full((100, 100), 3e38, np.float32))), LAYOUT).check_numbers()


def test_the_distance_is_taken_in_fp64():
    rng = np.random.default_rng(1)
    far = {k: v + rng.normal(0, 1e-6, v.shape).astype(v.dtype) if v.dtype.kind == "f" else v for k, v in MODEL.items()}
    wanted = np.sqrt(sum(((far[k].astype(float) - MODEL[k]) ** 2).sum() for k in MODEL if MODEL[k].dtype.kind == "f"))
    found = Model(flat(far), LAYOUT).distance(Model(record(MODEL), LAYOUT))
    assert found == pytest.approx(wanted, rel=1e-12)


def test_forms_of_a_round_are_read_once_and_others_anew():
    layout = Layout.of(record(MODEL))
    model, again = Model(record(MODEL), layout), Model(record(MODEL), layout)
    assert torch.equal(model.vector(), again.vector())
    assert model.nbytes == again.nbytes == 4 * layout.size
    cut = record(MODEL)
    cut["head"] = cut["head"]._replace(data=cut["head"].data[:-4])
    with pytest.raises(Misfit, match="20 bytes where 24 belong"):
        Model(cut, layout)
    turned = {**MODEL, "head": np.asfortranarray(MODEL["head"])}
    assert torch.equal(Model(record(turned), layout).vector(), model.vector())
    with pytest.raises(Misfit, match=r"of shape \[3, 2\] where \[2, 3\] is expected"):
        Model(record({**MODEL, "head": MODEL["head"].T.copy()}), layout)
