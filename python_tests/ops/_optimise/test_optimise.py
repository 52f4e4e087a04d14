"""Tests of sgd_step and adamw_step: torch.optim's results, bits of torch's operations, terms, memory, refusals."""

import functools
import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.operator_cases import BACKENDS, KERNELS, using

SIZES = (1, 5, 17, 1000, 9001)


def vectors(size: int | tuple[int, ...], count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    shape = (size,) if isinstance(size, int) else size
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(count)]


def same_products(isa: str) -> bool:
    """Return whether torch's kernels fuse products and sums exactly where ours of this ISA level do."""
    return (torch.backends.cpu.get_cpu_capability() == "DEFAULT") == (isa == "portable")


def bits_of_torch(isa: str) -> list[str]:
    """Return differences from torch's own operations in the engine's order: names of tensors, by case."""
    differences = []
    with ops.use_isa(isa):
        for dtype, size, number in itertools.product((torch.float32, torch.float64), SIZES, range(16)):
            theta, g, velocity, anchor, correction, total = vectors(size, 6, dtype, number)
            momentum, decay = 0.9 * (number & 1), 1e-3 * (number >> 1 & 1)
            terms: dict[str, Any] = {"anchor": anchor, "proximal": 0.3} if number & 4 else {}
            ours = {"theta": theta.clone(), "velocity": velocity.clone(), "total": total.clone()}
            if number & 8:
                terms |= {"correction": correction, "gradient_sum": ours["total"]}
            kept = ours["velocity"] if momentum else None
            ops.sgd_step(ours["theta"], g, kept, lr=0.0137, momentum=momentum, weight_decay=decay, **terms)
            if number & 8:
                total.add_(g)
                g.add_(correction)
            if number & 4:
                g.add_(theta - anchor, alpha=0.3)
            if decay:
                g.add_(theta, alpha=decay)
            if momentum:
                g = velocity.mul_(momentum).add_(g)
            theta.add_(g, alpha=-0.0137)
            theirs = {"theta": theta, "velocity": velocity, "total": total}
            differences += [f"{dtype} {size} {number} {name}" for name in ours if not ours[name].equal(theirs[name])]
        for dtype, size, betas in itertools.product(
            (torch.float32, torch.float64), SIZES, ((0.9, 0.999), (0.3, 0.9), (0.0, 0.0))
        ):
            theta, g, moment, second = vectors(size, 4, dtype)
            ours = {"first": moment.clone(), "second": second.square_().clone()}
            ops.adamw_step(theta, g, ours["first"], ours["second"], 3, lr=0.01, betas=betas)
            moment.lerp_(g, 1 - betas[0])
            second.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
            differences += [f"{dtype} {size} {betas} first"] * (not ours["first"].equal(moment))
            differences += [f"{dtype} {size} {betas} second"] * (not ours["second"].equal(second))
    return differences


@pytest.mark.parametrize("isa", [name.removeprefix("cpu-") for name in KERNELS])
def test_bits_are_those_of_torchs_operations(isa: str) -> None:
    """SGD has all bits.

    Of AdamW the moments have them (torch takes other square roots from MKL, not correctly rounded).
    """
    if not same_products(isa):
        pytest.skip("torch fuses other products at its own ISA level")
    assert not bits_of_torch(isa)


@pytest.mark.exhaustive
@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
def test_portable_bits_are_those_of_torch_without_fused_products() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from python_tests.ops._optimise import test_optimise as t; assert not t.bits_of_torch('portable')",
        ],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("max_norm", [None, 5.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9, None])
def test_steps_are_those_of_torch_optim(momentum: float | None, max_norm: float | None) -> None:
    """The steps are SGD's with ``momentum``, and AdamW's without.

    Torch clips some of the gradients.
    """
    theta, *gradients = vectors(1001, 6)
    leaf = torch.nn.Parameter(theta.clone())
    moment, second = torch.zeros_like(theta), torch.zeros_like(theta)
    sgd = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01}
    adamw = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    theirs = torch.optim.AdamW([leaf], **adamw) if momentum is None else torch.optim.SGD([leaf], **sgd)
    for step, g in enumerate(gradients, 1):
        leaf.grad = g.clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([leaf], max_norm)
        theirs.step()
        if momentum is None:
            ops.adamw_step(theta, g, moment, second, step, **adamw, max_norm=max_norm)
        else:
            ops.sgd_step(theta, g, moment if momentum else None, **sgd, max_norm=max_norm)
    torch.testing.assert_close(theta, leaf.detach(), rtol=1e-6, atol=1e-7)


