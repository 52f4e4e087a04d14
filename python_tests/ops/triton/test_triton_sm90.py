"""Tests that every Triton kernel compiles for sm_90 without spilling a register.

No GPU is needed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

spec = importlib.util.find_spec("triton")
pytestmark = pytest.mark.skipif(spec is None or spec.origin is None, reason="triton is not installed")


def compile_all(*arguments: str) -> list[dict[str, Any]]:
    """Return the output of ``compile_sm90.py``, from a process of its own: this one may run the interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_sm90.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not run.returncode, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(compiled: list[dict[str, Any]]) -> None:
    spilled = [line for line in compiled if line["spill_stores"] or line["spill_loads"]]
    assert not spilled
    kernels = {
        name
        for path in (ROOT / "fedkern" / "ops").glob("**/*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert kernels, "no kernels found"
    assert {line["kernel"] for line in compiled} == kernels


@pytest.mark.exhaustive
def test_no_kernel_spills() -> None:
    check(compile_all())


@pytest.mark.slow
def test_no_kernel_spills_in_any_dtype_and_size_class() -> None:
    check(compile_all("--full"))


@pytest.mark.exhaustive
def test_other_places_need_no_other_kernel() -> None:
    compiled = Counter(line["kernel"] for line in compile_all("--family", "places"))
    assert compiled == {"concat_kernel": 1}


@pytest.mark.exhaustive
def test_a_spill_would_be_seen() -> None:
    compiled = compile_all("--family", "distill", "--registers", "24")
    assert any(line["spill_stores"] and line["spill_loads"] for line in compiled)
    with pytest.raises(AssertionError):
        check(compiled)
