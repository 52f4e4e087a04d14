"""Every operator on inputs without elements, each optional argument given and left out.

``python -m python_tests.ops.empty_cases BACKEND N`` runs every N-th on one backend against the reference, in a process
of its own because a kernel that goes wrong here takes the process with it. The last line printed names the case.
"""

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkern import ops

# The arguments of each operator that have gradients.
DIFFERENTIABLE = {
    "blend": ("foreground", "background", "alpha"),
    "erase_boxes": ("images",),
    "keep_boxes": ("images",),
    "kl_div": ("student", "teacher", "weight"),
    "dual_kl": ("a", "b", "teacher", "weight"),
    "entropy": ("logits",),
    "ensemble_kl": ("student", "teachers", "weights"),
    "js_div": ("logits", "weights"),
    "consensus": ("logits", "weights"),
    "contrastive": ("x", "y", "temperature"),
    "weighted_mean": ("vectors", "weights"),
    "fuse_concat": ("features", "scale", "shift"),
    "fuse_mean": ("features", "scale", "shift"),
    "conv_norm": ("x", "weight", "scale", "shift", "bias", "residual"),
    "conv_pool": ("x", "weight", "bias"),
}


@dataclass(frozen=True)
class Case:
    """One call: a public operator and its arguments by name."""

    operator: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.operator}({', '.join(f'{name}={_text(value)}' for name, value in self.arguments.items())})"

    def leaves(self) -> list[tuple[str, int]]:
        """The tensors that may ask for a gradient: argument, and place where that is a list (else -1)."""
        if self.arguments.get("out") is not None:
            return []
        found = []
        for name in DIFFERENTIABLE.get(self.operator, ()):
            value = self.arguments.get(name)
            if isinstance(value, list):
                places = [place for place, x in enumerate(value) if isinstance(x, Tensor)]
                found += [(name, place) for place in places[:2] + places[2:][-1:]]
            elif isinstance(value, Tensor):
                found.append((name, -1))
        return found


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{list(value.stride())}"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)


class Draw:
    """Seeded tensors whose dtype and layout change from one to the next."""

    LAYOUTS = ("contiguous", "sliced", "last")

    def __init__(self) -> None:
        self._draw = torch.Generator().manual_seed(0)
        self._dtypes = itertools.cycle((torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32))
        self._layouts = itertools.cycle(self.LAYOUTS)

    def dtype(self) -> torch.dtype:
        return next(self._dtypes)

    def layout(self) -> str:
        return next(self._layouts)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32, layout: str | None = None) -> Tensor:
        layout = layout or self.layout()
        if layout == "sliced":  # of a larger tensor, every second element of each axis
            wide = torch.rand([2 * size + 1 for size in shape], generator=self._draw).to(dtype)
            return wide[tuple(slice(0, 2 * size, 2) for size in shape)]
        x = torch.rand(shape, generator=self._draw).to(dtype)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "last" and len(shape) > 2 else x


def _blend(draw: Draw) -> Iterator[Case]:
    index = {0: torch.zeros(0, dtype=torch.int64), 4: torch.tensor([1, 0, 1, 0])}
    shapes = ((0, 3, (2,)), (0, 1, (2,)), (0, 3, (2, 4, 4)), (0, 0, (5,)), (4, 3, (0,)), (4, 4, (2, 0)), (0, 2, ()))
    for (rows, others, shape), weighted, given in itertools.product(shapes, (None, "each", "one"), (False, True)):
        if not given and rows != others:
            continue
        dtype = draw.dtype()
        arguments: dict[str, Any] = {
            "foreground": draw(rows, *shape, dtype=dtype),
            "background": draw(others, *shape, dtype=dtype),
        }
        if weighted:
            arguments["alpha"] = draw(*([rows] if weighted == "each" else []), dtype=draw.dtype())
        if given:
            arguments["index"] = index[rows]
        yield Case("blend", arguments)


