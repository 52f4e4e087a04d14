"""Tests of the operators on a core built with AddressSanitizer and UndefinedBehaviorSanitizer."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_preset_instruments_a_core_of_its_own() -> None:
    """The preset must neither replace the core in use nor lose the sanitizers."""
    presets = {p["name"]: p for p in json.loads((ROOT / "csrc/CMakePresets.json").read_text())["configurePresets"]}
    variables = presets["sanitize"]["cacheVariables"]
    assert variables["FEDKERN_SANITIZE"] == "address,undefined"
    assert variables["FEDKERN_OUTPUT_DIR"].endswith("/build/sanitize/site/fedkern")
    assert os.access(ROOT / "cmake" / "sanitize.sh", os.X_OK)


@pytest.mark.slow
def test_operators_under_sanitizers() -> None:
    missing = [tool for tool in ("bash", "g++", "cmake", "ninja", "nm") if shutil.which(tool) is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(["cmake/sanitize.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
