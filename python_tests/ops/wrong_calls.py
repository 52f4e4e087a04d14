"""Calls torch.ops.fedkern operators with wrong arguments, in a process of its own: a wrong address would end it.

Every tensor of a right call is replaced by others of another size, rank or dtype, every whole number by others. A
core refuses the call or computes what the reference does. Prints one line for each call.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fedkern.ops import use_backend

BATCH, CLASSES, COUNT, SIZE = 4, 6, 3, 50


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def right_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of right calls of every operator."""
    rows, stack = _randn(BATCH, CLASSES), _randn(COUNT, BATCH, CLASSES)
    weight, shares, number = torch.rand(BATCH), torch.rand(COUNT, BATCH), torch.tensor(1.0)
    by_class = torch.rand(COUNT, BATCH, CLASSES)
    mask = torch.tensor([[True] * CLASSES, [True, False] * 3, [False, True] * 3])
    maps, index = _randn(BATCH, 2, 3, 3), torch.tensor([2, 0, 1, 2])
    vectors, weights = [_randn(SIZE) for _ in range(5)], torch.rand(5)
    features, scale = [_randn(2, c, 3, 3) for c in (2, 3)], _randn(5)
    alike = [_randn(2, 3, 3, 3) for _ in range(2)]
    embeddings, learnt = (_randn(BATCH, 8), _randn(BATCH, 8) * 2), torch.tensor(0.5)
    sums = torch.ops.fedkern.contrastive(*embeddings, learnt, 0.5)[1]
    fused = torch.ops.fedkern.fuse(features, scale, scale, True, False)
    state = [_randn(SIZE).abs() for _ in range(6)]
    one, rule = (torch.tensor(x, dtype=torch.float64) for x in (0.1, [0.1, 0.9, 0.99, 1e-3]))
    # momentum, weight decay, proximal, max norm, betas, eps
    sgd = torch.tensor([0.9, 0.1, 0.5, 1.0, 0.9, 0.99, 1e-8], dtype=torch.float64)
    plain = torch.tensor([0.9, 0.1, 0.0, 1.0, 0.9, 0.99, 1e-8], dtype=torch.float64)
    cohort, rates = [_randn(3, 8) for _ in range(4)], torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    return {
        "divergence": [
            (rows, rows + 1, rows * 2, weight, None, 2.0, False, 2),
            (rows, None, rows * 2, None, None, 2.0, True, 0),
            (rows, None, rows * 2, None, None, float("inf"), False, 1),
        ],
        "divergence_backward": [
            (number, rows, rows + 1, rows * 2, weight, None, 2.0, False, 2, True, True, True, True),
            (weight, rows, None, rows * 2, None, None, 2.0, True, 0, True, False, True, False),
        ],
        "entropy": [(rows, 2), (rows, 0)],
        "entropy_backward": [(number, rows, 2), (weight, rows, 0)],
        "ensemble": [
            (rows, stack, by_class, mask, None, 2.0, 0, False, 2),
            (rows, stack, shares[:, :, None], None, None, 1.0, 1, True, 0),
            (rows, stack, None, None, None, 2.0, 2, False, 1),
        ],
        "ensemble_backward": [
            (number, rows, stack, by_class, mask, None, 2.0, 0, False, 2, True, True, True),
            (weight, rows, stack, shares[:, :, None], None, None, 2.0, 2, False, 0, True, True, True),
        ],
        "jensen_shannon": [(stack, shares, 2), (stack, None, 0)],
        "jensen_shannon_backward": [(number, stack, shares, 2, True, True), (weight, stack, None, 0, True, False)],
        "consensus": [(stack, shares, 2), (stack, None, 0)],
        "consensus_backward": [
            (number, number, stack, shares, 2, True, True),
            (weight, weight, stack, None, 0, True, False),
        ],
        "blend": [(maps, maps[:3] * 2, weight, 0.0, index), (maps, maps * 2, None, 0.3, None)],
        "blend_backward": [
            (maps, maps, maps[:3], weight, 0.0, index, 3, True, True, True),
            (maps, None, None, None, 0.3, None, BATCH, True, True, False),
        ],
        "fill_boxes": [(maps, torch.rand(BATCH, 2, 4) * 3, torch.zeros(1, 2), False)],
        "contrastive": [(*embeddings, learnt, 0.5), (*embeddings, None, 0.5)],
        "contrastive_training": [(*embeddings, learnt, 0.5, True, True, True)],
        "contrastive_backward": [(number, *embeddings, learnt, sums, 0.5, True, True, True)],
        "fuse": [(features, scale, scale, True, False), (alike, None, _randn(6), False, True)],
        "fuse_backward": [
            (fused, features, fused, scale, scale, True, False, [2, 3], [True, True], True, True),
            (alike[0], alike, None, None, _randn(6), True, True, [3, 3], [True, False], False, True),
        ],
        "weighted_mean": [(torch.stack(vectors), weights, None)],
        "sorted_mean": [(vectors, 1, 4, weights), (vectors, 0, 5, None)],
        "weighted_median": [(vectors, weights)],
        "geometric_median": [(vectors, weights, 20, 1e-6, 1e-9)],
        "pairwise_distances": [(vectors,)],
        "krum": [(vectors, 1, 2)],
        "clip_and_noise": [(vectors, torch.tensor([1.0, 0.5], dtype=torch.float64), 3, 0)],
        "server_step": [
            (state[0], vectors, weights, 0, rule, None, None, None, False),
            (state[0], vectors, weights, 2, rule, state[1], state[2], None, True),
        ],
        "optimiser_step_and_zero": [(state[0], state[1], state[2], None, None, None, None, one, plain, None)],
        "optimiser_step": [
            (state[0], state[1], state[2], None, state[3], state[4], state[5], one, sgd, None),
            (state[0], state[1], state[2], state[3], None, None, None, one, plain, 3),
            (*cohort[:3], None, cohort[3], None, None, rates, sgd, None),
        ],
    }  # fmt: skip


