"""The CUDA kernels compiled for the CPU (see cuda/emulator/cuda_runtime.h), so that tests run them without a GPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedkern.ops import backend

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "cuda" / "emulator"
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted((ROOT / "csrc" / "bindings").glob("cuda*.cpp"))]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]


@functools.cache
def build() -> ModuleType:
    """Returns the emulated ``fedkern._cuda``, compiled once per version of its sources into build/."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no g++ to compile the emulated core with")
    includes = [EMULATOR, ROOT / "csrc" / "include", ROOT / "csrc" / "cuda", ROOT / "csrc" / "bindings"]
    # torch ships pybind11, which the tests' environment need not have otherwise.
    includes += [Path(torch.__file__).parent / "include", Path(sysconfig.get_paths()["include"])]
    parts = [*FLAGS, *map(str, includes), backend.source_hash(ROOT / "csrc")]
    parts += [path.read_text() for path in sorted(EMULATOR.iterdir())]
    folder = ROOT / "build" / "emulated" / hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    module = folder / "_cuda.so"
    if not module.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, *FLAGS, *(f"-I{path}" for path in includes), '-DFEDKERN_SOURCE_HASH="emulated"']
        objects = [folder / f"{path.stem}.{os.getpid()}.o" for path in SOURCES]

        def compile_one(source: Path, target: Path) -> None:
            # Bindings are run once per call and slow to optimise.
            level = ["-O0"] if source.suffix == ".cpp" else []
            subprocess.run([*command, *level, "-x", "c++", "-c", source, "-o", target], check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, SOURCES, objects))
        linked = folder / f"linked.{os.getpid()}"
        subprocess.run([compiler, "-shared", *objects, "-o", linked], check=True)
        for path in objects:
            path.unlink()
        linked.replace(module)
    spec = importlib.util.spec_from_file_location("_cuda", module)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Forces the CUDA backend, served by the emulated core on CPU tensors."""
    try:
        core = build()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr("fedkern.ops.cuda.core.load", lambda: core)
        for operator, kernels in backend._kernels.items():
            if "cuda" in kernels:
                kernel = kernels["cuda"]
                patch.setitem(kernels, "cuda", backend.Kernel(kernel.load, kernel.dtypes, frozenset({"cpu"})))
            patch.delitem(backend._loaded, (operator, "cuda"), raising=False)
        with backend.use_backend("cuda"):
            yield
    finally:
        patch.undo()
        for operator in backend._kernels:
            backend._loaded.pop((operator, "cuda"), None)
