"""Tests of inputs without elements: every operator, each optional argument given and left out, in every backend."""

import os
import subprocess
import sys

import pytest
import torch

from fedkern import ops
from python_tests.ops import empty_cases
from python_tests.ops.operator_cases import BACKENDS, KERNELS

# Every so many cases, and blend's in full; all of them where slow tests run.
SOME, FEW = 3, 20


def child(*arguments: str) -> None:
    """Run Python in a process of its own, which a failure of these tests would end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    last = found.stdout.rstrip().rpartition("\n")[2]
    assert found.returncode == 0, f"exit {found.returncode} in {last}\n{found.stderr[-4000:]}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*BACKENDS, "emulated"])
def test_inputs_without_elements(name: str) -> None:
    child("-m", empty_cases.__name__, name, str(FEW if name in ("triton", "emulated") else SOME))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BACKENDS, "emulated"])
def test_all_inputs_without_elements(name: str) -> None:
    child("-m", empty_cases.__name__, name, "1")


BLEND = """
import torch
from fedkern import ops
i = torch.zeros(0, dtype=torch.int64)
f = torch.ones(0, 2, 4, 4)
for rows in (1, 3):
    b = torch.ones(rows, 2, 4, 4, requires_grad=True)
    for alpha in (0.3, torch.rand(0), torch.tensor(0.3)):
        def loss(b):
            return ops.blend(f, b, alpha, index=i).sum()
        second = torch.func.hessian(loss)(b).sum((4, 5, 6, 7))
        got = [torch.autograd.grad(loss(b), b)[0], torch.func.grad(loss)(b), second]
        assert all(torch.equal(g, torch.zeros_like(b)) for g in got), got
compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
assert torch.equal(torch.autograd.grad(compiled(b), b)[0], torch.zeros_like(b))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
def test_blend_of_no_rows_with_an_index_under_transforms() -> None:
    child("-c", BLEND)


def test_boxes_of_no_images_of_any_stride(backend: str) -> None:
    """The result of contiguous() of a tensor without elements is the tensor itself, whatever its strides."""
    images = torch.zeros(2, 3, 8, 8)[:0, :, ::2, ::2].requires_grad_()
    for call in (ops.erase_boxes, ops.keep_boxes):
        result = call(images, [])
        assert result.shape == images.shape
        result.sum().backward()


FREED = """
import torch
from fedkern import ops
for lost in ("index", "alpha"):
    for transposed in (False, True):
        f, b = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        given = {"alpha": torch.rand(3, requires_grad=True), "index": torch.tensor([4, 2, 0])}
        result = ops.blend(f, b, **given)
        given[lost].untyped_storage().resize_(0)
        grad = torch.randn(4, 3).t() if transposed else torch.randn(3, 4)
        try:
            result.backward(grad)
        except RuntimeError as error:
            assert lost in str(error) and "no memory" in str(error), error
        else:
            raise AssertionError(f"{lost} was read where it no longer is")
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")
def test_a_saved_index_without_memory_is_an_error() -> None:
    child("-c", FREED)
