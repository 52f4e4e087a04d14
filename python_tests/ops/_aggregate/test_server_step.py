"""Tests of server_step: every available backend and ISA level against Flower's NumPy formulas, and shared memory."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops import server_step
from python_tests.ops._aggregate.aggregate_cases import close, make_vectors, make_weights
from python_tests.ops.emulated_core import emulate
from python_tests.ops.operator_cases import BACKENDS, DTYPES, pairwise, thin_out, using

RULES = ["mean", "momentum", "adam", "yogi", "adagrad"]
# Flower's strategies FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad.
DEFAULTS: dict[str, dict[str, float]] = {
    "mean": {"learning_rate": 1.0},
    "momentum": {"learning_rate": 1.0, "beta1": 0.0},
    "adam": {"learning_rate": 1e-1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-9},
    "yogi": {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "adagrad": {"learning_rate": 1e-1, "beta1": 0.0, "tau": 1e-9},
}
OTHERS = {"learning_rate": 0.3, "beta1": 0.7, "beta2": 0.8, "tau": 0.02}


def states(rule: str, size: int, dtype: torch.dtype, seed: int = 7) -> dict[str, Tensor]:
    names = {"mean": [], "momentum": ["first"]}.get(rule, ["first", "second"])
    generator = torch.Generator().manual_seed(seed)
    return {name: (0.1 * torch.rand(size, generator=generator)).to(dtype) for name in names}


def in_numpy(rule, g, vectors, weights, moment, second, options):
    o = {**DEFAULTS[rule], **options}
    deltas = vectors - g
    used = [m for m, weight in enumerate(weights) if weight]
    shares = np.array([weights[m] / max(weights) for m in used])
    d = shares @ deltas[used] / shares.sum()
    if rule == "mean":
        model = g + o["learning_rate"] * d
    elif rule == "momentum":
        moment = o["beta1"] * moment + d
        model = g + o["learning_rate"] * moment
    else:
        moment = o["beta1"] * moment + (1 - o["beta1"]) * d
        if rule == "adam":
            second = o["beta2"] * second + (1 - o["beta2"]) * d**2
        elif rule == "yogi":
            second = second - (1 - o["beta2"]) * d**2 * np.sign(second - d**2)
        else:
            second = second + d**2
        model = g + o["learning_rate"] * moment / (np.sqrt(second) + o["tau"])
    norms = np.linalg.norm(deltas, axis=1)
    scale = norms * np.linalg.norm(d)
    cosines = np.divide(deltas @ d, scale, out=np.zeros(len(norms)), where=scale != 0)
    return model, norms, cosines, moment, second


def check(rule, count, size, dtype, kind="counts", state=torch.float32, defaults=True, seed=0):
    vectors = make_vectors(count, size, dtype, seed)
    (global_,) = make_vectors(1, size, dtype, seed + 1000)
    weights, options = make_weights(kind, count, seed), {} if defaults else dict(OTHERS)
    given = states(rule, size, state)
    before = {name: tensor.double().numpy().copy() for name, tensor in given.items()}
    stacked = torch.stack(vectors).double().numpy()
    wanted = in_numpy(
        rule, global_.double().numpy(), stacked, weights, before.get("first"), before.get("second"), options
    )
    copies, originals = ({name: tensor.clone() for name, tensor in given.items()} for _ in range(2))
    result = server_step(global_, vectors, weights, rule, **given, **options)
    assert result.model.dtype == dtype
    close(result.model, torch.from_numpy(wanted[0]))
    for number, expected in ((result.norms, wanted[1]), (result.cosines, wanted[2])):
        assert number.dtype == torch.float64
        torch.testing.assert_close(number, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    for name, expected in zip(("first", "second"), wanted[3:], strict=True):
        if name in given:
            close(given[name], torch.from_numpy(expected))
    bare = server_step(global_, vectors, weights, rule, **originals, **options, similarities=False)
    assert torch.equal(bare.model, result.model)
    assert all(torch.equal(originals[name], given[name]) for name in given)
    assert bare.norms.shape == bare.cosines.shape == (0,)
    # Stacked, weights in a tensor, the old model overwritten: the same bits.
    out = global_.clone()
    again = server_step(
        out, torch.stack(vectors), torch.tensor(weights, dtype=torch.float64), rule, **copies, **options, out=out
    )
    assert again.model is out
    assert torch.equal(out, result.model)
    assert all(torch.equal(copies[name], given[name]) for name in given)
    assert torch.equal(again.norms, result.norms)
    assert torch.equal(again.cosines, result.cosines)


@pytest.mark.parametrize("rule", RULES)
def test_an_infinity_in_all_models_stays_and_changes_nothing(backend: str, rule: str) -> None:
    """A causal mask among the buffers changes no other result."""
    for dtype, size in thin_out([(dtype, size) for dtype in DTYPES for size in (5, 64, 300)]):
        vectors = make_vectors(5, size, dtype)
        (global_,) = make_vectors(1, size, dtype, 1000)
        mask = torch.full((size // 2,), -math.inf).to(dtype)

        def add_mask(vector: Tensor, fill: Tensor = mask) -> Tensor:
            return torch.cat([vector[:3], fill, vector[3:]])

        kept = torch.cat([torch.arange(3), torch.arange(size // 2 + 3, size // 2 + size)])
        plain = states(rule, size, torch.float32)
        long = {name: add_mask(state, torch.zeros(size // 2)) for name, state in plain.items()}
        weights = [1.0, 0.0, 2.0, 3.0, 1.0]
        expected = server_step(global_, vectors, weights, rule, **plain)
        given = server_step(add_mask(global_), [add_mask(vector) for vector in vectors], weights, rule, **long)
        assert torch.equal(given.model[3 : 3 + size // 2], mask)
        close(given.model[kept], expected.model.double())
        torch.testing.assert_close(given.norms, expected.norms, rtol=1e-12, atol=0)
        torch.testing.assert_close(given.cosines, expected.cosines, rtol=1e-9, atol=1e-9)
        for name, state in plain.items():
            close(long[name][kept], state.double())
            assert not long[name][3 : 3 + size // 2].any()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("rule", RULES)
def test_pairs(backend: str, rule: str) -> None:
    axes = {
        "count": [1, 2, 5, 10, 17],
        "size": [0, 1, 3, 31, 32, 33, 127, 128, 129, 700],
        "dtype": list(DTYPES),
        "kind": ["equal", "counts", "zeros", "tiny"],
        "state": [torch.float32, torch.float64],
        "defaults": [True, False],
    }
    for seed, case in enumerate(thin_out(pairwise(axes, seed=len(rule)))):
        check(rule, **case, seed=seed)


def test_a_client_of_weight_zero_is_only_measured(backend: str) -> None:
    vectors = make_vectors(3, 200, torch.float32)
    global_ = torch.zeros(200)
    wanted = server_step(global_, [vectors[0], vectors[2]], [1, 2])
    given = server_step(global_, vectors, [1, 0, 2])
    assert torch.equal(given.model, wanted.model)
    assert float(given.norms[1]) == pytest.approx(float(vectors[1].double().norm()))
    assert given.cosines[[0, 2]].tolist() == pytest.approx(wanted.cosines.tolist())
    vectors[1][5] = math.nan
    assert torch.equal(server_step(global_, vectors, [1, 0, 2], similarities=False).model, wanted.model)
    given = server_step(global_, vectors, [1, 0, 2])
    assert torch.equal(given.model, wanted.model)
    assert given.norms.isnan().tolist() == [False, True, False]
    assert given.cosines.isnan().tolist() == [False, True, False]


def test_directions(backend: str) -> None:
    """The directions are along, against and across the mean delta, and no delta at all."""
    global_ = torch.ones(100)
    step = torch.zeros(100)
    step[3] = 1.0
    across = torch.zeros(100)
    across[4] = 2.0
    vectors = [global_ + 3 * step, global_ - step, global_ + across, global_ - across, global_]
    given = server_step(global_, vectors, [1, 1, 1, 1, 1])
    assert given.norms.tolist() == [3.0, 1.0, 2.0, 2.0, 0.0]
    assert given.cosines.tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]
    assert server_step(global_, [global_], [1]).cosines.tolist() == [0.0]


def test_out_and_odd_strides(backend: str) -> None:
    vectors, weights = make_vectors(4, 200, torch.float32), [1.0, 2.0, 3.0, 4.0]
    (global_,) = make_vectors(1, 200, torch.float32, 9)
    wanted = server_step(global_, vectors, weights, "adam", **states("adam", 200, torch.float32))
    wide = torch.zeros(400)[::2].copy_(global_)
    columns = torch.stack(vectors, 1).t()
    for old, uploads in ((wide, vectors), (global_, columns)):
        given = server_step(old, uploads, weights, "adam", **states("adam", 200, torch.float32))
        assert torch.equal(given.model, wanted.model)
        assert torch.equal(given.norms, wanted.norms)
    outs = [torch.zeros(400)[::2], torch.zeros(201)[1:], torch.zeros(200, dtype=torch.float64)]
    for out in [*outs, wide, vectors[2]]:
        copies = [vector.clone() for vector in vectors]
        old = global_.clone()
        if out is vectors[2]:
            copies[2] = out
        version = out._version
        step = server_step(old, copies, weights, "adam", **states("adam", 200, torch.float32), out=out)
        assert step.model is out
        assert out._version > version
        close(out.float(), wanted.model.double())


# -- shared memory -----------------------------------------------------------------------------------------------------


SIZE = 8
WEIGHTS = [1.0, 2.0, 0.5]


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "global_": torch.randn(SIZE, dtype=dtype),
        "vectors": torch.randn(3, SIZE, dtype=dtype),
        "first": torch.zeros(SIZE, dtype=dtype),
        "second": torch.ones(SIZE, dtype=dtype),
        "out": torch.empty(SIZE, dtype=dtype),
    }


def memory(start: int, step: int = 1) -> tuple[Tensor, Tensor]:
    """Return a state, and a vector that begins ``start`` elements behind it."""
    held = torch.zeros(2 * SIZE + SIZE * step)
    return held[SIZE : 2 * SIZE], held[SIZE + start :][: SIZE * step : step]


def shares(state: str, name: str, start: int = 0, step: int = 1) -> Callable[[dict[str, Tensor]], None]:
    def put(given: dict[str, Tensor]) -> None:
        given[state], given[name] = memory(start, step)

    return put


def a_row(state: str, row: int) -> Callable[[dict[str, Tensor]], None]:
    def put(given: dict[str, Tensor]) -> None:
        given[state] = given["vectors"][row]

    return put


def between_rows(given: dict[str, Tensor]) -> None:
    given["first"] = given["vectors"].flatten()[SIZE // 2 :][:SIZE]


def in_columns(given: dict[str, Tensor]) -> None:
    held = torch.randn(SIZE, 3)
    given["vectors"], given["first"] = held.t(), held.flatten()[:SIZE]


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "out is first": (shares("first", "out"), "first must not share memory with out"),
    "out is second": (shares("second", "out"), "second must not share memory with out"),
    "out begins within first": (shares("first", "out", SIZE - 1), "first must not share memory with out"),
    "out ends within first": (shares("first", "out", 1 - SIZE), "first must not share memory with out"),
    "strided out within first": (shares("first", "out", -SIZE, 2), "first must not share memory with out"),
    "first is second": (shares("first", "second"), "first must not share memory with second"),
    "first overlaps second": (shares("first", "second", 3), "first must not share memory with second"),
    "first is a vector": (a_row("first", 1), r"first must not share memory with vectors\[1\]"),
    "second is a vector": (a_row("second", 2), r"second must not share memory with vectors\[2\]"),
    "first overlaps two vectors": (between_rows, r"first must not share memory with vectors\[0\]"),
    "first lies among columns": (in_columns, r"first must not share memory with vectors\[0\]"),
    "first is global_": (shares("first", "global_"), "first must not share memory with global_"),
    "second overlaps global_": (shares("second", "global_", -2), "second must not share memory with global_"),
}
APART: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "behind first": shares("first", "out", SIZE),
    "before second": shares("second", "out", -SIZE),
    "vectors and states in one block": lambda given: given.update(
        zip(("vectors", "first", "second"), torch.randn(5, SIZE).abs().split([3, 1, 1]), strict=True)
    ),
}


def step(given: dict[str, Tensor], listed: bool = False) -> ops.ServerStep:
    vectors = list(given["vectors"]) if listed else given["vectors"]
    states = {name: given[name] for name in ("first", "second", "out")}
    return ops.server_step(given["global_"], vectors, WEIGHTS, "adam", **states)


@pytest.mark.parametrize("name", [*BACKENDS, pytest.param("cuda", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(name: str, case: str) -> None:
    put, message = REFUSED[case]
    for listed in (False, True):
        given = arguments()
        put(given)
        before = {key: x.clone() for key, x in given.items()}
        with emulate() if name == "cuda" else using(name), pytest.raises(ValueError, match=message):
            step(given, listed)
        for key, x in given.items():
            assert torch.equal(x.nan_to_num(), before[key].nan_to_num()), key


@pytest.mark.parametrize("state", ["first", "second"])
def test_weights_as_a_state_are_refused(state: str) -> None:
    given = arguments()
    given["vectors"] = torch.randn(SIZE, SIZE)
    states = {name: given[name] for name in ("first", "second")}
    with pytest.raises(ValueError, match=f"{state} must not share memory with weights"):
        ops.server_step(given["global_"], given["vectors"], states[state].fill_(1), "adam", **states)


def test_momentum_has_one_state() -> None:
    given = arguments()
    for name in ("global_", "out"):
        with pytest.raises(ValueError, match=f"first must not share memory with {name}"):
            ops.server_step(
                given["global_"], given["vectors"], WEIGHTS, "momentum", first=given[name], out=given["out"]
            )


@pytest.mark.parametrize("case", APART)
def test_memory_that_only_touches_is_taken(case: str) -> None:
    given = arguments()
    APART[case](given)
    given = {name: x[0] if name in ("first", "second") and x.dim() == 2 else x for name, x in given.items()}
    expected = step({name: x.clone() for name, x in given.items()})
    torch.testing.assert_close(step(given).model, expected.model, rtol=0, atol=0)


def test_refused_under_compile() -> None:
    torch._dynamo.reset()
    given = arguments()
    given["second"] = given["first"]
    with pytest.raises(Exception, match="first must not share memory with second"):
        torch.compile(step, backend="eager", fullgraph=True)(given)
