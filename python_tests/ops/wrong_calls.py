"""Calls of torch.ops.fedkern operators with wrong arguments, in a process of its own that a wrong address would end.

Every tensor of a right call is replaced by others of another size, rank or dtype, every whole number by others. A
core refuses the call or computes what the reference does. Prints one line for each call.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedkern.ops import use_backend
from python_tests.ops.empty_cases import Case, outcome
from python_tests.ops.every_operator import OPERATORS
from python_tests.ops.operator_runs import Calls, run
from python_tests.ops.test_arguments import PUBLIC

MOST = 2
"""Calls of an operator that are tried: from the one with fewest arguments to the one with most."""


def right_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Return the arguments of right calls of every operator, as the public functions make them."""
    with Calls() as calls:
        for operator in OPERATORS:
            if not operator.only_cpu:
                run(operator, operator.inputs(), operator.gradient)
        for name, public in PUBLIC.items():
            case = Case(name, _copy(public.arguments))
            outcome(case, case.leaves())
    found: dict[str, dict[str, tuple[Any, ...]]] = defaultdict(dict)
    for function, arguments in calls.seen:
        arguments = _copy(arguments)
        found[function._schema.name.partition("::")[2]].setdefault(_show(arguments), arguments)
    return {name: _spread(sorted(forms.values(), key=_count_given)) for name, forms in sorted(found.items())}


def _spread(calls: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [calls[place * (len(calls) - 1) // (MOST - 1)] for place in range(MOST)] if len(calls) > MOST else calls


def _count_given(arguments: tuple[Any, ...]) -> int:
    return sum(value is not None for value in arguments)


def _others(value: Any) -> Iterator[Any]:
    """Yield other values in the place of an argument's."""
    if isinstance(value, Tensor):
        yield None
        yield value.flatten()
        yield value[None]
        yield value[..., None]
        yield value.to(torch.float64 if value.is_floating_point() else torch.int32)
        yield value.expand(2, *value.shape)
        for axis in range(value.dim()):
            yield value.select(axis, 0)
            yield value.narrow(axis, 0, 0)
            yield value.narrow(axis, 0, value.shape[axis] - 1)
            yield torch.cat([value, value], axis)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (-1, 0, 1, 2, 7, 1000, -(2**40))
    elif isinstance(value, list):
        yield []
        yield value[:-1]
        yield value + value
        for place, item in enumerate(value):
            for wrong in _others(item):
                if wrong is not None:
                    yield [*value[:place], wrong, *value[place + 1 :]]


def _copy(arguments: Any) -> Any:
    """Return the same arguments, tensors in memory of their own and without a graph."""
    if isinstance(arguments, Tensor):
        return arguments.detach().clone() if arguments.numel() else arguments.detach()
    if isinstance(arguments, dict):
        return {name: _copy(value) for name, value in arguments.items()}
    return type(arguments)(map(_copy, arguments)) if isinstance(arguments, (list, tuple)) else arguments


def _outcome(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor] | Exception:
    """Return the results and the changed tensors, or a refusal's exception."""
    arguments = _copy(arguments)
    try:
        result = call(*arguments)
    except Exception as error:
        return error
    return [x for x in _flat(result) + _flat(arguments) if isinstance(x, Tensor)]


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def _line(error: Exception) -> str:
    return repr(error)[:100].replace("\n", " ")


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, (list, tuple)) else repr(value)


def _agree(name: str, ours: list[Tensor], theirs: list[Tensor]) -> bool:
    if name == "contrastive":  # what the loss leaves for its gradient is each backend's own
        ours, theirs = ours[:1], theirs[:1]
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def main() -> None:
    """Print each call, and then its outcome: refused, right or wrong."""
    for name, calls in right_calls().items():
        operator = getattr(torch.ops.fedkern, name).default
        for number, right in enumerate(calls):
            wrong = itertools.chain.from_iterable(
                ([(*right[:place], wrong, *right[place + 1 :]) for wrong in _others(value)])
                for place, value in enumerate(right)
            )
            for given in itertools.chain([right], wrong):
                print(f"{name} {number} {_show(given)}", end=": ", flush=True)
                with use_backend("cpu"):
                    ours = _outcome(operator, given)
                if isinstance(ours, Exception):
                    print("WRONG: a right call is refused" if given is right else "refused", _line(ours))
                    continue
                with use_backend("reference"):
                    theirs = _outcome(operator, given)
                if isinstance(theirs, Exception):
                    print("WRONG: the reference refuses", _line(theirs))
                else:
                    print("right" if _agree(name, ours, theirs) else "WRONG: the reference computes something else")


if __name__ == "__main__":
    main()
