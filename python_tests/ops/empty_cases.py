"""Calls of every operator on inputs without elements, each optional argument given and left out.

``python -m python_tests.ops.empty_cases BACKEND N`` runs every N-th on one backend against the reference, in a process
of its own because a kernel that goes wrong here takes the process with it. The last line printed names the case.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkern import ops
from python_tests.ops.every_operator import OPERATORS
from python_tests.ops.operator_runs import tensors_in
from python_tests.ops.test_arguments import PUBLIC

SEVERAL = 10_000
"""What axes become beside an empty one, in some cases: of so many classes several of a GPU's blocks share a row."""
MANY = 26
"""What the number of vectors is multiplied by, in some cases: they are more than one launch takes."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32)
TOGETHER = {"fuse_concat": {3: 6}, "fuse_mean": {3: 6}}
"""Sizes that must be empty where another one is: channels of a map and of all maps."""
DIFFERENTIABLE = {operator.name.split()[0] for operator in OPERATORS if operator.gradient}
CONSTANT = {"boxes", "fill", "mean", "variance"}
"""Tensors of differentiable operators that have no gradient."""


class Case(NamedTuple):
    """Call of a public operator, with its arguments by name."""

    operator: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.operator}({', '.join(f'{name}={_text(value)}' for name, value in self.arguments.items())})"

    def leaves(self) -> list[tuple[str, int]]:
        """Return the tensors that may require a gradient: argument, and place where that is a list (else -1)."""
        found: list[tuple[str, int]] = []
        if self.operator not in DIFFERENTIABLE or self.arguments.get("out") is not None:
            return found
        for name, value in self.arguments.items():
            if isinstance(value, list) and isinstance(value[0], Tensor):
                found += [(name, place) for place in range(len(value))][:2]
            elif isinstance(value, Tensor) and value.is_floating_point() and name not in CONSTANT:
                found.append((name, -1))
        return found


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{list(value.stride())}"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)


def _draw(shape: Sequence[int], dtype: torch.dtype, layout: int, draw: torch.Generator) -> Tensor:
    """Return numbers of a layout.

    Layouts: contiguous, every second element of each axis of a larger tensor, or the second axis last.
    """
    if layout == 1:
        wide = torch.rand([2 * size + 1 for size in shape], generator=draw).to(dtype)
        return wide[tuple(slice(0, 2 * size, 2) for size in shape)]
    x = torch.rand(shape, generator=draw).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == 2 and len(shape) > 2 else x


def _subsets(operator: str) -> Iterator[list[str]]:
    """Yield sets of arguments: all, those without a default, and all but each one that has a default."""
    parameters = inspect.signature(getattr(ops, operator)).parameters
    names = [*parameters]
    optional = [name for name in names if parameters[name].default is not inspect.Parameter.empty]
    yield names
    yield [name for name in names if name not in optional]
    yield from ([name for name in names if name != left_out] for left_out in optional)


def cases() -> Iterator[Case]:
    """Yield all cases, the same every time."""
    draw, number = torch.Generator().manual_seed(0), 0
    for operator, public in PUBLIC.items():
        given = {**public.arguments, "out": torch.zeros(6), "log_probs": True}
        sizes = dict.fromkeys(n for value in given.values() for x in tensors_in(value) for n in x.shape)
        for names in _subsets(operator):
            for empty in sizes:
                number += 1
                gone = {empty, TOGETHER.get(operator, {}).get(empty)}
                count = SEVERAL if number % 4 == 3 and empty < 7 else 7
                dtype, layout = DTYPES[number % 5], number % 3

                def resize(value: Any, name: str, gone=gone, count=count, dtype=dtype, layout=layout) -> Any:
                    if isinstance(value, list):
                        parts = [resize(x, "") for x in value]
                        if name in ("vectors", "weights") and layout == 2:
                            parts *= MANY
                        return torch.stack(parts) if name == "vectors" and layout == 1 else parts
                    if not isinstance(value, Tensor):
                        learnt = name in ("alpha", "temperature") and dtype.itemsize == 8
                        return torch.tensor(value) if learnt else value
                    shape = [0 if n in gone else count if n == 7 else n for n in value.shape]
                    if value.is_floating_point():
                        return _draw(shape, dtype, layout, draw)
                    return torch.ones(shape, dtype=value.dtype) if value.dtype is torch.bool else value.new_zeros(shape)

                yield Case(operator, {name: resize(given[name], name) for name in names})


Outcome = tuple[str, list[Tensor | None]]


def outcome(case: Case, wanted: Sequence[tuple[str, int]], batched: bool = False) -> Outcome:
    """Return the error's type, or results and the gradients of what is ``wanted``."""
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
    directions = [torch.ones((2, *x.shape) if batched else x.shape, dtype=x.dtype) for x in recorded]
    gradients = torch.autograd.grad(recorded, leaves, directions, allow_unused=True, is_grads_batched=batched)
    return "", [*results, *gradients]


def differs(got: Outcome, expected: Outcome) -> str | None:
    """Return the difference from the reference."""
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
    """Return sets of gradients to compute: none, all, each alone."""
    leaves = case.leaves()
    return [[], *([leaf] for leaf in leaves), *([leaves] if len(leaves) > 1 else [])]


# What a backend does not implement is an error where it is forced.
ABSENT = ("does not implement", "has no kernel for", "cannot serve", "no kernel")


def run(backend: Callable[[], contextlib.AbstractContextManager[Any]], stride: int) -> Iterator[str]:
    """Run blend's cases and every ``stride``-th other one, printing each before.

    Yields the faults.
    """
    for number, case in enumerate(cases()):
        if number % stride and case.operator != "blend":
            continue
        for wanted in patterns(case):
            for batched in (False, True) if wanted else (False,):
                label = f"{case} gradients of {[f'{name}{place}' if place >= 0 else name for name, place in wanted]}"
                label += " batched" if batched else ""
                print(label, flush=True)
                with ops.use_backend("reference"):
                    expected = outcome(case, wanted, batched)
                try:
                    with backend():
                        got = outcome(case, wanted, batched)
                except RuntimeError as error:
                    if not any(text in str(error) for text in ABSENT):
                        yield f"{label}: {error}"
                    continue
                found = differs(got, expected)
                if found is not None:
                    yield f"{label}: {found}"


def main(backend: str, stride: int) -> int:
    if backend == "emulated":
        from python_tests.ops.emulated_core import emulate

        entered = emulate()
        entered.__enter__()  # once: it loads the core anew
        failures = list(run(lambda: ops.use_backend("cuda"), stride))
    else:
        from python_tests.ops.operator_cases import using

        failures = list(run(lambda: using(backend), stride))
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
