"""ops.tree: operators for lists of state dicts, of lists of NumPy arrays and of dicts of arrays."""

import copy
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from fedkern import ops
from fedkern.ops import tree

LARGE = tree._LARGE
WEIGHTS = [3.0, 1.0, 2.0, 5.0, 1.0]


def network(seed):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Flatten(), nn.Linear(40 * 36, 10))
    module[0].to(memory_format=torch.channels_last)
    module[1].num_batches_tracked.fill_(10 + seed)
    return module


A, B = "models[0]['a']", "models[1]['a']"
MASK = f"{A} must be an array without a mask, not a masked one; .filled(value) makes one"
TWO, THREE = torch.zeros(2), torch.zeros(3)


@pytest.fixture(scope="module")
def states():
    return [network(seed).state_dict() for seed in range(len(WEIGHTS))]


def stack_of(states, name):
    return torch.stack([state[name].reshape(-1) for state in states])


CALLS = {
    "weighted_mean": (lambda models: tree.weighted_mean(models, WEIGHTS), lambda x: ops.weighted_mean(x, WEIGHTS)),
    "median": (tree.median, ops.median),
    "weighted median": (lambda models: tree.median(models, WEIGHTS), lambda x: ops.median(x, WEIGHTS)),
    "trimmed_mean": (lambda models: tree.trimmed_mean(models, 1), lambda x: ops.trimmed_mean(x, 1)),
    "weighted trimmed": (
        lambda models: tree.trimmed_mean(models, 1, WEIGHTS),
        lambda x: ops.trimmed_mean(x, 1, WEIGHTS),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_entry_is_what_the_operator_makes_of_it(states, name):
    whole, one = CALLS[name]
    result = whole(states)
    assert list(result) == list(states[0])
    assert any(t.numel() >= LARGE for t in states[0].values())
    assert any(t.is_floating_point() and t.numel() < LARGE for t in states[0].values())
    for key, given in states[0].items():
        assert (result[key].shape, result[key].dtype, result[key].stride()) == (
            given.shape,
            given.dtype,
            given.stride(),
        )
        if given.is_floating_point():
            assert torch.equal(result[key].reshape(-1), one(stack_of(states, key)))
    assert result["1.num_batches_tracked"] == 14


def test_a_state_dict_loads_again(states):
    result = tree.median(states)
    assert isinstance(result, OrderedDict)
    assert result._metadata == states[0]._metadata
    module = network(9)
    module.load_state_dict(result)
    assert torch.equal(module[0].weight, result["0.weight"])


def test_krum_compares_whole_models(states):
    far = copy.deepcopy(states[1])
    far["3.bias"] += 100  # one small entry makes the model an outlier
    models = [states[0], far, *states[2:]]
    flat = torch.stack([torch.cat([t.reshape(-1) for t in s.values() if t.is_floating_point()]) for s in models])
    for keep in (1, 3):
        result = tree.krum(models, byzantine=1, keep=keep)
        expected = ops.krum(flat, byzantine=1, keep=keep)
        found = torch.cat([t.reshape(-1) for t in result.values() if t.is_floating_point()])
        assert torch.equal(found, expected)


def test_lists_of_arrays_stay_lists_of_arrays():
    rng = np.random.default_rng(0)
    models = [
        [
            rng.normal(size=(200, 60)).astype(np.float32),
            rng.normal(size=7),
            np.array(3 + m),
            np.float32(m),
            np.zeros((0, 2)),
        ]
        for m in range(3)
    ]
    for model in models:
        model[1].flags.writeable = False  # arrays read from bytes are such
    result = tree.weighted_mean(models, [1, 1, 2])
    assert type(result) is list
    for entry, given in zip(result, models[0], strict=True):
        assert isinstance(entry, np.ndarray)
        assert (entry.shape, entry.dtype) == (np.shape(given), given.dtype)
    for i in (0, 1):
        exact = (models[0][i].astype(np.float64) + models[1][i] + 2.0 * models[2][i]) / 4
        np.testing.assert_array_equal(result[i], exact.astype(models[0][i].dtype))
    assert result[2] == 5
    assert result[3] == 1.25
    assert type(tree.median([tuple(model) for model in models])) is tuple


def test_arrays_of_any_layout_and_byte_order_are_read():
    base = np.arange(20000, dtype=np.float32).reshape(100, 200)
    models = [{"a": base.T, "b": base[::-2, ::3], "c": base[0].astype(">f4")} for _ in range(2)]
    result = tree.weighted_mean(models, [1, 2])
    for name, given in models[0].items():
        np.testing.assert_array_equal(result[name], given)


def test_unsigned_and_boolean_entries_become_the_largest():
    models = [
        {"a": np.array([1, 9], np.uint16), "b": np.array([True, False])},
        {"a": np.array([2, 3], np.uint16), "b": np.array([False, False])},
    ]
    result = tree.weighted_mean(models, [1, 1])
    np.testing.assert_array_equal(result["a"], np.array([2, 9], np.uint16))
    np.testing.assert_array_equal(result["b"], [True, False])
    assert result["a"].dtype == np.uint16


def test_models_of_several_dtypes():
    models = [{"a": torch.randn(5, dtype=torch.bfloat16), "b": torch.randn(4)} for _ in range(4)]
    result = tree.krum(models, byzantine=0)
    assert any(all(torch.equal(result[k], model[k]) for k in model) for model in models)
    assert result["a"].dtype == torch.bfloat16
    mean = tree.weighted_mean(models, [1, 1, 1, 1])
    assert torch.equal(mean["a"], ops.weighted_mean([model["a"] for model in models], [1] * 4))


@pytest.mark.parametrize("average", ["weighted_mean", "median", "trimmed_mean", "krum"])
@pytest.mark.parametrize("form", ["tensors", "transposed", "arrays", "several dtypes"])
def test_every_entry_of_a_result_has_its_own_memory(average, form):
    """So a model of small matrices is pickled in its own size, and one entry keeps no other alive."""

    def entry(i):
        tensor = torch.randn(30, 20, dtype=torch.float64 if form == "several dtypes" and i % 2 else torch.float32)
        return tensor.t() if form == "transposed" else tensor.numpy() if form == "arrays" else tensor

    models = [{f"layer{i}": entry(i) for i in range(40)} for _ in range(4)]
    arguments = {"weighted_mean": ([1, 2, 3, 4],), "median": (), "trimmed_mean": (1,), "krum": (0, 2)}[average]
    result = getattr(tree, average)(models, *arguments)
    assert len(pickle.dumps(result)) < 1.5 * len(pickle.dumps(models[0]))
    if form == "arrays":
        assert all(array.base is None or array.base.nbytes == array.nbytes for array in result.values())
    else:
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in result.values())
    assert len({id(entry) for entry in result.values()}) == 40


@pytest.mark.parametrize("average", [lambda x: tree.weighted_mean(x, [1, 1]), tree.median, lambda x: tree.krum(x, 0)])
@pytest.mark.parametrize("size", [3, 10_000])
def test_models_of_other_dtypes_are_refused_whatever_their_size(average, size):
    models = [{"a": torch.zeros(size), "b": torch.zeros(2)} for _ in range(3)]
    models[1]["a"] = models[1]["a"].to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"models\[1\]\['a'\] must have dtype torch.float32, but has torch.bfloat16"):
        average(models[:2] if average is not tree.krum else models)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_no_counters(dtype):
    models = [{"a": torch.ones(2), "scale": torch.full((3,), value).to(dtype)} for value in (1.0, 3.0)]
    for average in (lambda: tree.weighted_mean(models, [1, 1]), lambda: tree.median(models)):
        with pytest.raises(TypeError, match=r"models\[0\]\['scale'\] must be float32, .* has dtype torch.float8"):
            average()


