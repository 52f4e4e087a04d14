"""Every kernel at a small and a large size, with rows that align to 16 bytes and rows that do not, in fp32 and bf16.

python -m benchmarks.gpu.kernels --results DIR [--backends cuda triton reference] ["OPERATOR SIZE" ...]

Times come from events, other memory read into the L2 cache before each call, beside a copy of as many bytes in the same
process; wall times from calls in a row.  DIR gets ``kernels.json``, written anew after every call; rows that it has of
the same machine and core stay, so that a part can be measured again, or missing rows (``--missing``).
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machines
from benchmarks.timing import CudaClock
from fedkern import ops
from fedkern.files import filesystem

FILE = "kernels.json"
SAME = ("gpu", "torch", "cuda", "triton", "core")
"""Facts whose rows may stand in one file; ``core`` is the hash of the CUDA core's sources."""
DEVICE = "cuda"
SAMPLES, CALLS = 10, 20  # of a kernel's time, of a wall time
CLIENTS = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VECTORS = {"small": 100_000, "middle": 1_000_000, "large": 11_000_000}
ROWS = {"small": (64, 10), "hundred": (4096, 100), "thousand": (8192, 1000), "large": (2048, 32_000)}
BATCHES = {"small": (32, 10_000), "large": (64, 1_000_000)}
MAPS = {"small": (16, 16, 32, 32), "large": (64, 64, 96, 96)}
Made = tuple[Callable[[], Any], int]
"""A call, and the fewest bytes that it must move."""