def _boxes(draw: Draw) -> Iterator[Case]:
    for shape, form, fill in itertools.product(
        ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 3, 4, 5)),
        ("list", "none", "padded"),
        (None, "number", "tensor"),
    ):
        batch, channels = shape[:2]
        boxes: Any = draw(batch, 0 if form == "none" else 2, 4) * 4
        if form == "list":
            boxes = [boxes[b, : b % 2] for b in range(batch)]
        for operator in ("erase_boxes", "keep_boxes"):
            arguments = {"images": draw(*shape, dtype=draw.dtype()), "boxes": boxes}
            if fill:
                arguments["fill"] = 0.5 if fill == "number" else draw(channels)
            yield Case(operator, arguments)


# [B, C, *positions]; of 10,000 classes several of a GPU's blocks share a row.
LOGITS = ((0, 5), (0, 5, 3), (2, 40, 0), (0, 1, 2, 2), (0, 10_000))


def _row_weights(draw: Draw, shape: Sequence[int], form: str) -> Tensor:
    return draw(shape[0], *(shape[2:] if form == "rows" else ()))


def _divergences(draw: Draw) -> Iterator[Case]:
    for number, (shape, weight, reduction) in enumerate(
        itertools.product(LOGITS, (None, "samples", "rows"), (None, "none", "sum"))
    ):
        dtype = draw.dtype()
        more: dict[str, Any] = {} if reduction is None else {"reduction": reduction}
        if number % 3:
            more["temperature"] = (2.0, float("inf"))[number % 3 - 1]
        if weight:
            more["weight"] = _row_weights(draw, shape, weight)
        if number % 4 == 1:
            more["dim"], shape = -1, (shape[0], *shape[2:], shape[1])
        yield Case("kl_div", {"student": draw(*shape, dtype=dtype), "teacher": draw(*shape, dtype=dtype), **more})
        tensors = {name: draw(*shape, dtype=dtype) for name in ("a", "b", "teacher")}
        direction = {"direction": "student"} if number % 2 else {}
        yield Case("dual_kl", {**tensors, **more, **direction})
        if weight is None:
            more.pop("temperature", None)
            yield Case("entropy", {"logits": draw(*shape, dtype=dtype), **more})


def _stacks(draw: Draw) -> Iterator[Case]:
    count = 3
    for number, (shape, form, masked) in enumerate(
        itertools.product(LOGITS, (None, "teachers", "samples", "classes", "all"), (False, True))
    ):
        dtype = draw.dtype()
        batch, classes, positions = shape[0], shape[1], shape[2:]
        weights = {
            None: None,
            "teachers": (count,),
            "samples": (count, batch, 1, *positions),
            "classes": (count, 1, classes),
            "all": (count, batch, classes, *positions),
        }[form]
        more: dict[str, Any] = {} if weights is None else {"weights": draw(*weights) + 0.1}
        if masked:
            more["class_mask"] = torch.arange(count * classes).view(count, classes) % 3 > 0
        if number % 3:
            more["reduction"] = ("none", "sum")[number % 3 - 1]
        modes: list[dict[str, Any]] = [{}, {"mix": "logits"}, {"temperature": float("inf")}, {"log_probs": True}]
        if not masked and form not in ("classes", "all"):
            modes.append({"mode": "mean_of_kl"})
        if form in (None, "teachers"):
            modes.append({"dim": -1})
        for mode in modes:
            shape = (batch, *positions, classes) if "dim" in mode else (batch, classes, *positions)
            student, teachers = draw(*shape, dtype=dtype), draw(count, *shape, dtype=dtype)
            yield Case("ensemble_kl", {"student": student, "teachers": teachers, **more, **mode})
        if masked or form in ("classes", "all"):
            continue
        more = {} if form is None else {"weights": draw(*((count,) if form == "teachers" else (count, batch))) + 0.1}
        if number % 3:
            more["reduction"] = ("none", "sum")[number % 3 - 1]
        for operator in ("js_div", "consensus"):
            yield Case(operator, {"logits": draw(count, batch, classes, *positions, dtype=dtype), **more})
            yield Case(operator, {"logits": draw(count, batch, *positions, classes, dtype=dtype), "dim": -1, **more})


