"""Tests of torch.ops.fedkern with wrong arguments: exported programs call it without the public functions' checks."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.ops import wrong_calls
from python_tests.ops.operator_cases import needs_core

FEDKERN = torch.ops.fedkern
NAMES = sorted(
    name.removeprefix("fedkern::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("fedkern::")
)
ROWS, STACK, NUMBER = torch.randn(4, 6), torch.randn(3, 4, 6), torch.tensor(1.0)

# What no core can see: what a number stands for, and which of several shapes is meant.
REFUSED = {
    "a reduction": lambda: FEDKERN.divergence(ROWS, None, ROWS, None, None, 1.0, False, 7),
    "a reduction of entropy": lambda: FEDKERN.entropy(ROWS, -1),
    "a gradient of rows for a sum": lambda: FEDKERN.entropy_backward(torch.ones(4), ROWS, 2, True),
    "a number's gradient for rows": lambda: FEDKERN.jensen_shannon_backward(NUMBER, STACK, None, 0, True, False),
    "short weights": lambda: FEDKERN.ensemble(ROWS, STACK, torch.ones(3, 4), None, None, 1.0, 0, False, 2),
    "pairs of two sizes": lambda: FEDKERN.contrastive(ROWS[:3], ROWS, None, 0.5, True, True, False),
    "a temperature of one axis": lambda: FEDKERN.contrastive(ROWS, ROWS, torch.ones(1), 0.5, True, True, True),
    "a gradient of no scale": lambda: FEDKERN.fuse_backward(
        ROWS, [ROWS], None, None, None, False, False, [6], [True], True, False
    ),
}


@pytest.mark.parametrize("call", REFUSED)
def test_wrong_arguments_are_refused(backend: str, call: str) -> None:
    with pytest.raises(ValueError, match=r"must|given"):
        REFUSED[call]()


def test_no_gradient_may_be_wanted(backend: str) -> None:
    gradients = FEDKERN.jensen_shannon_backward(NUMBER, STACK, None, 2, False, False)
    assert [x.numel() for x in gradients] == [0, 0]


def test_no_operator_is_left_out() -> None:
    assert list(wrong_calls.right_calls()) == NAMES


# The others have no gradient, or one that is the reference's.
DIFFERENTIABLE = {
    *("divergence", "entropy", "ensemble", "jensen_shannon", "consensus", "contrastive", "weighted_mean"),
    *("blend", "blend_backward", "fill_boxes", "fuse", "fuse_backward"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    for arguments in wrong_calls.right_calls()[name]:
        utilities: dict[str, Any] = {}
        if name in DIFFERENTIABLE:
            for x in wrong_calls._flat(arguments):
                if isinstance(x, Tensor) and x.is_floating_point():
                    x.requires_grad_()
        elif name.endswith("_backward"):
            utilities["test_utils"] = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(getattr(FEDKERN, name).default, arguments, **utilities)


@needs_core
def test_wrong_arguments_are_refused_before_any_memory_is_touched() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", wrong_calls.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} at {lines[-1:]}: {done.stderr[-500:]}"
    assert [line for line in lines if "WRONG" in line] == []
    assert sum(": refused" in line for line in lines) > 1000