def draw(*shape: int, dtype: torch.dtype, leaf: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(leaf)


def train(loss: Callable[..., Tensor], leaves: Sequence[Tensor], constants: Sequence[Any] = ()) -> Callable[[], Any]:
    """Return a call forward and backward, with gradients of ones for outputs that are no scalars."""
    loss_value = loss(*leaves, *constants)
    outer = torch.ones_like(loss_value)
    return lambda: torch.autograd.grad(loss(*leaves, *constants), leaves, outer)


def vectors(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield operators on M vectors [P], and on one."""
    bytes_of = size * dtype.itemsize
    weights = [float(m + 1) for m in range(CLIENTS)]

    def several(call: Callable[[list[Tensor]], Any], moved: int) -> Callable[[], Made]:
        def make() -> Made:
            held = [draw(size, dtype=dtype) for _ in range(CLIENTS)]
            return lambda: call(held), moved * bytes_of

        return make

    def mean() -> Made:
        held, out = [draw(size, dtype=dtype) for _ in range(CLIENTS)], draw(size, dtype=dtype)
        return lambda: ops.weighted_mean(held, weights, out=out), (CLIENTS + 1) * bytes_of

    def stack() -> Made:
        held, out = draw(CLIENTS, size, dtype=dtype), draw(size, dtype=dtype)
        return lambda: ops.weighted_mean(held, weights, out=out), (CLIENTS + 1) * bytes_of

    def server(rule: str, states: int) -> Made:
        held, model = [draw(size, dtype=dtype) for _ in range(CLIENTS)], draw(size, dtype=dtype)
        kept = dict(zip(("first", "second"), (torch.zeros(size, device=DEVICE) for _ in range(states)), strict=False))
        moved = (CLIENTS + 2) * bytes_of + 2 * 4 * states * size
        return lambda: ops.server_step(model, held, weights, rule, out=model, **kept), moved

    def add(exact: bool) -> Made:
        total, vector = ops.Accumulator(size, exact=exact, device=DEVICE), draw(size, dtype=dtype)
        return lambda: total.add(vector, 2.0), (50 if exact else 16) * size + bytes_of

    def step(states: int) -> Made:
        held = [draw(size, dtype=dtype) for _ in range(2)] + [
            torch.zeros(size, dtype=dtype, device=DEVICE) for _ in range(states)
        ]
        call = (
            partial(ops.sgd_step, *held, lr=1e-4, momentum=0.9, weight_decay=1e-4, zero=True)
            if states == 1
            else partial(ops.adamw_step, *held, 3, lr=1e-4, zero=True)
        )
        return call, 2 * (2 + states) * bytes_of

    yield "weighted_mean", mean
    yield "weighted_mean stack", stack
    yield "server_step", partial(server, "mean", 0)
    yield "server_step adam", partial(server, "adam", 2)
    yield "accumulator", partial(add, False)
    yield "accumulator exact", partial(add, True)
    yield "sgd_step", partial(step, 1)
    yield "adamw_step", partial(step, 2)
    yield "trimmed_mean", several(lambda held: ops.trimmed_mean(held, 2), CLIENTS + 1)
    yield "median", several(ops.median, CLIENTS + 1)
    yield "geometric_median", several(ops.geometric_median, 2 * CLIENTS + 1)
    yield "krum", several(lambda held: ops.krum(held, 2, 3), CLIENTS + 4)
    yield "pairwise_distances", several(ops.pairwise_distances, CLIENTS)
    yield "clip_by_norm", several(lambda held: ops.clip_by_norm(held, 0.7), 3 * CLIENTS)
    yield "clip_and_noise", several(lambda held: ops.clip_and_noise(held, 0.7, 0.1, seed=3), 3 * CLIENTS)


def batches(batch: int, size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield blends of samples [B, P]."""
    moved = batch * size * dtype.itemsize

    def blend(gradient: bool, index: bool) -> Made:
        x, y = (draw(batch, size, dtype=dtype, leaf=gradient) for _ in range(2))
        chosen = torch.randperm(batch, device=DEVICE) if index else None
        call = partial(ops.blend, alpha=0.3, index=chosen)
        return (train(call, [x, y]), 6 * moved) if gradient else (lambda: call(x, y), 3 * moved)

    yield "blend", partial(blend, False, False)
    yield "blend index", partial(blend, False, True)
    yield "blend gradient", partial(blend, True, False)
    yield "blend index gradient", partial(blend, True, True)


def losses(rows: int, classes: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield row losses, forward and backward."""
    moved = rows * classes * dtype.itemsize
    experts = 4

    def one(loss: Callable[..., Tensor], leaves: int, constants: int) -> Made:
        tensors = [draw(rows, classes, dtype=dtype, leaf=i < leaves) for i in range(leaves + constants)]
        return train(loss, tensors[:leaves], tensors[leaves:]), (2 * leaves + constants) * moved

    def ensemble(temperature: float = 2.0, **kind: str) -> Made:
        student, teachers = draw(rows, classes, dtype=dtype, leaf=True), draw(experts, rows, classes, dtype=dtype)
        return (
            train(partial(ops.ensemble_kl, temperature=temperature, **kind), [student], [teachers]),
            (2 + experts) * moved,
        )

    def jensen() -> Made:
        return train(ops.js_div, [draw(2, rows, classes, dtype=dtype, leaf=True)]), 4 * moved

    def agree() -> Made:
        logits = draw(experts, rows, classes, dtype=dtype)
        return lambda: ops.consensus(logits), experts * moved

    yield "kl_div", partial(one, lambda s, t: ops.kl_div(s, t, 2.0), 1, 1)
    yield "dual_kl", partial(one, lambda a, b, t: ops.dual_kl(a, b, t, 2.0), 2, 1)
    yield "entropy", partial(one, ops.entropy, 1, 0)
    yield "kl_div limit", partial(one, lambda s, t: ops.kl_div(s, t, math.inf), 1, 1)
    yield "dual_kl limit", partial(one, lambda a, b, t: ops.dual_kl(a, b, t, math.inf), 2, 1)
    yield "ensemble_kl limit", partial(ensemble, math.inf)
    yield "ensemble_kl", ensemble
    yield "ensemble_kl logits", partial(ensemble, mix="logits")
    yield "ensemble_kl mean_of_kl", partial(ensemble, mode="mean_of_kl")
    yield "js_div", jensen
    yield "consensus", agree


def maps(shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield operators on feature maps [B, C, H, W]."""
    batch, channels = shape[:2]
    moved = torch.Size(shape).numel() * dtype.itemsize

    def box(call: Callable[..., Tensor]) -> Made:
        images = draw(*shape, dtype=dtype)
        boxes = torch.tensor([[[4.0, 4.0, 20.0, 20.0]]], device=DEVICE, dtype=dtype).expand(batch, 1, 4).contiguous()
        read = int(call(torch.ones_like(images), boxes, 0.0).count_nonzero())  # pixels that are replaced are not
        return lambda: call(images, boxes, 0.5), moved + read * dtype.itemsize

    def fuse(call: Callable[..., Tensor], out: int, gradient: bool) -> Made:
        width = 2 * channels
        tensors = [draw(*shape, dtype=dtype, leaf=gradient) for _ in range(2)]
        tensors += [draw(width, dtype=dtype, leaf=gradient) for _ in range(2)]

        def join(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return call([x, y], scale, shift, "relu")

        if not gradient:
            return lambda: join(*tensors), (2 + out) * moved
        return train(join, tensors), (2 * (2 + out) + 2) * moved

    yield "erase_boxes", partial(box, ops.erase_boxes)
    yield "keep_boxes", partial(box, ops.keep_boxes)
    for name, call, out in (("fuse_concat", ops.fuse_concat, 2), ("fuse_mean", ops.fuse_mean, 1)):
        yield name, partial(fuse, call, out, False)
        yield f"{name} gradient", partial(fuse, call, out, True)


def features(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], Made]]]:
    """Yield the contrastive loss, which is bound by its products and not by its bytes."""
    for size, rows in (("small", 256), ("large", 8192)):

        def make(rows: int = rows) -> Made:
            embeddings = [draw(rows, 128, dtype=dtype, leaf=True) for _ in range(2)]
            return train(ops.contrastive, embeddings), 4 * rows * 128 * dtype.itemsize

        yield "contrastive", size, make


def cases(dtype: torch.dtype, odd: bool) -> Iterator[tuple[str, str, Callable[[], Made]]]:
    """Yield operator, size, and a function that makes its call.

    Args:
        dtype: of the tensors.
        odd: whether rows are 4 n + 2 elements long.
    """
    extra = 2 if odd else 0
    for size, length in VECTORS.items():
        yield from ((name, size, make) for name, make in vectors(length + extra, dtype))
    for size, (batch, length) in BATCHES.items():
        yield from ((name, size, make) for name, make in batches(batch, length + extra, dtype))
    for size, (rows, classes) in ROWS.items():
        classes += extra if classes % 4 == 0 else 0
        yield from ((name, size, make) for name, make in losses(rows, classes, dtype))
    for size, shape in MAPS.items():
        yield from ((name, size, make) for name, make in maps((*shape[:3], shape[3] - 1) if odd else shape, dtype))
    if not odd:
        yield from features(dtype)


def measure(made: Made, clock: CudaClock) -> dict[str, Any]:
    """Return seconds by events and by the wall clock, and the share of a copy's bandwidth."""
    call, moved = made
    call()
    half = max(moved // 8, 1)
    source, target = (torch.ones(half, device=DEVICE) for _ in range(2))
    seconds, copied = clock.sample(call, SAMPLES), clock.sample(lambda: target.copy_(source), SAMPLES)
    wall = clock.wall(call, CALLS) or seconds
    return {"seconds": seconds, "wall": wall, "copy": copied, "share": copied / seconds}


def main(words: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 where a call failed, whose row says why."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="CASE", help="first words of operator and size; all by default")
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton", "reference"])
    parser.add_argument("--missing", action="store_true", help="measure what DIR has no row of")
    args = parser.parse_args(words)
    args.results.mkdir(parents=True, exist_ok=True)
    clock, table = CudaClock(torch.device(DEVICE)), Table(args.results / FILE)
    failed = False
    for row, make in list_rows(args.operators, args.backends):
        if args.missing and table.has(row):
            continue
        torch.manual_seed(0)
        try:
            with ops.use_backend(row["backend"]):
                row |= measure(make(), clock)
        except Exception as error:  # the others are measured all the same
            failed = True
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        table.add(row)
        print(describe(row), flush=True)
    return int(failed)


def list_rows(words: Sequence[str], backends: Sequence[str]) -> Iterator[tuple[dict[str, Any], Callable[[], Made]]]:
    """Yield the rows to fill, and functions that make the call of each, without odd ones of the reference.

    Args:
        words: first words of an operator and a size, for example "kl_div" or "kl_div large"; empty: all.
    """
    for (spelt, dtype), odd in itertools.product(DTYPES.items(), (False, True)):
        for name, size, make in cases(dtype, odd):
            if words and not any(f"{name} {size} ".startswith(f"{word} ") for word in words):
                continue
            for backend in backends:
                if not (odd and backend == "reference"):
                    yield {"operator": name, "size": size, "dtype": spelt, "odd": odd, "backend": backend}, make


class Table:
    """Rows of a machine and a core in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._machine = {**machines.machine("cuda"), "core": machines.served_by("cuda")[1]}
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text())
            if all(content["machine"].get(name) == self._machine.get(name) for name in SAME):
                self._rows = {_key(row): row for row in content["rows"]}

    def has(self, row: dict[str, Any]) -> bool:
        """Return whether the call was measured, and did not fail."""
        return "seconds" in self._rows.get(_key(row), {})

    def add(self, row: dict[str, Any]) -> None:
        """Put a row in the place of an earlier one of the same call, and write the file."""
        self._rows[_key(row)] = row
        lines = ",\n".join(json.dumps(row) for row in self._rows.values())
        text = f'{{"machine": {json.dumps(self._machine)},\n"rows": [\n{lines}\n]}}\n'
        filesystem.replace(self._path, lambda temporary: temporary.write_text(text))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("operator", "size", "dtype", "odd", "backend"))


def describe(row: dict[str, Any]) -> str:
    head = f"{row['operator']:24} {row['size']:8} {row['dtype']} {'odd' if row['odd'] else '   '} {row['backend']:9}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    return f"{head} {1e6 * row['seconds']:9.1f} µs {100 * row['share']:5.0f} % of copy {1e6 * row['wall']:9.1f} µs wall"


if __name__ == "__main__":
    sys.exit(main())
