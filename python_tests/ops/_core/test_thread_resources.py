"""Tests of kernels with scarce resources: small stacks, little memory, flushed denormals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedkern import ops
from fedkern.ops import use_backend
from python_tests.ops.operator_cases import KERNELS

pytestmark = pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
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