def _contrastive(draw: Draw) -> Iterator[Case]:
    for (pairs, size), temperature in itertools.product(((0, 4), (3, 0), (0, 0)), (None, 0.5, "tensor")):
        dtype = draw.dtype()
        given = {"x": draw(pairs, size, dtype=dtype), "y": draw(pairs, size, dtype=dtype)}
        if temperature is not None:
            given["temperature"] = torch.tensor(0.5) if temperature == "tensor" else temperature
        yield Case("contrastive", given)


def _vectors(draw: Draw, count: int, form: str, dtype: torch.dtype) -> Any:
    """``count`` vectors [0], as a matrix or one by one."""
    if form == "matrix":
        return draw(count, 0, dtype=dtype)
    return [draw(0, dtype=dtype, layout="contiguous" if form == "list" else None) for _ in range(count)]


def _aggregates(draw: Draw) -> Iterator[Case]:
    for count, form in itertools.product((1, 3, 70, 130), ("matrix", "list", "mixed")):
        dtype = draw.dtype()
        vectors = _vectors(draw, count, form, dtype)
        numbers: list[Any] = [[1.0 + m for m in range(count)], draw(count) + 0.1, [0.0] * (count - 1) + [2.0]]
        for place, weights in enumerate(numbers):
            given = {"vectors": vectors, "weights": weights}
            yield Case("weighted_mean", given)
            yield Case("weighted_mean", {**given, "out": draw(0, dtype=(dtype, torch.float64)[place % 2])})
            yield Case("median", given)
            yield Case("geometric_median", given)
            yield Case("geometric_median", {**given, "iterations": 3, "tolerance": 1e-6, "smoothing": 1e-3})
            if count > 2 and place < 2:
                yield Case("trimmed_mean", {**given, "trim": 1})
        yield Case("median", {"vectors": vectors})
        yield Case("geometric_median", {"vectors": vectors})
        yield Case("trimmed_mean", {"vectors": vectors, "trim": 0})
        yield Case("pairwise_distances", {"vectors": vectors})
        yield Case("clip_by_norm", {"vectors": vectors, "max_norm": 1.0})
        yield Case("clip_and_noise", {"vectors": vectors, "max_norm": 1.0, "noise": 0.5, "seed": 3})
        yield Case("clip_and_noise", {"vectors": vectors, "max_norm": 1.0, "noise": 0.0, "seed": 3, "offset": 7})
        if count > 2:
            yield Case("krum", {"vectors": vectors, "byzantine": 0})
            yield Case("krum", {"vectors": vectors, "byzantine": 0, "keep": 2})
        yield from _server_steps(draw, vectors, numbers[0], dtype)


def _server_steps(draw: Draw, vectors: Any, weights: list[float], dtype: torch.dtype) -> Iterator[Case]:
    state = torch.float64 if dtype is torch.float64 else torch.float32
    for rule, states in (("mean", 0), ("momentum", 1), ("adam", 2), ("yogi", 2), ("adagrad", 2)):
        given = {"global_": draw(0, dtype=dtype), "vectors": vectors, "weights": weights}
        if rule != "mean":
            given["rule"] = rule
        for name in ("first", "second")[:states]:
            given[name] = draw(0, dtype=state, layout="contiguous")
        yield Case("server_step", given)
        more = {"learning_rate": 0.5, "beta1": 0.5, "beta2": 0.9, "tau": 0.1} if states == 2 else {}
        yield Case("server_step", {**given, **more, "out": draw(0, dtype=dtype, layout="contiguous")})
        yield Case("server_step", {**given, "similarities": False})


def _optimised(draw: Draw) -> Iterator[Case]:
    terms = ("anchor", "correction", "gradient_sum")
    for shape, given, max_norm in itertools.product(((0,), (3, 0), (0, 4)), (False, True), (None, 1.0)):
        dtype = draw.dtype()
        tensors = {name: draw(*shape, dtype=dtype) for name in ("parameters", "gradients", *terms)}
        if not given:
            tensors = {name: tensors[name] for name in ("parameters", "gradients")}
        more: dict[str, Any] = {"lr": 0.1} if max_norm is None else {"lr": 0.1, "max_norm": max_norm}
        if given:
            more |= {"proximal": 0.3, "zero": True, "weight_decay": 0.1}
        momentum = {"velocity": draw(*shape, dtype=dtype), "momentum": 0.9} if given else {}
        yield Case("sgd_step", {**tensors, **more, **momentum})
        moments = {name: draw(*shape, dtype=dtype) for name in ("first", "second")}
        betas = {"betas": (0.8, 0.9), "eps": 0.1} if given else {}
        yield Case("adamw_step", {**tensors, **moments, "step": 2, **more, **betas})


