"""Means of models without Flower: in every order, kept or added on arrival, and rejected models."""

import io
import itertools

import numpy as np
import pytest
import torch

from fedkern import ops
from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT
from fedkern.flower.model_layout import Layout, Model
from fedkern.flower.model_sums import AllModels, NewModel, RunningMean, take_rank
from python_tests.flower.test_model_layout import LAYOUT, MODEL, flat, record

WEIGHTS = [3.0, 1000.0, 17.0, 1.0, 250.0]
KEYS = ("conv.weight", "bn.weight", "bn.running_var", "head")


def make_model(seed):
    rng = np.random.default_rng(seed)
    made = {key: value + rng.standard_normal(np.shape(value)).astype(np.float32) for key, value in MODEL.items()}
    made["bn.running_var"] = abs(made["bn.running_var"])
    made["bn.num_batches_tracked"] = np.array(seed)
    return made


MODELS = [make_model(seed) for seed in range(len(WEIGHTS))]


def gather(models, order=None, layout=LAYOUT, form=record, weights=WEIGHTS):
    made = AllModels(layout)
    for node in order or range(len(models)):
        made.add(Model(form(models[node]), layout), weights[node], node)
    made.sort()
    return made


def expect(models, weights=WEIGHTS):
    return {
        key: ops.weighted_mean([torch.from_numpy(np.ravel(model[key])) for model in models], weights).numpy()
        for key in KEYS
    }


WANTED = expect(MODELS)


def same(vector, means=WANTED):
    return all(np.array_equal(vector[e.begin : e.end].numpy(), means[e.key]) for e in LAYOUT.floating)


@pytest.mark.parametrize("form", [record, flat], ids=["plain", "flat"])
def test_the_order_changes_no_bit(form):
    vectors = []
    for order in list(itertools.permutations(range(5)))[::17]:
        models = gather(MODELS, order, form=form)
        assert same(models.mean(as_arrays=False).vector)
        assert int(models.integers()["bn.num_batches_tracked"]) == 4
        total = RunningMean(LAYOUT)
        for node in order:
            total.add(Model(form(MODELS[node]), LAYOUT), WEIGHTS[node], node)
        made, integers = total.result(NewModel(LAYOUT, False))
        assert int(integers["bn.num_batches_tracked"]) == 4
        vectors.append(made.vector)
    assert all(torch.equal(vector, vectors[0]) for vector in vectors)
    means = np.concatenate([WANTED[entry.key] for entry in LAYOUT.floating])
    np.testing.assert_allclose(vectors[0].numpy(), means, rtol=1e-6)


def test_the_mean_is_written_to_the_bytes_of_arrays():
    made = gather(MODELS).mean(as_arrays=True)
    assert made.vector is None
    for key, numbers in WANTED.items():
        found = np.load(io.BytesIO(made.data[key]), allow_pickle=False)
        assert found.dtype == np.float32
        assert np.array_equal(found.ravel(), numbers)
    layout = Layout.of(flat(MODEL))
    made = gather(MODELS, layout=layout, form=flat).mean(as_arrays=True)
    assert list(made.data) == [FLAT]
    assert made.data[FLAT] == b"".join(WANTED[entry.key].tobytes() for entry in layout.floating)


def test_other_dtypes_get_a_vector():
    layout = Layout.of(flat(MODEL, "bfloat16"))
    assert gather(MODELS, layout=layout, form=flat).mean(as_arrays=True).vector.dtype == torch.float32
    wide = NewModel(LAYOUT, False, torch.float64)
    assert wide.vector.dtype == torch.float64


@pytest.mark.parametrize("key", ["conv.weight", "bn.weight", "head"])
@pytest.mark.parametrize("values", [(np.nan, np.inf), (np.inf, -np.inf), (-np.inf, np.nan)])
def test_models_that_are_not_finite_leave_no_trace(key, values):
    models, weights = list(MODELS), list(WEIGHTS)
    for place, value in zip((1, 3), values, strict=True):
        bad = {**make_model(90 + place), key: np.array(make_model(90 + place)[key])}
        bad[key].flat[-1] = value
        models.insert(place, bad)
        weights.insert(place, 77.0)
    made = gather(models, list(range(7))[::-1], weights=weights)
    assert same(made.mean(as_arrays=False).vector)
    assert int(made.integers()["bn.num_batches_tracked"]) == 4  # not that of the bad ones
    assert {place: misfit.reason for place, misfit in made.refused.items()} == {3: "finite", 5: "finite"}
    assert all(repr(key) in str(misfit) for misfit in made.refused.values())


def test_no_mean_of_nothing():
    assert gather([]).mean(False) is None
    assert gather(MODELS, weights=[0.0] * 5).mean(False) is None
    assert RunningMean(LAYOUT).result(NewModel(LAYOUT, False)) is None
    bad = {**MODEL, "head": np.full((2, 3), np.nan, np.float32)}
    made = gather([bad, bad])
    assert made.mean(False) is None
    assert sorted(made.refused) == [0, 1]


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint16, bool])
def test_whole_numbers_by_rank(kind):
    rows = [np.array([[3, 1], [0, 2]]).astype(kind), np.array([[1, 0], [0, 9]]).astype(kind), np.zeros((2, 2), kind)]
    assert np.array_equal(take_rank(rows), np.maximum(np.maximum(rows[0], rows[1]), rows[2]))
    assert np.array_equal(take_rank(rows, 1), np.median(np.stack(rows).astype(float), axis=0).astype(kind))
    assert take_rank(rows, 0).dtype == kind


def test_new_bytes_share_their_memory_with_a_vector():
    data, vector = array_bytes.allocate_bytes(b"head" * 4, torch.float32, 5)
    vector.copy_(torch.arange(5.0))
    assert data == b"head" * 4 + np.arange(5, dtype=np.float32).tobytes()
    del data
    assert vector.sum() == 10
    assert array_bytes.allocate_bytes(b"head", torch.float16, 0)[0] == b"head"
