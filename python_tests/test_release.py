"""Tests of a release for its Pythons and torches: the package, cibuildwheel, the workflow and the pages agree."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedkern.ops._core import devices

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHECKLIST = ROOT / "docs" / "releasing.md"


def pythons() -> list[str]:
    prefix = "Programming Language :: Python :: 3."
    return [name.rpartition(" ")[2] for name in PROJECT["project"]["classifiers"] if name.startswith(prefix)]


def workflow() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    path = ROOT / ".github" / "workflows" / "wheels.yml"
    if not path.exists():
        pytest.skip("workflows are not part of a source distribution")
    return yaml.safe_load(path.read_text())


def test_a_wheel_is_made_for_every_python() -> None:
    builds = PROJECT["tool"]["cibuildwheel"]["build"]
    assert builds == [f"cp{version.replace('.', '')}-manylinux_x86_64" for version in pythons()]
    assert len(builds) >= 4


def test_torch_triton_and_python_have_no_upper_limit() -> None:
    everything = [*PROJECT["project"]["dependencies"], PROJECT["project"]["requires-python"]]
    everything += PROJECT["project"]["optional-dependencies"]["triton"]
    assert not [line for line in everything if "<" in line]
    assert PROJECT["project"]["requires-python"] == f">={pythons()[0]}"


def test_the_workflow_tests_every_wheel_with_the_oldest_and_the_newest_torch() -> None:
    jobs = workflow()["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"] == pythons()
    (oldest,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("torch"))
    assert matrix["torch"] == [f"{oldest.replace('>=', '==')}.*", "torch"]


def test_only_a_tag_publishes_and_only_what_was_tested() -> None:
    jobs = workflow()["jobs"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert "refs/tags/v" in jobs["publish"]["if"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]


def test_the_checklist_names_the_toolkit_and_its_driver() -> None:
    script = ROOT / ".ci" / "install-cuda"
    (toolkit,) = re.findall(r"CUDA_TOOLKIT:-(\d+)-\d+\}", script.read_text())
    (full,) = re.findall(r"CUDA_TOOLKIT:-(\d+-\d+)\}", script.read_text())
    text = CHECKLIST.read_text()
    assert f"CUDA {full.replace('-', '.')}" in text
    assert devices.DRIVERS[int(toolkit)] in text


def test_the_script_for_the_container_says_what_it_lacks(tmp_path: Path) -> None:
    """The script fails before it installs anything."""
    done = subprocess.run(
        [shutil.which("bash") or "/bin/bash", str(ROOT / ".ci" / "install-cuda")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "CUDA_RPM_REPOSITORY: set it to" in done.stderr