@pytest.mark.parametrize("call", [lambda x: ops.weighted_mean(x, [1, 1]), ops.median, ops.geometric_median,
                                  ops.pairwise_distances, lambda x: ops.clip_by_norm(x, 1.0)])  # fmt: skip
@pytest.mark.parametrize("model", [{"a": TWO}, [TWO], (TWO,), TWO.numpy()], ids=["dict", "list", "tuple", "array"])
def test_operators_on_vectors_name_the_ones_on_models(call, model):
    with pytest.raises(TypeError, match=r"vectors\[0\] must be a tensor \[P\], .* fedkern.ops.tree takes whole models"):
        call([model, model])


def test_the_given_models_stay_as_they_are(states):
    before = copy.deepcopy(states)
    for call in (lambda: tree.weighted_mean(states, WEIGHTS), lambda: tree.krum(states, 1)):
        call()
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, states, strict=True) for k in a)


def test_parameters_that_need_a_gradient_are_read_as_values():
    models = [dict(nn.Linear(3, 2).named_parameters()) for _ in range(3)]
    result = tree.median(models)
    assert not result["weight"].requires_grad


@pytest.mark.parametrize(
    ("models", "kind", "sentence"),
    [
        ([], ValueError, "models must hold at least one model, but is empty"),
        ({"a": TWO}, TypeError, "models must be a list of models, not dict"),
        ([THREE], TypeError, "a model must be a state dict, a dict of arrays or a list of arrays, not a Tensor"),
        ([{"a": TWO}, [TWO]], TypeError, "models[1] must be a dict as models[0] is, not a list"),
        ([{"a": TWO}, {}], ValueError, "models[1] must have the entries of models[0], but lacks 'a'"),
        ([{}, {"a": TWO}], ValueError, "models[1] must have the entries of models[0], but has 'a' too"),
        ([[TWO], []], ValueError, "models[1] must have 1 entries as models[0], but has 0"),
        ([{"a": TWO}, {"a": THREE}], ValueError, f"{B} must have shape [2], but has [3]"),
        ([{"a": TWO}, {"a": TWO.double()}], TypeError, f"{B} must have dtype torch.float32, but has torch.float64"),
        ([{"a": "x"}], TypeError, f"{A} must be a tensor or a NumPy array, not str"),
        ([{"a": np.array(["x"])}], TypeError, f"{A} must hold numbers, but has dtype <U1"),
        ([{"a": TWO.to(torch.complex64)}], TypeError, f"{A} must be real, but has dtype torch.complex64"),
        ([{"a": np.ma.array([1.0, 2.0], mask=[False, True])}] * 2, TypeError, MASK),
        ([{"a": np.ma.array(np.arange(3), mask=False)}], TypeError, MASK),
        ([{"a": np.array([1, 2], "M8[s]")}], TypeError, f"{A} must hold numbers, but has dtype datetime64[s]"),
        ([{"a": np.zeros(2, [("x", "f4")])}], TypeError, f"{A} must hold numbers, but has dtype [('x', '<f4')]"),
        ([{"a": np.array([None])}], TypeError, f"{A} must hold numbers, but has dtype object"),
    ],
)
def test_what_is_wrong_is_said(models, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)):
        tree.weighted_mean(models, [1.0] * len(models))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8, torch.qint32])
