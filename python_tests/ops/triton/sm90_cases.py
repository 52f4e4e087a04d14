"""Launches of every kernel, element type and size class, as the launchers make them on a GPU."""

# Each case is called before the generator goes on, so what a function finds in a loop's variable is its own.
# ruff: noqa: B023
import contextlib
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

import fedkern.ops
from fedkern.ops._blend.kernels import BlendCall
from fedkern.ops._blend.triton.blend import TritonBlend
from fedkern.ops._distill.kernels import Divergence, Ensemble, consensus_call, entropy_call, js_call
from fedkern.ops._distill.rows import BATCHMEAN, LOGITS, MEAN, NONE, PROBS
from fedkern.ops._distill.triton.distill import TritonDistill
from fedkern.ops._fuse.reference import FuseCall
from fedkern.ops._fuse.triton import TritonFuse

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Case = tuple[str, Callable[[], Any]]


def modules() -> list[ModuleType]:
    """Return the modules of fedkern.ops that hold Triton kernels."""
    names = [entry.name for entry in pkgutil.walk_packages(fedkern.ops.__path__, "fedkern.ops.")]
    found = [importlib.import_module(name) for name in names if "triton" in name.split(".")]
    return [module for module in found if any(name.endswith("_kernel") for name in vars(module))]


@contextlib.contextmanager
def record_launches(launch: Callable[..., None], processors: int) -> Iterator[None]:
    """Hand every launch to ``launch``, which sees a device of so many ``processors``."""
    before = []
    replaced = {"launch": launch, "processors": lambda device: processors}
    try:
        for module in modules():
            for name, value in replaced.items():
                if hasattr(module, name):
                    before.append((module, name, getattr(module, name)))
                    setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def cases(full: bool) -> Iterator[Case]:
    """Yield a name (its first word the family) and its call.

    ``full``: each dtype in each size class, and odd sizes.

    Otherwise a spread of cases that compiles in less than a minute.
    """
    families = (blend_cases, distill_cases, ensemble_cases, fuse_cases, size_one, places_cases)
    for family, step in zip(families, (2, 5, 2, 1, 1, 1), strict=True):
        yield from itertools.islice(family(full), 0, None, 1 if full else step)


def pick(full: bool, number: int) -> tuple[torch.dtype, ...]:
    """Return the dtypes of a size class: all, or another one each time."""
    return DTYPES if full else (DTYPES[number % 4],)