def _others(value: Any) -> Iterator[Any]:
    """Other values in the place of an argument's."""
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
        for place, one in enumerate(value):
            for other in _others(one):
                if other is not None:
                    yield [*value[:place], other, *value[place + 1 :]]


def _copied(arguments: Any) -> Any:
    if isinstance(arguments, Tensor):
        return arguments.clone() if arguments.numel() else arguments
    return type(arguments)(map(_copied, arguments)) if isinstance(arguments, (list, tuple)) else arguments


def _outcome(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor] | Exception:
    """The results and what was written.

    The exception of a refusal.
    """
    arguments = _copied(arguments)
    try:
        result = call(*arguments)
    except Exception as error:
        return error
    return [x for x in _flat(result) + _flat(arguments) if isinstance(x, Tensor)]


def _flat(value: Any) -> list[Any]:
    return [x for each in value for x in _flat(each)] if isinstance(value, (list, tuple)) else [value]


def _line(error: Exception) -> str:
    return repr(error)[:100].replace("\n", " ")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, (list, tuple)) else repr(value)


def _agree(name: str, ours: list[Tensor], theirs: list[Tensor]) -> bool:
    if name == "contrastive":  # what the loss leaves for its gradient is each backend's own
        ours, theirs = ours[:1], theirs[:1]
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def main() -> None:
    """Prints each call, and after it what came of it: refused, right or wrong."""
    for name, calls in right_calls().items():
        operator = getattr(torch.ops.fedkern, name).default
        for number, right in enumerate(calls):
            wrong = itertools.chain.from_iterable(
                ([(*right[:place], other, *right[place + 1 :]) for other in _others(value)])
                for place, value in enumerate(right)
            )
            for given in itertools.chain([right], wrong):
                print(f"{name} {number} {_shown(given)}", end=": ", flush=True)
                with use_backend("cpu"):
                    ours = _outcome(operator, given)
                if isinstance(ours, Exception):
                    print(
                        "WRONG: a right call is refused" if given is right else "refused",
                        repr(ours)[:100].replace("\n", " "),
                    )
                    continue
                with use_backend("reference"):
                    theirs = _outcome(operator, given)
                if isinstance(theirs, Exception):
                    print("WRONG: the reference refuses", _line(theirs))
                else:
                    print("right" if _agree(name, ours, theirs) else "WRONG: the reference computes something else")


if __name__ == "__main__":
    main()