def _fused(draw: Draw) -> Iterator[Case]:
    shapes = ((0, 2, 3, 4), (2, 2, 0, 4), (2, 0, 3, 4), (0, 2), (2, 0), (0, 2, 5))
    for shape, scale, shift, activation in itertools.product(shapes, (False, True), (False, True), (None, "relu")):
        for operator in ("fuse_concat", "fuse_mean"):
            dtype, layout = draw.dtype(), draw.layout()
            features = [draw(*shape, dtype=dtype, layout=layout) for _ in range(3)]
            if operator == "fuse_concat" and shape[1]:  # one map has elements beside one that has none
                features[1] = draw(shape[0], 0, *shape[2:], dtype=dtype, layout=layout)
            channels = sum(x.shape[1] for x in features)
            arguments: dict[str, Any] = {"features": features}
            if scale:
                arguments["scale"] = draw(channels)
            if shift:
                arguments["shift"] = draw(channels)
            if activation:
                arguments["activation"] = activation
            yield Case(operator, arguments)
    # Maps without channels beside others, in maps that have elements.
    for layout, given in itertools.product(Draw.LAYOUTS, (False, True)):
        features = [draw(2, channels, 3, 4, layout=layout) for channels in (0, 3, 0, 2)]
        more = {"scale": draw(5), "shift": draw(5), "activation": "relu"} if given else {}
        yield Case("fuse_concat", {"features": features, **more})


def _convolved(draw: Draw) -> Iterator[Case]:
    for shape, relu, pool, mode in itertools.product(
        ((0, 3, 4, 5), (0, 3, 1, 2), (2, 0, 4, 5), (2, 3, 0, 5)),
        (None, False),
        (None, 2),
        (None, "batch", "running", "groups"),
    ):
        dtype = draw.dtype()
        arguments: dict[str, Any] = {"x": draw(*shape, dtype=dtype), "weight": draw(8, shape[1], 3, 3, dtype=dtype)}
        arguments |= {name: draw(8, dtype=dtype) for name in ("scale", "shift", "mean", "variance")}
        running = mode in ("batch", "running")
        arguments |= {"variance": arguments["variance"].abs() + 0.1} if running else {"mean": None, "variance": None}
        if relu is not None:
            arguments |= {"relu": relu, "residual": draw(shape[0], 8, *shape[2:], dtype=dtype)}
        if pool is not None:
            arguments["pool"] = pool
        if relu is None and pool is None:
            arguments["stride"] = 2
        if mode == "batch":
            arguments |= {"update": False, "momentum": 0.3, "eps": 1e-3}
        if mode == "running":
            arguments["training"] = False
        if mode == "groups":
            arguments |= {"groups": 4, "bias": draw(8, dtype=dtype)}
        yield Case("conv_norm", arguments)


def _pooled(draw: Draw) -> Iterator[Case]:
    shapes = ((0, 3, 6, 7), (0, 1, 9, 6), (2, 0, 6, 6), (2, 3, 0, 6), (0, 3, 2, 6))
    for shape, side, bias, padded, relu in itertools.product(
        shapes, (3, 5), (False, True), (False, True), (None, False)
    ):
        dtype = draw.dtype()
        arguments: dict[str, Any] = {
            "x": draw(*shape, dtype=dtype),
            "weight": draw(8, shape[1], side, side, dtype=dtype),
        }
        if bias:
            arguments["bias"] = draw(8, dtype=dtype)
        if padded:
            arguments["padding"] = side // 2
        if relu is not None:
            arguments["relu"] = relu
        yield Case("conv_pool", arguments)
    yield Case("conv_pool", {"x": draw(2, 3, 6, 6), "weight": draw(0, 3, 3, 3)})