def test_quantised_tensors_are_refused(dtype):
    """By whatever takes tensors of any real dtype."""
    quantised = torch.quantize_per_tensor(TWO, 0.1, 0, dtype)
    for models in ([{"a": quantised}] * 2, [{"a": quantised}, {"a": TWO}]):
        for call, arguments in ((tree.weighted_mean, (models, [1.0, 1.0])), (tree.krum, (models * 2, 0))):
            with pytest.raises(TypeError, match=re.escape(f"{A} must be a dense tensor, not a quantised one; .deq")):
                call(*arguments)
    images = torch.quantize_per_tensor(torch.zeros(1, 1, 2, 2), 0.1, 0, dtype)
    with pytest.raises(TypeError, match="images must be a dense tensor, not a quantised one"):
        ops.erase_boxes(images, torch.zeros(1, 1, 4))
    with pytest.raises(TypeError, match="boxes must be a dense tensor, not a quantised one"):
        ops.keep_boxes(images.dequantize(), torch.quantize_per_tensor(torch.zeros(1, 1, 4), 0.1, 0, dtype))


def test_wrong_arguments_are_said_even_without_floating_entries():
    models = [{"n": torch.tensor(1)}] * 2
    with pytest.raises(ValueError, match="weights"):
        tree.weighted_mean(models, [1.0])
    with pytest.raises(ValueError, match="models must have a floating entry, but have none"):
        tree.krum(models, 0)


def test_arrays_of_no_axes():
    models = [{"scale": np.array(value, np.float32), "rest": np.full(3, value, np.float32)} for value in range(1, 6)]
    assert tree.krum(models, 1, keep=5 - 1)["scale"].shape == ()
    made = tree.weighted_mean(models, [1.0] * 5)
    assert (made["scale"].shape, made["scale"].dtype, float(made["scale"])) == ((), np.float32, 3.0)
    lists = [[each["scale"], each["rest"]] for each in models]
    assert float(tree.weighted_mean(lists, [1.0] * 5)[0]) == 3.0
