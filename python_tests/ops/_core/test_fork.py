"""Tests of forked children after the thread pool has run, and of kernels with scarce resources."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedkern import ops
from fedkern.ops import use_backend
from python_tests.ops.every_operator import OPERATORS, Operator
from python_tests.ops.operator_cases import KERNELS

pytestmark = pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")


SECONDS = 60


@pytest.fixture
def woken() -> list[tuple[Operator, list[Tensor], tuple[Tensor, ...]]]:
    """Return operators that the compiled core serves, with inputs and results.

    The thread pool has two threads and has run.
    """
    torch.set_num_threads(2)
    ready = []
    with ops.use_backend("cpu"), torch.no_grad():
        for operator in OPERATORS:
            if operator.compiled:
                inputs = operator.inputs(large=True)
                ready.append((operator, inputs, operator.results(*inputs)))
    torch.randn(1 << 20).add_(1)
    return ready


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Return whether NumPy sees the same bits, without torch's own thread pool."""
    return all(bits(a) == bits(b) for a, b in zip(got, expected, strict=True))


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def in_a_child(cases: Sequence[tuple[str, Callable[[], tuple[Tensor, ...]], tuple[Tensor, ...]]]) -> None:
    """Run (name, call, expected) in a forked child, and fail for the call that hangs, raises or gives other bits."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            for name, call, expected in cases:
                os.write(writer, f"{name};".encode())
                if not same(call(), expected):
                    os._exit(2)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    begun, deadline = b"", time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if select.select([reader], [], [], 1.0)[0]:
            chunk = os.read(reader, 4096)
            if not chunk:
                break
            begun += chunk
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    last = begun.decode().rstrip(";").rpartition(";")[2]
    assert status != -signal.SIGKILL, f"{last} hung in the child"
    assert status == 0, f"{last} failed in the child"
    assert last == cases[-1][0]


def test_a_forked_child_computes_the_same(woken: list[tuple[Operator, list[Tensor], tuple[Tensor, ...]]]) -> None:
    def call(operator: Operator, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return operator.results(*inputs)

    in_a_child([(operator.name, partial(call, operator, inputs), expected) for operator, inputs, expected in woken])


SIZE = 100_000  # more than torch gives to one thread


def module() -> nn.Module:
    made = nn.Sequential(nn.Linear(300, 400, bias=False), nn.BatchNorm1d(400))
    nn.init.constant_(made[0].weight, 0.25)
    return made


def load_flat() -> Tensor:
    flat = ops.FlatParameters(module())
    flat.load(torch.full((flat.vector.numel(),), 0.5))
    return flat.vector.clone()


def accumulate(exact: bool) -> Tensor:
    """Return the mean of two accumulators, merged where they are exact, by way of a state."""
    vectors = torch.linspace(-1, 1, 9 << 18).view(9, -1)
    left, two, again = (ops.Accumulator(1 << 18, exact) for _ in range(3))
    for m, vector in enumerate(vectors):
        (left if m % 2 or not exact else two).add(vector, m + 1.0)
    if exact:
        left.merge(two)
    again.load_state_dict(left.state_dict())
    return again.mean()


def gradient(function: Callable[..., Any], *given: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in given]
    result = function(*leaves)
    loss = result[0] if isinstance(result, tuple) else result
    return tuple(torch.autograd.grad(loss.sum(), leaves, materialize_grads=True))


def by(backend: str | None, function: Callable[..., Any], *given: Tensor) -> tuple[Tensor, ...]:
    with ops.use_backend(backend):
        found = function(*given)
    return found if isinstance(found, tuple) else (found,)


def torch_calls() -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]]]]:
    """Return calls that rest on torch's own operators, over tensors that torch shares among threads."""
    rows = torch.linspace(-3, 3, 4 * SIZE).view(4, SIZE)
    logits = torch.linspace(-3, 3, SIZE).view(-1, 100)
    yield "torch", lambda: (rows.square(),)
    yield "FlatParameters", lambda: (ops.FlatParameters(module()).vector.clone(),)
    yield "FlatParameters.load", lambda: (load_flat(),)
    yield "Accumulator", lambda: (accumulate(False), accumulate(True))
    yield "weighted_mean", partial(by, "reference", ops.weighted_mean, rows, torch.ones(4))
    yield "kl_div in fp64", partial(by, "reference", ops.kl_div, logits.double(), logits.double().flip(0))
    yield "a gradient", partial(gradient, ops.kl_div, logits, logits.flip(0))


@pytest.fixture
def pool() -> None:
    """Return a thread pool of two threads that has run."""
    torch.set_num_threads(2)
    torch.randn(1 << 20).add_(1)


def with_results(calls):
    """Add a call's result on one thread: on two, torch may sum in another order."""
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, call in calls:
        found.append((name, call, call()))
    torch.set_num_threads(before)
    return found


