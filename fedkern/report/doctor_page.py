"""Command ``doctor``: versions, processor, GPU, and the operators' backends with reasons for unusable ones."""

import contextlib
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable

from fedkern.errors import MESSAGE
from fedkern.process import machine
from fedkern.process.commit import commit
from fedkern.report.names import literal_text, print_line
from fedkern.report.tables import human_bytes
from fedkern.text_table import Table

CPUINFO = Path("/proc/cpuinfo")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PACKAGES = (
    "fedkern", "torch", "triton", "numpy", "nvidia-ml-py", "safetensors", "transformers", "flwr", "opacus",
    "dp-accounting", "nibabel", "tensorboard", "wandb", "mlflow",
)  # fmt: skip


def versions() -> dict[str, str]:
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
    """Return the first processor's entries of ``/proc/cpuinfo``, empty without such a file."""
    entries: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").partition("\n\n")[0].splitlines():
            name, colon, value = line.partition(":")
            if colon:
                entries[name.strip()] = value.strip()
    return entries


def processor() -> dict[str, object]:
    """Return the CPU's ``name`` and ``cores``, and the ISA levels of the compiled core.

    The levels are ``available``, ``active`` and ``forced``. An unusable core has a ``problem`` instead.
    """
    from fedkern.ops._core import backend, loading

    name = cpuinfo(CPUINFO).get("model name") or platform.processor() or platform.machine()
    entries: dict[str, object] = {"name": name, "cores": os.cpu_count()}
    entries["forced"] = os.environ.get("FEDKERN_CPU_ISA") or None
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
    from fedkern.ops._core import devices, loading

    try:
        core = loading.load_core("_cuda")
        kinds = ", ".join(f"sm_{architecture}" for architecture in core.architectures())
        built = f"built with CUDA {devices.version(core.versions()[0])} for {kinds} and newer"
        return f"{built}; needs NVIDIA's driver {devices.driver_for(core)}"
    except (loading.Unavailable, AttributeError) as error:  # AttributeError: an outdated core
        hint = "; nvcc is here, but no GPU was visible when fedkern was built (FEDKERN_CUDA=1 pip install . builds it)"
        return f"none: {error}{hint if 'was not built' in str(error) and shutil.which('nvcc') else ''}"


def threads() -> dict[str, object]:
    import torch

    variables = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    return {"torch": torch.get_num_threads(), **variables, "usable cores": machine.usable_cores()}


def gpus() -> tuple[list[dict[str, object]], str]:
    """Return the GPUs that NVML lists, and why there are none. Memory is in bytes, utilisation in per cent."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return [], "nvidia-ml-py is not installed"
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver: {error}"
    try:
        driver, devices = pynvml.nvmlSystemGetDriverVersion(), []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            try:
                utilisation: int | None = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            except pynvml.NVMLError:  # not reported for MIG slices and some virtual GPUs
                utilisation = None
            devices.append({
                "name": pynvml.nvmlDeviceGetName(handle), "memory": int(memory.total), "used": int(memory.used),
                "utilisation": utilisation, "driver": driver,
            })  # fmt: skip
        return devices, "" if devices else "the driver lists no GPU"
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()


def collect_report() -> dict[str, Any]:
    import torch

    import fedkern.ops  # registers the operators
    from fedkern.ops._core import backend, loading

    del fedkern
    devices, reason = gpus()
    forced, problem = None, ""
    try:
        forced = backend.forced_backend()
    except ValueError as error:
        problem = str(error)
    return {
        "versions": versions(), "cpu": processor(), "stale": loading.stale_cores(), "threads": threads(),
        "cuda": {
            "torch": torch.version.cuda, "hip": torch.version.hip, "available": torch.cuda.is_available(),
            "gpus": devices, "reason": reason, "core": cuda_core(),
        },
        "forced_backend": forced, "problem": problem, "operators": [row._asdict() for row in backend.status()],
    }  # fmt: skip


def print_report(console: Console, report: dict[str, Any] | None = None) -> None:
    report = collect_report() if report is None else report
    facts = TerminalTable(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")

    def add(name: str, value: object) -> None:
        facts.add_row(name, literal_text(value, limit=MESSAGE))

    # Installed packages, and whether the compiled core fits this machine and the sources beside it.
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
    # What limits speed: threads, GPUs, and the CUDA or ROCm that torch was built for.
    thread = report["threads"]
    limits = [f"{name}={thread[name] or 'unset'}" for name in THREAD_VARIABLES]
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
    # One line for all operators that a backend leaves to the reference for the same reason.
    operators = {row["operator"] for row in report["operators"]}
    notes: dict[tuple[str, bool, str], list[str]] = {}
    for row in report["operators"]:
        if text := row["leaves"] if row["serves"] else row["reason"]:
            notes.setdefault((row["backend"], row["serves"], text), []).append(row["operator"])
    for (name, serves, text), operator_names in sorted(notes.items(), key=lambda note: note[0][1]):
        scope = "all operators" if len(operator_names) == len(operators) else ", ".join(operator_names)
        of = f"leaves to the reference, also where it is forced: of {scope} {text}"
        print_line(console, f"{name} {of if serves else f'does not serve {scope}: {text}'}")


def _operator_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    backends = [*dict.fromkeys(row["backend"] for row in rows)]
    serves = {(row["operator"], row["backend"]) for row in rows if row["serves"]}
    operators = dict.fromkeys(row["operator"] for row in rows)
    lines = [[operator, *("yes" if (operator, name) in serves else "-" for name in backends)] for operator in operators]
    return Table(["operator", *backends], lines, words=1 + len(backends))
