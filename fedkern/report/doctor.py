"""Command ``doctor``: versions, processor, GPU, and the operators' backends with the reasons why some do not serve."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable

from fedkern.errors import MESSAGE
from fedkern.process.commit import commit
from fedkern.report.names import plain, say
from fedkern.report.tables import human_bytes
from fedkern.text_table import Table

CPUINFO = Path("/proc/cpuinfo")
PACKAGES = (
    "fedkern", "torch", "triton", "numpy", "nvidia-ml-py", "safetensors", "transformers", "flwr", "opacus",
    "dp-accounting", "nibabel", "tensorboard", "wandb",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python, fedkern (with its commit) and packages it uses; absent packages are ``"not installed"``."""
    packages = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    if packages["fedkern"] == "not installed":
        packages["fedkern"] = importlib.import_module("fedkern").__version__
    packages["fedkern"] += f" (commit {commit()})" if commit() else ""
    return packages


def cpuinfo(path: Path) -> dict[str, str]:
    """Entries of ``/proc/cpuinfo`` for the first processor; none where there is no such file."""
    entries: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").partition("\n\n")[0].splitlines():
            name, colon, value = line.partition(":")
            if colon:
                entries[name.strip()] = value.strip()
    return entries


def processor() -> dict[str, Any]:
    """The CPU: ``name``, ``cores``, and the ISA levels of fedkern's compiled core.

    The levels are ``available``, ``active`` and ``forced`` (None if not forced).  If the compiled core cannot be used,
    ``problem`` says why, instead of ``available`` and ``active``.
    """
    from fedkern.ops._core import backend, loading

    name = cpuinfo(CPUINFO).get("model name") or platform.processor() or platform.machine()
    entries: dict[str, Any] = {"name": name, "cores": os.cpu_count()}
    forced = os.environ.get("FEDKERN_CPU_ISA")
    entries["forced"] = forced or None
    try:
        core = backend.cpu_core()
        entries["available"] = list(core.available_isas())
        entries["active"] = core.isa()
    except loading.Unavailable as error:
        entries["problem"] = f"{error}; the reference serves, in plain PyTorch"
    except ValueError as error:
        entries["problem"] = str(error)
    return entries


def cuda_core() -> str:
    """What fedkern's CUDA core was built for and the driver that it needs, or why there is none."""
    from fedkern.ops._core import devices, loading

    try:
        core = loading.load_core("_cuda")
        kinds = ", ".join(f"sm_{one}" for one in core.architectures())
        built = f"built with CUDA {devices.version(core.versions()[0])} for {kinds} and newer"
        return f"{built}; needs NVIDIA's driver {devices.driver_for(core)}"
    except (loading.Unavailable, AttributeError) as error:  # AttributeError: an outdated core
        return f"none: {error}"


