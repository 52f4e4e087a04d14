"""The doctor works with everything missing, and gives the reasons."""

import io
import json
import platform
import sys
import types

import pytest
import torch
from rich.console import Console

from fedkern.ops._core import backend, loading
from fedkern.report import doctor_page


def show() -> str:
    console = Console(file=io.StringIO(), width=160)
    doctor_page.print_report(console)
    return console.file.getvalue()


def test_it_names_versions_processor_threads_and_operators():
    text = show()
    for part in ("python", "torch", "processor", "threads", "GPU"):
        assert part in text
    report = doctor_page.collect_report()
    json.dumps(report)
    operators = {row["operator"] for row in report["operators"]}
    assert "blend" in operators
    for name in operators:
        assert name in text
    # The reference serves everything, everywhere.
    assert all(row["serves"] for row in report["operators"] if row["backend"] == "reference")


def test_operators_without_kernels_for_gpus():
    rows = {(row["operator"], row["backend"]): row for row in doctor_page.collect_report()["operators"]}
    for name in ("triton", "cuda"):
        assert not any(rows[operator, name]["serves"] for operator in ("conv_norm", "conv_pool", "strided_conv"))
        assert f"{name} does not serve conv_norm, conv_pool, strided_conv: not implemented" in show()
    left = "aggregate, boxes, contrastive, optimise"
    assert f"{left}: not implemented; the reference serves, also where triton is forced" in show()
    assert rows["boxes", "triton"]["serves"] is rows["optimise", "triton"]["serves"] is False


def test_what_a_backend_leaves_to_the_reference_is_told():
    report = doctor_page.collect_report()
    for row in report["operators"]:
        if row["backend"] == "triton" and row["operator"] in ("kl_div", "blend"):
            row.update(serves=True, leaves="limits" if row["operator"] == "kl_div" else "")
    console = Console(record=True, width=300)
    doctor_page.print_report(console, report)
    assert "triton leaves to the reference, also where it is forced: of kl_div limits\n" in console.export_text()


def test_a_missing_core_is_explained(monkeypatch):
    def missing(name: str):
        raise loading.Unavailable(f"fedkern.{name} was not built (No module named 'fedkern.{name}')")

    monkeypatch.setattr(backend, "load_core", missing)
    monkeypatch.setattr(loading, "load_core", missing)
    monkeypatch.setattr(backend, "_loaded", {})
    text = show()
    assert "CPU core" in text
    assert "fedkern._cpu was not built" in text
    assert "the reference serves, in plain PyTorch" in text
    rows = [row for row in doctor_page.collect_report()["operators"] if row["backend"] == "cpu"]
    assert rows
    assert not any(row["serves"] for row in rows)


def test_an_outdated_core_is_named(monkeypatch):
    assert "outdated" not in show()
    monkeypatch.setattr(loading, "stale_cores", lambda: ["fedkern._cpu"])
    (line,) = (line for line in show().splitlines() if "outdated" in line)
    assert "fedkern._cpu: not built from the csrc/ beside the package; run pip install . again" in line


def test_an_outdated_core_that_lacks_functions_stops_no_doctor(monkeypatch):
    def lacking():
        raise AttributeError("module 'fedkern._cpu' has no attribute 'blend'")

    kernel = backend.Kernel(lacking, frozenset(), frozenset({"cpu"}))
    monkeypatch.setitem(backend._kernels["blend"], "cpu", kernel)
    monkeypatch.setattr(backend, "_loaded", {})
    assert "cpu does not serve blend: module 'fedkern._cpu' has no attribute 'blend'" in show()


def test_rocm_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    text = " ".join(show().split())
    assert "ROCm (HIP 6.4.1), where no kernel was ever tried: the reference serves unless another is forced" in text
    assert "a CPU build" not in text
    assert doctor_page.collect_report()["cuda"]["hip"] == "6.4.1"


def test_a_forced_isa_that_does_not_exist_is_explained(monkeypatch):
    pytest.importorskip("fedkern._cpu", reason="the compiled core is not built")
    monkeypatch.setenv("FEDKERN_CPU_ISA", "avx1024")
    monkeypatch.setattr(backend, "_isa_applied", False)
    assert "avx1024" in doctor_page.processor()["problem"]
    assert "avx1024" in show()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model\t\t: 143\nmodel name\t: Intel(R) Xeon(R)\n\nmodel name\t: of the second core\n", "Intel(R) Xeon(R)"),
        ("nothing that is known\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_the_processors_name(text, name, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_page, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert doctor_page.processor()["name"] == name


def test_a_forced_backend_is_shown(monkeypatch):
    monkeypatch.setenv("FEDKERN_BACKEND", "reference")
    assert "forced backend" in show()
    monkeypatch.setenv("FEDKERN_BACKEND", "tpu")
    assert "tpu" in show()


def test_no_driver_and_no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert doctor_page.gpus() == ([], "nvidia-ml-py is not installed")
    assert "GPU" in show()


class _NVMLError(Exception):
    pass


def fake_nvml(**changes) -> types.SimpleNamespace:
    def raise_unsupported(handle):
        raise _NVMLError("Not Supported")

    functions = {
        "NVMLError": _NVMLError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=150_000_000_000, used=1_500_000_000),
        "nvmlDeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=37),
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
    }
    if changes.pop("no_utilisation", False):
        functions["nvmlDeviceGetUtilizationRates"] = raise_unsupported
    return types.SimpleNamespace(**{**functions, **changes})


def test_the_driver_that_the_cuda_core_needs_is_named(monkeypatch):
    built = types.SimpleNamespace(architectures=lambda: [80, 90, 100], versions=lambda: (12080, 0))
    monkeypatch.setattr(loading, "load_core", lambda name: built)
    expected = "built with CUDA 12.8 for sm_80, sm_90, sm_100 and newer; needs NVIDIA's driver 525.60.13 or newer"
    assert doctor_page.cuda_core() == expected
    monkeypatch.undo()
    assert doctor_page.cuda_core() in " ".join(show().split())


def test_a_gpu_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert "NVIDIA H200, 1.50 GB of 150 GB used, 37 % busy, driver 580.1" in show()
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(no_utilisation=True))
    assert "150 GB used, driver 580.1" in show()


def test_a_driver_that_fails_is_explained(monkeypatch):
    def fail():
        raise _NVMLError("Driver/library version mismatch")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=fail))
    assert "no NVIDIA driver: Driver/library version mismatch" in show()