def test_rows_are_steps_of_their_own() -> None:
    theta, g, v, anchor, correction, total = vectors((3, 1000), 6)
    copies = [[x.clone() for x in rows] for rows in (theta, v, total)]
    lr = [0.1, 0.2, 0.4]
    shared = anchor[0]
    step = ops.sgd_step(
        theta, g, v, lr=torch.tensor(lr, dtype=torch.float64), momentum=0.9, anchor=shared, proximal=0.1,
        correction=correction, gradient_sum=total, max_norm=20.0,
    )  # fmt: skip
    assert step.finite.tolist() == [True] * 3
    for m in range(3):
        single = ops.sgd_step(
            copies[0][m], g[m], copies[1][m], lr=lr[m], momentum=0.9, anchor=shared, proximal=0.1,
            correction=correction[m], gradient_sum=copies[2][m], max_norm=20.0,
        )  # fmt: skip
        assert single.finite.shape == ()
        assert single.squared_norm.equal(step.squared_norm[m])
        assert all(x[m].equal(rows[m]) for x, rows in zip((theta, v, total), copies, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told(name: str, bad: float) -> None:
    for where, max_norm in itertools.product(("parameters", "gradients", "velocity", "gradient_sum"), (None, 1.0)):
        theta, g, v, total = vectors((2, 33), 4)
        given = {"parameters": theta, "gradients": g, "velocity": v, "gradient_sum": total}
        given[where][1, 20] = bad
        with using(name):
            step = ops.sgd_step(**given, lr=0.1, momentum=0.9, max_norm=max_norm)
        assert step.finite.tolist() == [True, False]
        assert math.isfinite(step.squared_norm[1]) == (where != "gradients")


def test_an_overflow_in_the_rounding_of_fp16_is_told() -> None:
    theta, g = torch.full((9,), 6e4, dtype=torch.float16), torch.full((9,), -6e4, dtype=torch.float16)
    assert not ops.sgd_step(theta, g, lr=1.0).finite


def test_zeros_are_left_where_asked_for() -> None:
    for zero in (False, True):
        theta, g = vectors(300, 2)
        before = g.clone()
        ops.sgd_step(theta, g, lr=0.1, zero=zero)
        assert g.equal(torch.zeros_like(g) if zero else before)


def test_no_rows_and_rates_of_any_strides() -> None:
    nothing = torch.ones(0, 4)
    step = ops.sgd_step(nothing, nothing.clone(), lr=torch.ones(0)[::2])
    assert step.finite.shape == step.squared_norm.shape == (0,)


def test_columns_of_one_matrix_are_apart() -> None:
    wide = torch.randn(3, 20)
    expected = [x.clone() for x in (wide[:, :8], wide[:, 8:16])]
    ops.sgd_step(wide[:, :8], wide[:, 8:16], lr=0.1)
    ops.sgd_step(*expected, lr=0.1)
    assert wide[:, :8].equal(expected[0])
    even, odd = wide.flatten()[::2], wide.flatten()[1::2]
    ops.sgd_step(even, odd, lr=0.1)


MEMORY = torch.arange(40.0)
REFUSED = {
    "velocity is parameters": (lambda p: {"velocity": p["parameters"], "momentum": 0.9}, "parameters must not share"),
    "parameters over gradients": (
        lambda p: {"parameters": MEMORY[:6], "gradients": MEMORY[5:11]},
        "parameters must not share memory with gradients",
    ),
    "sum over correction": (
        lambda p: {"gradient_sum": MEMORY[0:12:2], "correction": MEMORY[10:16]},
        "gradient_sum must not share memory with correction",
    ),
    "zeroed gradients are the anchor": (
        lambda p: {"anchor": p["gradients"], "proximal": 1.0, "zero": True},
        "gradients must not share memory with anchor",
    ),
    "expanded": (lambda p: {"parameters": torch.ones(1).expand(6)}, "parameters must not be expanded"),
    "folded": (
        lambda p: {
            "parameters": MEMORY.as_strided((3, 4), (2, 1)), "gradients": torch.ones(3, 4),
        },
        "parameters must not be expanded",
    ),
    "no velocity": (lambda p: {"momentum": 0.9}, "velocity must be given with momentum 0.9"),
    "no momentum": (lambda p: {"velocity": torch.zeros(6)}, "velocity must be None without momentum"),
    "no anchor": (lambda p: {"proximal": 0.1}, "anchor must be given with proximal 0.1"),
    "negative lr": (lambda p: {"lr": -0.1}, "lr must be at least 0"),
    "lr of rows": (lambda p: {"lr": [0.1, 0.2]}, "lr must be a number, not 2 numbers"),
    "lr of other rows": (
        lambda p: {"parameters": torch.ones(3, 2), "gradients": torch.ones(3, 2), "lr": torch.ones(2)},
        r"lr must be a number, or one for each of the 3 rows, not a tensor \[2\]",
    ),
    "negative momentum": (lambda p: {"momentum": -0.1, "velocity": torch.zeros(6)}, "momentum must be at least 0"),
    "negative decay": (lambda p: {"weight_decay": -1.0}, "weight_decay must be at least 0"),
    "negative proximal": (lambda p: {"proximal": -1.0, "anchor": torch.ones(6)}, "proximal must be at least 0"),
    "norm of zero": (lambda p: {"max_norm": 0.0}, "max_norm must be greater than 0"),
    "shape": (
        lambda p: {"gradients": torch.ones(7)}, r"gradients must have shape \[6\] like parameters, but has \[7\]"
    ),
    "dtype": (
        lambda p: {"correction": torch.ones(6).double()},
        "correction must have dtype torch.float32 like parameters, but has torch.float64",
    ),
    "three axes": (lambda p: {"parameters": torch.ones(1, 2, 3)}, r"parameters must have shape \[P\] or \[M, P\]"),
    "shared gradients": (
        lambda p: {"parameters": torch.ones(2, 6)}, r"gradients must have shape \[2, 6\] like parameters, but has \[6\]"
    ),
    "gradient": (lambda p: {"parameters": torch.ones(6, requires_grad=True)}, r"call it under torch.no_grad\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(name: str, case: str) -> None:
    make, sentence = REFUSED[case]
    given: dict[str, Any] = {"parameters": torch.ones(6), "gradients": torch.ones(6), "lr": 0.1}
    given |= make(given)
    before = {key: x.detach().clone() for key, x in given.items() if isinstance(x, Tensor)}
    with ops.use_backend(name or None):
        if not name:
            ops.sgd_step(torch.ones(2), torch.ones(2), lr=0.1)  # the short way is open
        with pytest.raises((TypeError, ValueError), match=sentence):
            ops.sgd_step(**given)
    assert all(given[key].detach().equal(x) for key, x in before.items())


def test_adamw_names_its_own_arguments() -> None:
    p = [torch.ones(4) for _ in range(4)]
    for step, sentence in ((0, "step must be between 1 and"), (1.5, "step must be a whole number")):
        with pytest.raises((TypeError, ValueError), match=sentence):
            ops.adamw_step(*p, step, lr=0.1)
    with pytest.raises(ValueError, match=r"second must have shape \[4\] like parameters, but has \[5\]"):
        ops.adamw_step(*p[:3], torch.ones(5), 1, lr=0.1)
    with pytest.raises(ValueError, match="first must not share memory with second"):
        ops.adamw_step(p[0], p[1], p[2], p[2], 1, lr=0.1)
    with pytest.raises(ValueError, match=r"betas\[1\] must be less than 1"):
        ops.adamw_step(*p, 1, lr=0.1, betas=(0.9, 1.0))


def test_parameters_that_require_a_gradient_step_under_no_grad() -> None:
    leaf = torch.nn.Parameter(torch.ones(5))
    version = leaf._version
    with torch.no_grad():
        ops.sgd_step(leaf, torch.ones(5), lr=0.5)
    assert leaf.detach().equal(torch.full((5,), 0.5))
    assert leaf._version > version


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["gradients", "velocity", "gradient_sum", "first", "second"])
def test_only_an_anchor_and_a_correction_serve_all_rows(rows: int, name: str) -> None:
    theta, row = torch.ones(rows, 3), torch.ones(3)
    given: dict[str, Any] = {"gradients": torch.ones(rows, 3), name: row}
    step = functools.partial(ops.sgd_step, theta, lr=0.1, momentum=0.9 * (name == "velocity"), **given)
    if name in ("gradients", "first", "second"):
        states = [given.get(key, torch.ones(rows, 3)) for key in ("first", "second")]
        step = functools.partial(ops.adamw_step, theta, given["gradients"], *states, 1, lr=0.1)
    with pytest.raises(ValueError, match=rf"{name} must have shape \[{rows}, 3\] like parameters, but has \[3\]"):
        step()
    if name == "gradients":
        with pytest.raises(ValueError, match=r"gradients must have shape"):
            ops.sgd_step(theta, row, lr=0.1)
    ops.sgd_step(theta, torch.ones(rows, 3), lr=0.1, anchor=row, proximal=0.5, correction=row)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)], ids=str)
def test_steps_on_the_meta_device(shape: tuple[int, ...]) -> None:
    p = [torch.empty(shape, device="meta") for _ in range(6)]
    results = [
        ops.sgd_step(
            *p[:3], lr=0.1, momentum=0.9, weight_decay=0.1, anchor=p[3], proximal=0.1, correction=p[4], zero=True
        ),
        ops.sgd_step(*p[:2], lr=torch.tensor(0.1), max_norm=1.0, gradient_sum=p[5]),
        ops.adamw_step(*p[:4], 2, lr=0.1),
    ]
    for result in results:
        assert [(x.shape, x.is_meta) for x in result] == [(shape[:-1], True)] * 2
    with pytest.raises(ValueError, match="parameters must not share memory with gradients"):
        ops.sgd_step(p[0], p[0], lr=0.1)