def threads() -> dict[str, Any]:
    """Number of PyTorch's threads, which fedkern's compiled core uses too, and the settings that limit them."""
    import torch

    return {
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "usable cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def gpus() -> tuple[list[dict[str, Any]], str]:
    """GPUs that the NVIDIA driver lists through NVML, and the reason why there are none, empty if there are.

    A GPU has ``name``, ``memory`` and ``used`` (bytes), ``utilisation`` (per cent, or None if the driver does not
    report it) and ``driver``.
    """
    try:
        import pynvml
    except ImportError:
        return [], "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver: {error}"
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        devices = []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            try:
                utilisation: int | None = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            except pynvml.NVMLError:  # not reported for MIG slices and some virtual GPUs
                utilisation = None
            sizes = {"memory": int(memory.total), "used": int(memory.used)}
            name = _text(pynvml.nvmlDeviceGetName(handle))
            devices.append({"name": name, **sizes, "utilisation": utilisation, "driver": driver})
        return devices, "" if devices else "the driver lists no GPU"
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def operators() -> tuple[list[Any], str | None, str]:
    """Rows (operator, backend, serves, reason, leaves), the forced backend, and the error in forcing it (or "")."""
    import fedkern.ops
    from fedkern.ops._core import backend

    del fedkern  # importing it is what registers the operators
    try:
        return list(backend.status()), backend.forced_backend(), ""
    except ValueError as error:
        return list(backend.status()), None, str(error)


def collect() -> dict[str, Any]:
    """Everything that :func:`show` prints, as JSON-ready values."""
    import torch

    from fedkern.ops._core import loading

    rows, forced, problem = operators()
    devices, reason = gpus()
    cuda: dict[str, Any] = {
        "torch": torch.version.cuda,
        "hip": torch.version.hip,
        "available": torch.cuda.is_available(),
    }
    cuda |= {"gpus": devices, "reason": reason, "core": cuda_core()}
    table = [
        {"operator": row[0], "backend": row[1], "serves": bool(row[2]), "reason": row[3], "leaves": row[4]}
        for row in rows
    ]
    about = {"versions": versions(), "cpu": processor(), "stale": loading.stale_cores(), "threads": threads()}
    return {**about, "cuda": cuda, "forced_backend": forced, "problem": problem, "operators": table}


def show(console: Console, report: dict[str, Any] | None = None) -> None:
    """Prints the report: versions, processor, threads, GPU, and the backends that serve each operator."""
    report = collect() if report is None else report
    facts = TerminalTable(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")

    def add(name: str, value: object) -> None:
        facts.add_row(name, plain(value, most=MESSAGE))

    present = {name: version for name, version in report["versions"].items() if version != "not installed"}
    absent = [name for name, version in report["versions"].items() if version == "not installed"]
    add("versions", ", ".join(f"{name} {version}" for name, version in present.items()))
    if absent:
        add("not installed", ", ".join(absent))
    add("system", f"{platform.system()} {platform.machine()}, {sys.executable}")
    cpu = report["cpu"]
    add("processor", f"{cpu['name']}, {cpu['cores']} cores")
    if "problem" in cpu:
        add("CPU core", f"not used: {cpu['problem']}")
    else:
        forced = " (forced by FEDKERN_CPU_ISA)" if cpu["forced"] else ""
        add("CPU core", f"{cpu['active']}{forced}; this machine can run {', '.join(cpu['available'])}")
    if report["stale"]:
        from fedkern.ops._core import loading

        names = " and ".join(report["stale"])
        add("outdated", f"{names}: not built from the csrc/ beside the package; {loading.REBUILD}")
    thread = report["threads"]
    limits = [f"{name}={thread[name] or 'unset'}" for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]
    add("threads", f"{thread['torch']} ({', '.join(limits)}, {thread['usable cores']} cores usable)")
    cuda = report["cuda"]
    for gpu in cuda["gpus"]:
        busy = "" if gpu["utilisation"] is None else f", {gpu['utilisation']} % busy"
        used = f"{human_bytes(gpu['used'])} of {human_bytes(gpu['memory'])} used"
        add("GPU", f"{gpu['name']}, {used}{busy}, driver {gpu['driver']}")
    if not cuda["gpus"]:
        add("GPU", f"none of NVIDIA's ({cuda['reason']})" if cuda["hip"] else f"none ({cuda['reason']})")
    build = f"CUDA {cuda['torch']}" if cuda["torch"] else "no CUDA (a CPU build)"
    if cuda["hip"]:
        build = (
            f"ROCm (HIP {cuda['hip']}), where no kernel was ever tried: the reference serves unless another is forced"
        )
    add("torch is built for", f"{build}; torch.cuda.is_available() is {cuda['available']}")
    add("CUDA core", cuda["core"])
    if report["forced_backend"] or report["problem"]:
        add("forced backend", report["forced_backend"] or f"none: {report['problem']}")
    console.print(facts)
    console.print()
    console.print(_operator_table(report["operators"]))
    reasons: dict[tuple[str, str], list[str]] = {}
    partial: dict[tuple[str, str], list[str]] = {}
    for row in report["operators"]:
        if not row["serves"]:
            reasons.setdefault((row["backend"], row["reason"]), []).append(row["operator"])
        elif row["leaves"]:
            partial.setdefault((row["backend"], row["leaves"]), []).append(row["operator"])
    counts = {b: sum(row["backend"] == b for row in report["operators"]) for b in _backends(report["operators"])}
    for (name, reason), who in reasons.items():
        scope = "all operators" if len(who) == counts[name] else ", ".join(who)
        say(console, f"{name} does not serve {scope}: {reason}")
    for (name, what), who in partial.items():
        say(console, f"{name} leaves to the reference, also where it is forced: of {', '.join(who)} {what}")


def _backends(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["backend"] for row in rows))


def _operator_table(rows: list[dict[str, Any]]) -> Table:
    backends, lines = _backends(rows), []
    for operator in dict.fromkeys(row["operator"] for row in rows):
        serves = {row["backend"]: row["serves"] for row in rows if row["operator"] == operator}
        lines.append([operator, *("yes" if serves.get(name) else "-" for name in backends)])
    return Table(["operator", *backends], lines, words=1 + len(backends))
