"""Means of models without Flower: every order, every number of models held at once, and models that do not count."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from test_model_layout import LAYOUT, MODEL, flat, record

from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT
from fedkern.flower.exact_mean import ExactMean, NewModel
from fedkern.flower.model_layout import Layout, Model

COUNT = 5
WEIGHTS = [3.0, 1000.0, 17.0, 1.0, 250.0]


def changed(seed):
    rng = np.random.default_rng(seed)
    made = {key: value + rng.standard_normal(np.shape(value)).astype(np.float32) for key, value in MODEL.items()}
    made["bn.running_var"] = abs(made["bn.running_var"])
    made["bn.num_batches_tracked"] = np.array(seed)
    return made


MODELS = [changed(seed) for seed in range(COUNT)]
ROOMS = [0.0, 90_000.0, math.inf]  # one model, two, all


def mean_of(models, weights=None, room=math.inf, layout=LAYOUT, expected=0, as_arrays=False, form=record):
    gathered = ExactMean(layout, expected, room)
    most = 0
    for node, model in enumerate(models):
        gathered.add(Model(form(model), layout), WEIGHTS[node] if weights is None else weights[node], node)
        most = max(most, len(gathered._held))
    gathered.close(NewModel(layout, as_arrays))
    return gathered, most


def wanted(models, weights):
    """Correctly rounded sums over the sum of the weights."""
    made = {}
    for key in ("conv.weight", "bn.weight", "bn.running_var", "head"):
        rows = [
            (np.asarray(model[key], np.float64).ravel() * weight).tolist()
            for model, weight in zip(models, weights, strict=True)
        ]
        sums = [math.fsum(column) / math.fsum(weights) for column in zip(*rows, strict=True)]
        made[key] = np.array(sums, np.float32).reshape(MODEL[key].shape)
    return made


WANTED = wanted(MODELS, WEIGHTS)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("form", [record, flat], ids=["plain", "flat"])
def test_order_and_room_change_no_bit(room, form):
    for order in list(itertools.permutations(range(COUNT)))[::17]:
        gathered, _ = mean_of([MODELS[i] for i in order], [WEIGHTS[i] for i in order], room, form=form)
        made, whole = gathered.result()
        for entry in LAYOUT.floating:
            assert np.array_equal(made.vector[entry.begin : entry.end].numpy(), WANTED[entry.key].ravel())
        assert int(whole["bn.num_batches_tracked"]) == COUNT - 1
        assert gathered.refused == []


def test_models_are_held_as_room_allows():
    sizes = [mean_of(MODELS, room=room)[1] for room in ROOMS]
    assert sizes == [0, 1, COUNT]  # after a call, of which the last adds what is held
    assert mean_of(MODELS[:1], room=0.0, expected=1)[1] == 1  # the only one needs no sums


@pytest.mark.parametrize("room", ROOMS)
def test_the_mean_is_written_to_the_bytes_of_arrays(room):
    made, _ = mean_of(MODELS, room=room, as_arrays=True)[0].result()
    assert made.vector is None
    for key, numbers in WANTED.items():
        found = np.load(io.BytesIO(made.data[key]), allow_pickle=False)
        assert found.dtype == np.float32
        assert np.array_equal(found, numbers)


def test_the_bytes_of_a_flat_vector():
    layout = Layout.of(flat(MODEL))
    made, _ = mean_of(MODELS, layout=layout, as_arrays=True, form=flat)[0].result()
    assert list(made.data) == [FLAT]
    assert made.data[FLAT] == b"".join(WANTED[entry.key].tobytes() for entry in layout.floating)


def test_other_dtypes_get_a_vector():
    layout = Layout.of(flat(MODEL, "bfloat16"))
    made, _ = mean_of(MODELS, layout=layout, as_arrays=True, form=flat)[0].result()
    assert made.vector.dtype == torch.float32
    half = Layout(
        [(key, np.shape(value), "float16") for key, value in MODEL.items() if key != "bn.num_batches_tracked"]
    )
    small = [{key: np.asarray(m[key], np.float16) for key in WANTED} for m in MODELS]
    made, _ = mean_of(small, layout=half, as_arrays=True)[0].result()
    found = np.load(io.BytesIO(made.data["head"]), allow_pickle=False)
    np.testing.assert_allclose(found, wanted(small, WEIGHTS)["head"], rtol=1e-3, atol=1e-3)
    assert found.dtype == np.float16


@pytest.mark.parametrize("room", ROOMS)
def test_models_of_fp64(room):
    wide = [{key: np.asarray(m[key], np.float64) * 1.1 for key in WANTED} for m in MODELS]
    layout = Layout.of(record(wide[0]))
    gathered, _ = mean_of([*wide, {**wide[0], "head": np.full((2, 3), np.inf)}], [*WEIGHTS, 1.0], room, layout)
    assert [refused.node for refused in gathered.refused] == [COUNT]
    made, _ = gathered.result()
    for entry in layout.floating:
        rows = [(m[entry.key].ravel() * weight).tolist() for m, weight in zip(wide, WEIGHTS, strict=True)]
        means = [math.fsum(column) / math.fsum(WEIGHTS) for column in zip(*rows, strict=True)]
        assert made.vector[entry.begin : entry.end].tolist() == means


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("key", ["conv.weight", "bn.weight", "head"])
def test_models_that_are_not_finite_leave_no_trace(room, key):
    models, weights = list(MODELS), list(WEIGHTS)
    for place, value in ((1, np.nan), (3, np.inf)):
        bad = {**changed(90 + place), key: np.full(MODEL[key].shape, value, np.float32)}
        models.insert(place, bad)
        weights.insert(place, 77.0)
    gathered, _ = mean_of(models, weights, room)
    made, whole = gathered.result()
    for entry in LAYOUT.floating:
        assert np.array_equal(made.vector[entry.begin : entry.end].numpy(), WANTED[entry.key].ravel())
    assert {(refused.node, refused.nth, refused.misfit.reason) for refused in gathered.refused} == {
        (1, 0, "finite"), (3, 0, "finite"),
    }  # fmt: skip
    assert all(repr(key) in str(refused.misfit) for refused in gathered.refused)
    assert int(whole["bn.num_batches_tracked"]) == COUNT - 1  # not that of the bad ones


@pytest.mark.parametrize("room", ROOMS)
def test_no_mean_of_nothing(room):
    assert mean_of([], room=room)[0].result() is None
    assert mean_of(MODELS, [0.0] * COUNT, room)[0].result() is None
    bad = {**MODEL, "head": np.full((2, 3), np.nan, np.float32)}
    gathered, _ = mean_of([bad, bad], room=room)
    assert gathered.result() is None
    assert len(gathered.refused) == 2


def test_several_replies_of_a_node_are_told_apart():
    bad = {**MODEL, "head": np.full((2, 3), np.nan, np.float32)}
    gathered = ExactMean(LAYOUT, 0, 0.0)
    for model in (MODELS[0], bad, MODELS[1]):
        gathered.add(Model(record(model), LAYOUT), 2.0, 9)
    gathered.close(NewModel(LAYOUT, False))
    assert [refused[:2] for refused in gathered.refused] == [(9, 1)]
    made, _ = gathered.result()
    assert np.array_equal(made.vector[-6:].numpy(), wanted(MODELS[:2], [2.0, 2.0])["head"].ravel())


def test_new_bytes_share_their_memory_with_a_vector():
    data, vector = array_bytes.writable(b"head" * 4, torch.float32, 5)
    vector.copy_(torch.arange(5.0))
    assert data == b"head" * 4 + np.arange(5, dtype=np.float32).tobytes()
    del data
    assert vector.sum() == 10
    assert array_bytes.writable(b"head", torch.float16, 0)[0] == b"head"
