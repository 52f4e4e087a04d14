"""Tests of nvcc's CUDA kernels: their GPUs and registers, and that nothing spilled."""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedkern.ops._core import loading

# What a kernel may use so that two blocks of 256 threads, or three of 128, fit a multiprocessor's 65,536.
REGISTERS = 128
REGISTERS_128_THREADS = 168
THREADS_128 = ("sorted_mean_kernel", "weighted_kernel", "distances_kernel")

# Kernels that need memory of their own: part of the name, and per architecture bytes of stack at most.
STACKS = {
    "step_kernel": {"sm_80": 48, "sm_90": 40, "sm_100": 584},  # of several vectors; sums of ten in registers
    "distances_kernel": {"sm_80": 232, "sm_90": 232, "sm_100": 96},  # likewise, of ten vectors
    "distances_to_kernel": {"sm_100": 8},
    "median_start": {"sm_80": 8, "sm_100": 8},  # one block
    "weighted_kernelILi64": {"sm_80": 8, "sm_100": 136},
    "sorted_mean_kernelIdmLi32": {"sm_90": 32, "sm_100": 24},
    "shared_rows_kernelINS0_13OneDivergenceEfv": {"sm_100": 344},  # of rows whose dtypes differ
    "shared_rows_kernelINS0_14TwoDivergencesEfv": {"sm_100": 600},
    # 16 numbers of each input in registers, and three blocks of such rows, or two, to a multiprocessor
    "rows_kernelINS0_13OneDivergenceEf": {"sm_80": 48, "sm_90": 48, "sm_100": 40},
    "rows_kernelINS0_14TwoDivergencesEf": {"sm_80": 24, "sm_90": 24, "sm_100": 8},
    "held_kernelILi8": {"sm_80": 128, "sm_90": 128, "sm_100": 112},  # a thread holds eight teachers' rows
    "student_kernel": {"sm_80": 8, "sm_90": 32, "sm_100": 232},  # two blocks of nine warps
    "11tile_kernel": {"sm_100": 40},  # two blocks of fourteen warps
    "ensemble_kernelINS0_14ProbabilityRowELi256": {"sm_80": 56, "sm_90": 56},  # two blocks of eight warps, mixed dtypes
    "forward_kernelIdLi1": {"sm_100": 8},  # fuse's
    "backward_kernel": {"sm_80": 8, "sm_90": 40, "sm_100": 96},  # fuse's, one element a thread
    "grad_maps": {"sm_80": 8, "sm_90": 24},  # of backgrounds with several users
}


def cuobjdump() -> str:
    """Return the program on PATH, beside nvcc, or in the triton wheel."""
    folders = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    triton = importlib.util.find_spec("triton")
    for place in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(place) / "backends" / "nvidia" / "bin")
    beside = (str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists())
    found = shutil.which("cuobjdump") or next(beside, None)
    if found is None:
        pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")
    return found


@functools.cache
def dump(*options: str) -> str:
    try:
        core = loading.load_core("_cuda").__file__
    except loading.Unavailable as error:
        pytest.skip(str(error))
    assert core is not None
    return subprocess.run([cuobjdump(), *options, core], capture_output=True, text=True, check=True).stdout


def resources() -> list[tuple[str, str, dict[str, int]]]:
    """Return (architecture, kernel, its resources), for every kernel."""
    found = []
    architecture = kernel = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif kernel and "REG:" in line:
            found.append((architecture, kernel, {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}))
            kernel = ""
    return found


def test_every_gpu_that_the_core_was_built_for_has_all_kernels() -> None:
    elf = set(re.findall(r"\.(sm_\d+)\.cubin", dump("--list-elf")))
    ptx = set(re.findall(r"\.(sm_\d+)\.ptx", dump("--list-ptx")))
    newest = max(elf, key=lambda name: int(name.removeprefix("sm_")))
    assert newest in ptx, "PTX of the newest architecture lets later GPUs translate it"
    core = loading.load_core("_cuda")
    assert {f"sm_{number}" for number in core.architectures()} == elf
    assert core.versions()[0] >= 12000
    per_architecture: dict[str, set[str]] = {}
    for architecture, kernel, _ in resources():
        per_architecture.setdefault(architecture, set()).add(re.sub(r"_GLOBAL__N__\w{8}_", "", kernel))
    counts = {name: len(kernels) for name, kernels in per_architecture.items()}
    assert set(counts) == elf
    assert len(set(counts.values())) == 1, counts


def test_no_kernel_spills() -> None:
    """Spilled registers, and arrays whose index is not known at compile time, are stack or local memory."""
    bad = []
    for architecture, kernel, used in resources():
        sizes = next((sizes for name, sizes in STACKS.items() if name in kernel), {})
        # On one that the table does not know: as on the worst that it does.
        known = architecture in {"sm_80", "sm_90", "sm_100"}
        allowed = sizes.get(architecture, 0) if known else max(sizes.values(), default=0)
        if used["STACK"] > allowed or used.get("LOCAL", 0):
            bad.append(f"{kernel} on {architecture}: {used['STACK']} bytes of stack, {used.get('LOCAL', 0)} local")
    assert resources()
    assert not bad, "\n".join(bad)


def test_registers_leave_room_for_enough_threads() -> None:
    bad = []
    for architecture, kernel, used in resources():
        allowed = REGISTERS_128_THREADS if any(name in kernel for name in THREADS_128) else REGISTERS
        if used["REG"] > allowed:
            bad.append(f"{kernel} on {architecture}: {used['REG']} registers, {allowed} at most")
    assert not bad, "\n".join(bad)
