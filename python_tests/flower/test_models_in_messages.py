"""Models in Flower messages, without Flower: bytes of arrays, layouts, means, tracebacks, and imports."""

import importlib.util
import io
import itertools
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fedkern import ops
from fedkern.errors import UserError
from fedkern.flower import array_bytes
from fedkern.flower.array_bytes import FLAT, LISTING, NUMPY, Misfit
from fedkern.flower.client_tracebacks import ClientAppFailed, with_traceback
from fedkern.flower.model_layout import Layout, Model
from fedkern.flower.model_sums import AllModels, NewModel, RunningMean, take_rank


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


# -- model layout ------------------------------------------------------------------------------------------------------


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


# -- model sums --------------------------------------------------------------------------------------------------------


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


# -- without flower ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="flwr is installed")
def test_the_import_says_what_to_install():
    with pytest.raises(UserError, match="needs Flower, which is not installed: pip install "):
        import fedkern.flower.strategies  # noqa: F401


# -- client tracebacks -------------------------------------------------------------------------------------------------


def test_an_exception_has_its_traceback_as_message():
    def broken(message, context):
        raise KeyError(message)

    with pytest.raises(ClientAppFailed, match=r"(?s)^Traceback .*in broken\n.*KeyError: 'images'") as raised:
        with_traceback("images", None, broken)
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_reply_passes():
    assert with_traceback("message", "context", lambda *given: given) == ("message", "context")
