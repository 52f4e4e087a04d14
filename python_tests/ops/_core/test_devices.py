"""Tests of GPUs and drivers that cannot run the kernels: noticed before the first call, and another backend serves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedkern.ops._core import backend, devices, loading, private_torch
from python_tests.ops.emulated_core import build

BUILT_FOR = [80, 90, 100]


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], hip: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", hip)


def fake_core(runtime: int = 13000, driver: int = 13000, built_for: list[int] = BUILT_FOR) -> Any:
    return SimpleNamespace(
        architectures=lambda: built_for,
        versions=lambda: (runtime, driver),
        take_tensors=lambda *_: None,
        blend_fits=lambda *_: 0,
    )


def why_not(core: Any) -> str:
    try:
        devices.check_cuda(core)
    except loading.Unavailable as error:
        return str(error)
    return ""


@pytest.mark.exhaustive
def test_the_core_says_what_it_was_built_for() -> None:
    try:
        core = build()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert core.architectures() == BUILT_FOR
    assert core.versions() == (13000, 13000)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_gpus_of_supported_kinds_and_newer_ones_are_served(monkeypatch: Any, capability: tuple[int, int]) -> None:
    fake_gpus(monkeypatch, capability)
    assert why_not(fake_core()) == ""
    assert devices.only_forced("triton") == ""


def test_no_gpu_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    assert why_not(fake_core(driver=0)) == ""
    assert devices.only_forced("triton") == ""


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, (7, 5))
    assert why_not(fake_core()) == (
        "GPU 0 (Tesla T4) is of sm_75, and fedkern._cuda was built for sm_80, sm_90, sm_100 and newer"
    )
    assert "sm_75, and Triton supports sm_80 and newer" in devices.only_forced("triton")
    assert devices.only_forced("cuda") == ""
    fake_gpus(monkeypatch, (9, 0), (7, 5))
    assert "GPU 1 (Tesla T4) is of sm_75" in why_not(fake_core())
    assert "CUDA_VISIBLE_DEVICES can hide it" in why_not(fake_core())


def test_a_gpu_between_what_the_core_was_built_for_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code serves later GPUs of its own generation, PTX those newer than it."""
    fake_gpus(monkeypatch, (9, 0))
    assert "is of sm_90" in why_not(fake_core(built_for=[80, 100]))
    fake_gpus(monkeypatch, (8, 0))
    assert "is of sm_80" in why_not(fake_core(built_for=[86]))


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, (9, 0))
    assert "built with CUDA 13.0 and the driver serves 12.6: update" in why_not(fake_core(driver=12060))
    assert "update the driver (580.65.06 or newer), or build with" in why_not(fake_core(driver=12060))
    assert why_not(fake_core(runtime=12090, driver=12060)) == ""  # drivers serve their own major version
    fake_gpus(monkeypatch, (12, 0))
    assert "newer than fedkern._cuda" in why_not(fake_core(runtime=12090, driver=12080))
    assert why_not(fake_core(runtime=12090, driver=13000)) == ""


def test_the_driver_that_a_core_needs_is_its_major_versions() -> None:
    assert (
        devices.driver_for(fake_core(runtime=12080))
        == devices.driver_for(fake_core(runtime=12090))
        == ("525.60.13 or newer")
    )
    assert devices.driver_for(fake_core(runtime=13010)) == "580.65.06 or newer"
    assert devices.driver_for(fake_core(runtime=14020)) == "one for CUDA 14.0 or newer"


def test_gpus_that_torch_cannot_use_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int = 0) -> tuple[int, int]:
        raise RuntimeError("CUDA error: uncorrectable ECC error\nCompile with TORCH_USE_CUDA_DSA")

    fake_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert why_not(fake_core()) == "torch cannot use the GPUs (CUDA error: uncorrectable ECC error)"
    assert devices.only_forced("triton") == why_not(fake_core())


def test_a_core_of_older_sources_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, (9, 0))
    assert "older sources" in why_not(SimpleNamespace())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend a process without choices yet, whose torch and CUDA core know CUDA.

    Triton's kernels are stand-ins.
    """
    monkeypatch.delenv("FEDKERN_BACKEND", raising=False)
    for name in ("_chosen", "_loaded", "_ordinary"):
        monkeypatch.setattr(backend, name, {})
    monkeypatch.setattr(private_torch, "raw_stream", lambda index: 0)
    monkeypatch.setattr(private_torch, "check_stream", lambda: None)  # of the GPUs that fake_gpus makes up
    monkeypatch.setattr(backend, "load_core", lambda name: fake_core())
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    kernel = backend.Kernel(lambda: "triton's", frozenset(backend.DTYPES), frozenset({"cuda"}))
    monkeypatch.setitem(backend._kernels["blend"], "triton", kernel)


def choose() -> Any:
    return backend._choose("blend", "cuda")[0]


def reason(name: str) -> str:
    (row,) = (row for row in backend.status() if (row.operator, row.backend) == ("blend", name))
    return "" if row.serves else row.reason


@pytest.mark.usefixtures("fresh")
def test_cuda_serves_a_gpu_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, (9, 0))
    assert type(choose()).__name__ == "BlendKernels"
    assert choose().gpu
    assert reason("cuda") == reason("triton") == ""


@pytest.mark.usefixtures("fresh")
def test_an_old_driver_leaves_the_call_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "load_core", lambda name: fake_core(driver=12060))
    fake_gpus(monkeypatch, (9, 0))
    assert choose() == "triton's"
    assert "the driver serves 12.6" in reason("cuda")
    assert reason("triton") == ""


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("capability", "hip", "of_cuda", "of_triton"),
    [((7, 5), None, "sm_75", "sm_75"), ((9, 4), "6.4", "ROCm build (HIP 6.4)", "never tried on ROCm (HIP 6.4)")],
)
def test_an_old_gpu_and_rocm_are_left_to_the_reference(capability, hip, of_cuda, of_triton, monkeypatch) -> None:
    fake_gpus(monkeypatch, capability, hip=hip)
    assert choose() is None
    assert of_cuda in reason("cuda")
    assert of_triton in reason("triton")
    with backend.use_backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' was forced, but .* because "):
        choose()
    with backend.use_backend("triton"):
        assert choose() == "triton's"
        assert reason("triton") == ""


@pytest.mark.usefixtures("fresh")
def test_nothing_is_asked_again_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    fake_gpus(monkeypatch, (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: asked.append(index) or (7, 5))
    x = SimpleNamespace(device=torch.device("cuda"))
    assert backend.select("blend", x) is None
    before = len(asked)
    assert before
    assert backend.select("blend", x) is None
    assert len(asked) == before
