"""Measured sizes between CUDA and Triton: which entry decides, what calls ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedkern import versions
from fedkern.ops._core import backend, crossovers, dispatch
from fedkern.ops._core.crossovers import Entry, Times, read_entries, write_entries

H200 = Entry(
    "NVIDIA H200",
    (9, 0),
    {"torch": "2.11.0"},
    "2026-11-24T02:00:00+00:00",
    {"kl_div": 1000, "entropy": None, "blend": 7},
    {"kl_div": (Times(10, 1e-5, 2e-5), Times(1000, 2e-4, 1e-4)), "entropy": (Times(10, 1e-5, 2e-5),), "blend": ()},
)
H100 = replace(H200, gpu="NVIDIA H100", time="2026-11-25T02:00:00+00:00", thresholds={"kl_div": 3000})
A100 = replace(
    H200, gpu="NVIDIA A100", capability=(8, 0), time="2026-11-26T02:00:00+00:00", thresholds={"kl_div": 4000}
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table of three GPUs in the place of fedkern's."""
    path = tmp_path / "crossovers.json"
    write_entries([A100, H100, H200], path)
    monkeypatch.setattr(crossovers, "FILE", path)
    return path


def test_fedkerns_own_table_is_one_and_names_operators() -> None:
    for entry in read_entries(crossovers.FILE):
        assert set(entry.thresholds) == set(entry.times) <= set(backend._kernels)


def test_the_table_is_in_the_package() -> None:
    assert crossovers.FILE.parent == Path(dispatch.__file__).parent  # also where the package is installed
    assert isinstance(read_entries(crossovers.FILE), tuple)


def test_a_file_is_read_as_it_was_written(table: Path) -> None:
    assert read_entries(table) == (A100, H100, H200)
    assert not list(table.parent.glob(".*"))


def test_the_gpus_own_entry_counts_then_the_latest_of_its_kind(table: Path) -> None:
    def sizes(gpu: str, capability: tuple[int, int]) -> list[int | None]:
        return [dispatch.threshold(name, capability, gpu) for name in ("kl_div", "entropy", "blend")]

    assert sizes("NVIDIA H200", (9, 0)) == [1000, None, 7]
    assert sizes("NVIDIA GH200", (9, 0)) == [3000, dispatch.LAUNCH_HIDDEN[9], None]
    assert sizes("NVIDIA B200", (10, 0)) == [dispatch.LAUNCH_HIDDEN[10], dispatch.LAUNCH_HIDDEN[10], None]


def test_the_file_is_read_once(table: Path) -> None:
    assert dispatch.threshold("kl_div", (9, 0), "NVIDIA H200") == 1000
    table.unlink()
    assert dispatch.threshold("kl_div", (9, 0), "NVIDIA H200") == 1000


def test_runs_on_a_gpu_tell_their_sizes(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "crossovers" not in versions.kernels()
    assert versions.kernels("cpu") == versions.kernels()
    gpu = ["NVIDIA H200", (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu[1])
    assert versions.kernels("cuda") == {**versions.kernels(), "crossovers": H200.digest}
    gpu[:] = ["NVIDIA H100", (9, 0)]
    assert versions.kernels("cuda")["crossovers"] == H100.digest != H200.digest
    gpu[:] = ["NVIDIA B200", (10, 0)]
    assert versions.kernels("cuda")["crossovers"] == "estimated"
    monkeypatch.setattr(backend, "_forced", "reference")
    assert "crossovers" not in versions.kernels("cuda")