def blend_cases(full: bool) -> Iterator[Case]:
    kernel = TritonBlend()
    shapes = [(64, 256, 14, 14), (64, 512)]
    if full:
        shapes += [(401, 7), (5, 1271), (1, 3, 1 << 20)]
    for number, shape in enumerate(shapes):
        for dtype in pick(full, number):
            x, y = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            index, alpha = torch.zeros(shape[0], dtype=torch.int64), torch.zeros(shape[0], dtype=dtype)
            label = f"blend {dtype} {list(shape)}"
            for i in (None, index):
                for a in (None, alpha):
                    if full or (i is None) == (a is None):
                        needs = (True, True, a is not None)
                        call = BlendCall(a, 0.3, i, len(y))
                        yield f"{label} forward", lambda x=x, y=y, call=call: kernel.forward(x, y, call)
                        yield (
                            f"{label} backward",
                            lambda x=x, y=y, call=call, needs=needs: kernel.backward(x, x, y, call, needs),
                        )
            short = y[: max(len(y) // 8, 1)]
            call = BlendCall(None, 0.3, index, len(short))
            yield (
                f"{label} backward, rows used by many",
                lambda x=x, call=call: kernel.backward(x, None, None, call, (True, True, False)),
            )


# Rows of each kind: in one tile and in several, whole and in pieces, in parts, and with the positions side by side.
SHAPES = [(64, 10), (4096, 1000), (256, 32000), (8, 131072), (8, 4, 128, 128)]
MORE_SHAPES = [(64, 1), (4096, 100), (401, 1271), (2, 8192, 16, 16), (2, 150, 64, 65)]


def distill_cases(full: bool) -> Iterator[Case]:
    kernel = TritonDistill()
    for number, shape in enumerate([*SHAPES, *(MORE_SHAPES if full else [])]):
        for dtype in pick(full, number):
            x = torch.empty(shape, dtype=dtype)
            layouts = [x]
            if x.dim() == 4 and full:
                layouts.append(x.to(memory_format=torch.channels_last))
            for x in layouts:
                label = f"distill {dtype} {list(shape)}"
                rows = torch.empty(shape[:1] + shape[2:], dtype=dtype)
                kl = Divergence(x, None, x, None, 2.0, False, BATCHMEAN)
                dual = Divergence(x, x, x, None, 2.0, True, BATCHMEAN)
                kl_rows = Divergence(x, None, x, rows, 2.0, False, NONE)
                dual_rows = Divergence(x, x, x, rows, 2.0, False, BATCHMEAN)
                entropy = entropy_call(x, BATCHMEAN)
                g = torch.empty((), dtype=dtype)
                forward, backward = kernel.divergence_forward, kernel.divergence_backward
                calls = [
                    ("kl", lambda: forward(kl)),
                    ("kl to student", lambda: backward((g,), kl, (True, False, False, False))),
                    ("dual", lambda: forward(dual)),
                    ("dual to both", lambda: backward((g,), dual, (True, True, False, False))),
                    ("entropy", lambda: forward(entropy)),
                    ("entropy gradient", lambda: backward((g,), entropy, (False, False, True, False))),
                ]
                if full:
                    calls += [
                        ("kl per row", lambda: forward(kl_rows)),
                        ("kl to all", lambda: backward((rows,), kl_rows, (True, False, True, True))),
                        ("dual to all", lambda: backward((g,), dual_rows, (True, True, True, True))),
                    ]
                for name, call in calls:
                    yield f"{label} {name}", call


def ensemble_cases(full: bool) -> Iterator[Case]:
    kernel = TritonDistill()
    shapes = [(20, 64, 10), (5, 8, 4, 128, 128), (3, 64, 32000), (20, 256, 100)]
    for number, shape in enumerate(shapes[: 4 if full else 3]):
        for dtype in pick(full, number):
            x = torch.empty(shape, dtype=dtype)
            student, g, mask = x[0].contiguous(), torch.empty((), dtype=dtype), torch.ones(shape[0], shape[2]).bool()
            by_row = torch.ones((*shape[:2], 1, *shape[3:]))
            by_class = torch.ones(shape)
            label = f"ensemble {dtype} {list(shape)}"
            for mix in (PROBS, LOGITS, MEAN):
                for weights in (by_row, by_class)[: 2 if full and mix != MEAN else 1]:
                    classes = mask if full and mix != MEAN else None
                    call = Ensemble(student, x, weights, classes, 2.0, mix, False, BATCHMEAN)
                    yield f"{label} mix {mix}", lambda: kernel.ensemble_forward(call)
                    for needs in ((True, False, False), (False, True, True)):
                        if full or needs[0] or mix == PROBS:
                            yield (f"{label} mix {mix} backward", lambda: kernel.ensemble_backward((g,), call, needs))
            forward, backward = kernel.ensemble_forward, kernel.ensemble_backward
            log_probs = Ensemble(student, x, by_row, None, 1.0, MEAN, True, BATCHMEAN)
            js, consensus = js_call(x, None, BATCHMEAN), consensus_call(x, by_row.squeeze(2), BATCHMEAN)
            yield f"{label} of log-probabilities", lambda: forward(log_probs)
            yield f"{label} of log-probabilities backward", lambda: backward((g,), log_probs, (True, True, True))
            yield f"{label} js", lambda: forward(js)
            yield f"{label} js backward", lambda: backward((g,), js, (False, True, False))
            yield f"{label} consensus", lambda: forward(consensus)
            if full:
                yield f"{label} consensus backward", lambda: backward((g, g), consensus, (False, True, True))


def fuse_cases(full: bool) -> Iterator[Case]:
    kernel = TritonFuse()
    for number, (count, shape) in enumerate(
        [(10, (64, 64, 32, 32)), (5, (64, 20, 16, 17)), (50, (4, 64))][: 3 if full else 2]
    ):
        for dtype in pick(full, number):
            for last in (False, True) if full and len(shape) == 4 else (number == 1,):
                layout = torch.channels_last if last else torch.contiguous_format
                maps = [torch.empty(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(count)]
                vector, channels = torch.empty(count * shape[1], dtype=dtype), [shape[1]] * count
                for mean in (False, True):
                    label = f"fuse {dtype} {count} maps {list(shape)} {'mean' if mean else 'concat'} {layout}"
                    call = FuseCall(vector, vector, True, mean, channels, last)
                    yield f"{label} forward", lambda: kernel.forward(maps, call)
                    grad = torch.empty((shape[0], shape[1] * (1 if mean else count), *shape[2:]), dtype=dtype)
                    grad = grad.contiguous(memory_format=layout)
                    for vectors in (False, True):
                        needs = ((not vectors,) * count, vectors, vectors)
                        yield f"{label} backward", lambda: kernel.backward(grad, maps, None, call, needs)
                    if full and not mean:
                        needs = ((True,) * count, False, True)
                        yield (
                            f"{label} backward from the result",
                            lambda: kernel.backward(grad, None, grad, call, needs),
                        )
                    if full:
                        bare = FuseCall(None, None, False, mean, channels, last)
                        yield f"{label} forward alone", lambda: kernel.forward(maps, bare)


def size_one(full: bool) -> Iterator[Case]:
    """Yield launches with arguments that are 1, which Triton passes as Python numbers without ``.to()``."""
    distill, fuse = TritonDistill(), TritonFuse()
    for shape in ((1, 100_000), (1, 1), (3, 1), (1, 3, 1, 1))[: 4 if full else 1]:
        x, g = torch.empty(shape), torch.empty(())
        call, needs = Divergence(x, None, x, None, 2.0, False, BATCHMEAN), (True, False, True, False)
        yield f"distill {list(shape)}", lambda: distill.divergence_forward(call)
        yield f"distill {list(shape)}", lambda: distill.divergence_backward((g,), call, needs)
    for count, shape in ((2, (3, 1, 4, 4)), (1, (1, 3, 4, 4)), (2, (1, 1, 1, 1)))[: 3 if full else 2]:
        maps, vector = [torch.empty(shape) for _ in range(count)], torch.empty(count * shape[1])
        grad = torch.empty((shape[0], shape[1] * count, *shape[2:]))
        for vectors in (False, True):
            wanted = ((not vectors,) * count, vectors, vectors)
            fused = FuseCall(vector, vector, True, False, [shape[1]] * count, False)
            yield f"fuse {count} {list(shape)}", lambda: fuse.backward(grad, maps, None, fused, wanted)
        for mean in (False, True):
            fused = FuseCall(vector, vector, True, mean, [shape[1]] * count, False)
            yield f"fuse {count} {list(shape)}", lambda: fuse.forward(maps, fused)


def places_cases(full: bool) -> Iterator[Case]:
    """Yield launches at several addresses, which are data and must not need another kernel."""
    kernel, memory = TritonFuse(), torch.empty(8, 5000)
    together, separate = list(memory.flatten()[: 8 * 4096].view(8, 4, 1024)), [x[:4096].view(4, 1024) for x in memory]
    for maps in (together, separate, together[::-1], [*separate[2:], separate[0], separate[0]]):
        call = FuseCall(None, None, False, False, [1024] * 8, False)
        yield "places fuse_concat", lambda: kernel.forward(maps, call)
