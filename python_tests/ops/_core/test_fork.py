"""Forked children after the thread pool has run: the lost threads must not be waited for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from every_operator import OPERATORS, Operator
from operator_cases import KERNELS
from torch import Tensor

from fedkern.ops import use_backend

pytestmark = pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
SECONDS = 60


@pytest.fixture
def woken() -> Iterator[list[tuple[Operator, list[Tensor], tuple[Tensor, ...]]]]:
    """Operators that the compiled core serves, with inputs and results; the thread pool has two threads and has run."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    ready = []
    with use_backend("cpu"), torch.no_grad():
        for operator in OPERATORS:
            if operator.compiled:
                inputs = operator.inputs(large=True)
                ready.append((operator, inputs, operator.results(*inputs)))
    torch.randn(1 << 20).add_(1)
    yield ready
    torch.set_num_threads(before)


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """torch.equal, without torch's own thread pool."""
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(got, expected, strict=True))


def test_a_forked_child_computes_the_same(woken: list[tuple[Operator, list[Tensor], tuple[Tensor, ...]]]) -> None:
    copies = [operator.fresh(inputs) for operator, inputs, _ in woken]  # in the child torch's own copy would hang
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            with torch.no_grad():
                for (operator, _, expected), inputs in zip(woken, copies, strict=True):
                    os.write(writer, f"{operator.name};".encode())
                    given = operator.call(*inputs)
                    if not same(given if isinstance(given, tuple) else (given,), expected):
                        os._exit(2)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    begun, deadline = b"", time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if select.select([reader], [], [], 1.0)[0]:
            some = os.read(reader, 4096)
            if not some:
                break
            begun += some
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    last = begun.decode().rstrip(";").rpartition(";")[2]
    assert status != -signal.SIGKILL, f"{last} hung in the child"
    assert status == 0, f"{last} failed in the child"
    assert last == woken[-1][0].name


class Computing(torch.utils.data.Dataset):
    """Item i is whether operator i gives in a worker what it gave in the parent."""

    def __init__(self, cases: list[tuple[Operator, list[Tensor], tuple[Tensor, ...]]]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, item: int) -> tuple[int, bool, int]:
        operator, inputs, expected = self.cases[item]
        with torch.no_grad():
            return item, same(operator.results(*inputs), expected), os.getpid()


def test_data_loader_workers(woken: list[tuple[Operator, list[Tensor], tuple[Tensor, ...]]]) -> None:
    loader = torch.utils.data.DataLoader(
        Computing(woken), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS
    )
    seen = list(loader)
    assert [item for item, _, _ in seen] == list(range(len(woken)))
    assert not [woken[item][0].name for item, equal, _ in seen if not equal]
    assert os.getpid() not in {process for _, _, process in seen}


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
