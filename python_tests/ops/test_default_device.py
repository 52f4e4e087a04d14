"""Tests that tensors on the CPU give results on the CPU, whatever torch's default device is or was at the import."""

import os
import subprocess
import sys

import pytest
import torch

from python_tests.ops.every_operator import OPERATORS, Operator, each_operator
from python_tests.ops.operator_runs import run


def check(operator: Operator, default: str) -> None:
    """Check that the bits are the same under another default device."""
    inputs = operator.inputs()
    expected = run(operator, inputs, operator.gradient)
    with torch.device(default):
        results = run(operator, inputs, operator.gradient)
    for x, y in zip(results, expected, strict=True):
        assert x is y is None or (x.is_cpu and torch.equal(x, y))


@each_operator
def test_the_default_device_changes_nothing(operator: Operator) -> None:
    check(operator, "meta")


def check_all() -> None:
    for operator in OPERATORS:
        check(operator, "cpu")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "imported",
    [
        "torch.set_default_device('meta')\nfrom fedkern import ops\ntorch.set_default_device(None)",
        "with torch.inference_mode(), torch.device('meta'):\n    from fedkern import ops",
    ],
    ids=["import", "import within modes"],
)
def test_an_import_under_another_default_device(imported: str) -> None:
    code = (
        f"import torch\n{imported}\nfrom python_tests.ops import test_default_device\ntest_default_device.check_all()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=300, env=environment)