def cases() -> Iterator[Case]:
    """All of them, the same every time."""
    draw = Draw()
    parts = (
        _blend, _boxes, _divergences, _stacks, _contrastive, _aggregates, _optimised, _fused, _convolved, _pooled,
    )  # fmt: skip
    for part in parts:
        yield from part(draw)


Outcome = tuple[str, list[Tensor | None]]


def outcome(case: Case, wanted: Sequence[tuple[str, int]], batched: bool = False) -> Outcome:
    """The error's type, or results and the gradients of what is ``wanted``."""
    given = {name: list(x) if isinstance(x, list) else x for name, x in case.arguments.items()}
    leaves = []
    for name, place in wanted:
        leaf = (given[name] if place < 0 else given[name][place]).detach().requires_grad_()
        leaves.append(leaf)
        if place < 0:
            given[name] = leaf
        else:
            given[name][place] = leaf
    try:
        returned = getattr(ops, case.operator)(**given)
    except (TypeError, ValueError) as error:
        return type(error).__name__, []
    results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    recorded = [x for x in results if x.requires_grad]
    if not recorded:
        return "", results
    ones = [torch.ones((2, *x.shape) if batched else x.shape, dtype=x.dtype) for x in recorded]
    gradients = torch.autograd.grad(recorded, leaves, ones, allow_unused=True, is_grads_batched=batched)
    return "", [*results, *gradients]


def differs(got: Outcome, expected: Outcome) -> str | None:
    """What is not as the reference has it."""
    if got[0] != expected[0]:
        return f"{got[0] or 'a result'} instead of {expected[0] or 'a result'}"
    for place, (x, y) in enumerate(zip(got[1], expected[1], strict=True)):
        if (x is None) != (y is None):
            return f"{place}: {x} instead of {y}"
        if x is None or y is None:
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{place}: {x.dtype} {list(x.shape)} instead of {y.dtype} {list(y.shape)}"
        if not torch.allclose(x.double(), y.double(), rtol=1e-2, atol=1e-5, equal_nan=True):
            return f"{place}: {x} instead of {y}"
    return None


def patterns(case: Case) -> list[list[tuple[str, int]]]:
    """Which gradients are asked for: none, all, each alone."""
    leaves = case.leaves()
    return [[], *([leaf] for leaf in leaves), *([leaves] if len(leaves) > 1 else [])]


# What a backend does not implement is an error where it is forced.
ABSENT = ("does not implement", "has no kernel for", "cannot serve", "no kernel")


def run(backend: Callable[[], contextlib.AbstractContextManager[Any]], some: int) -> Iterator[str]:
    """Runs blend's cases and every ``some``-th of the others, printing each before.

    Yields what went wrong.
    """
    for number, case in enumerate(cases()):
        if number % some and case.operator != "blend":
            continue
        for wanted in patterns(case):
            for batched in (False, True) if wanted else (False,):
                what = f"{case} gradients of {[f'{name}{place}' if place >= 0 else name for name, place in wanted]}"
                what += " batched" if batched else ""
                print(what, flush=True)
                with ops.use_backend("reference"):
                    expected = outcome(case, wanted, batched)
                try:
                    with backend():
                        got = outcome(case, wanted, batched)
                except RuntimeError as error:
                    if not any(text in str(error) for text in ABSENT):
                        yield f"{what}: {error}"
                    continue
                found = differs(got, expected)
                if found is not None:
                    yield f"{what}: {found}"


def left_out() -> list[str]:
    """Parameters with a default that no case gives, or that every case gives."""
    missing = []
    known = list(cases())
    for operator in sorted({case.operator for case in known}):
        own = [case for case in known if case.operator == operator]
        for name, parameter in inspect.signature(getattr(ops, operator)).parameters.items():
            if parameter.default is inspect.Parameter.empty:
                continue
            if len({name in case.arguments for case in own}) < 2:
                missing.append(f"{operator}({name})")
    return missing


def main(backend: str, some: int) -> int:
    if backend == "emulated":
        from python_tests.ops.emulated_core import emulated

        entered = emulated()
        entered.__enter__()  # once: it loads the core anew
        failures = list(run(lambda: ops.use_backend("cuda"), some))
    else:
        from python_tests.ops.operator_cases import using

        failures = list(run(lambda: using(backend), some))
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