@pytest.mark.usefixtures("pool")
def test_what_torch_computes_in_a_child() -> None:
    in_a_child(
        [
            *with_results(torch_calls()),
            ("threads", lambda: (torch.tensor(torch.get_num_threads()),), (torch.tensor(1),)),
        ]
    )
    assert torch.get_num_threads() == 2


@pytest.mark.exhaustive
@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("forced", [None, "reference"])
def test_every_operator_and_gradient_in_a_child(forced: str | None, dtype: torch.dtype) -> None:
    calls = []
    for operator in OPERATORS:
        inputs = operator.inputs(dtype, large=True)
        calls.append((operator.name, partial(by, forced, operator.results, *inputs)))
        if operator.gradient:
            calls.append((f"{operator.name}, gradient", partial(by, forced, partial(gradient, operator.call), *inputs)))
    in_a_child(with_results(calls))


# A child that meets the compiled core for the first time, after its parent's threads have run.
LATE = """
import os, signal, sys, time
import torch
{before}
torch.set_num_threads(2)
x, y, out = torch.randn(1 << 22), torch.randn(1 << 22), torch.empty(1 << 22)
torch.add(x, y, out=out)
child = os.fork()
if not child:
    from fedkern import ops
    with ops.use_backend("cpu"):
        ops.weighted_mean([x, y], [1.0, 1.0], out=out)
    os._exit(0)
for _ in range({seconds} * 10):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, signal.SIGKILL)
sys.exit("the child hangs")
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("before", ["", "import fedkern.ops"])
def test_a_child_that_was_forked_before_the_core_was_loaded(before: str) -> None:
    code = LATE.format(before=before, seconds=SECONDS // 2)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


# -- thread resources --------------------------------------------------------------------------------------------------


FOLDER = Path(__file__).resolve().parents[1]

BEGIN = """
import os, sys, threading
sys.path.insert(0, {folder!r})
import torch
from python_tests.ops.every_operator import OPERATORS
from fedkern import ops
from fedkern.ops import use_backend
compiled = [operator for operator in OPERATORS if operator.compiled]
"""

SMALL_STACK = """
torch.set_num_threads(1)
vectors = list(torch.randn(13, 70_000))
calls = [(operator.name, operator.call, operator.inputs(large=True)) for operator in compiled]
calls += [
    ("weighted_mean of 13", lambda *x: ops.weighted_mean(x, [1.0] * 13), vectors),
    ("weighted_mean, strided", lambda *x: ops.weighted_mean([y[::2] for y in x], [1.0] * 13), vectors),
    ("median", lambda *x: ops.median(x), vectors),
    ("server_step", lambda *x: ops.server_step(x[0], x[1:], [1.0] * 12), vectors),
    ("clip_by_norm", lambda *x: ops.clip_by_norm(x, 1.0), vectors),
]
threading.stack_size(64 * 1024)
for name, call, inputs in calls:
    def work():
        with use_backend("cpu"), torch.no_grad():
            call(*inputs)
    print(name, flush=True)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""

LITTLE_MEMORY = """
import resource
torch.set_num_threads({threads})
count, size = 200_000, 20_000
row = torch.randn(size)
vectors = [row] * count
weights = [1.0] * count
calls = [lambda: ops.trimmed_mean(vectors, count // 2 - 1), lambda: ops.server_step(row, vectors, weights)]
with use_backend("cpu"):
    ops.weighted_mean(vectors[:20], [1.0] * 20)  # threads have their stacks
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
    for call in calls:
        try:
            call()
            print("served")
        except (MemoryError, RuntimeError) as error:
            print(type(error).__name__)
"""


def run(program: str, **values: object) -> subprocess.CompletedProcess[str]:
    code = (BEGIN + program).replace("{folder!r}", repr(str(FOLDER)))
    for name, value in values.items():
        code = code.replace("{" + name + "}", str(value))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.exhaustive
def test_every_operator_works_in_a_stack_of_64_kb() -> None:
    done = run(SMALL_STACK)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1]} failed: {done.stderr[-500:]}"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("threads", [1, 2])
def test_too_little_memory_is_an_error_and_no_end_of_the_process(threads: int) -> None:
    done = run(LITTLE_MEMORY, threads=threads)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split() == ["MemoryError"] * 2


def test_denormals_are_flushed_on_every_thread_or_on_none() -> None:
    vectors = torch.full((4, 1 << 22), 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    results = {}
    try:
        torch.set_num_threads(2)
        for flushes in (False, True):
            torch.set_flush_denormal(flushes)
            with use_backend("cpu"):
                results[flushes] = [ops.weighted_mean(vectors, [1.0] * 4) for _ in range(5)]
    finally:
        torch.set_flush_denormal(False)
    for flushes, means in results.items():
        for mean in means:
            assert int(mean.view(torch.int32).count_nonzero()) == (0 if flushes else 1 << 22)
