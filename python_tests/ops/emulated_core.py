"""The CUDA kernels compiled for the CPU (see cuda/emulator/cuda_runtime.h), so that tests run them without a GPU."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedkern.files.filesystem import hold_lock
from fedkern.ops._core import backend

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "cuda" / "emulator"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc" / "bindings").glob("cuda*.cpp"))
# cmake/sanitize.sh adds its own.
SANITIZE = os.environ.get("FEDKERN_EMULATED_FLAGS", "").split()
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", *SANITIZE]


@functools.cache
def build() -> ModuleType:
    """Return the emulated ``fedkern._cuda``.

    A build of the same sources is taken from build/.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no g++ to compile the emulated core with")
    own = [EMULATOR, ROOT / "csrc" / "include", ROOT / "csrc" / "cuda", ROOT / "csrc" / "bindings"]
    # torch ships pybind11, which the tests' environment need not have otherwise.
    includes = [Path(torch.__file__).parent / "include", Path(sysconfig.get_paths()["include"])]
    command = [compiler, *FLAGS, *(f"-I{path}" for path in [*own, *includes]), '-DFEDKERN_SOURCE_HASH="emulated"']
    headers = sorted(path for folder in own for path in folder.rglob("*") if path.suffix not in {".cu", ".cpp"})
    common = "".join([*command, *(path.read_text() for path in headers if path.is_file())])
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(name: str, text: str, level: list[str]) -> Path:
        target = folder / f"{name}-{_digest(common + text)}.o"
        if not target.exists():
            fresh = target.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, *level, "-x", "c++", "-c", "-", "-o", fresh], input=text, text=True, check=True)
            fresh.replace(target)
        return target

    # Processes that test side by side would each compile everything. The lock goes with the process that holds it.
    with hold_lock(folder / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        # Bindings are run once per call and slow to optimise.
        compiling = [pool.submit(compile_one, "bindings", _bindings(), ["-O0"])]
        compiling += [pool.submit(compile_one, path.stem, _add_line(path), []) for path in KERNELS]
        objects = [done.result() for done in compiling]
        module = folder / f"_cuda-{_digest(' '.join(path.name for path in objects))}.so"
        if not module.exists():
            fresh = module.with_suffix(f".{os.getpid()}")
            subprocess.run([compiler, "-shared", *SANITIZE, *objects, "-o", fresh], check=True)
            fresh.replace(module)
    spec = importlib.util.spec_from_file_location("_cuda", module)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    backend._show_tensors(core, "_cuda")
    return core


def _add_line(path: Path) -> str:
    return f'#line 1 "{path}"\n{path.read_text()}'


def _bindings() -> str:
    """Return all binding files as one, which takes a sixth of their time: compiling pybind11's headers is slow.

    Private names of files may be equal: each file's namespace becomes one of its own.
    """
    includes, files = [], []
    for path in BINDINGS:
        text = _add_line(path)
        includes += re.findall(r"^#include .*", text, re.MULTILINE)
        text = re.sub(r"^#include .*", "", text, flags=re.MULTILINE)
        name = path.stem
        if name != "cuda":  # has the module itself, which names the others
            text = text.replace("namespace fedkern {", f"namespace fedkern::{name} {{")
            bind = f"bind_{name}"
            text += f"\nnamespace fedkern {{ void {bind}(py::module_& module) {{ {name}::{bind}(module); }} }}"
        files.append(text)
    return "\n".join([*dict.fromkeys(includes), *files])


def _load_blind(load: Callable[[], Any]) -> "Blind":
    return Blind(load())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# What would wait for a GPU.
LOOKS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")


class Blind:
    """Kernel object whose methods may not look at a tensor's values, as on a GPU."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernel, name)
        if not callable(found):
            return found

        def blind(*arguments: Any, **named: Any) -> Any:
            def refuse(*_: Any, **__: Any) -> Any:
                raise AssertionError(f"{type(self._kernel).__name__}.{name} looks at a tensor's values")

            with pytest.MonkeyPatch.context() as patch:
                for look in LOOKS:
                    patch.setattr(torch.Tensor, look, refuse)
                return found(*arguments, **named)

        return blind


@contextlib.contextmanager
def emulate() -> Iterator[None]:
    """Force the CUDA backend, served by the emulated core on CPU tensors."""
    try:
        core = build()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr("fedkern.ops._core.backend.cuda_core", lambda: core)
        for operator, kernels in backend._kernels.items():
            if "cuda" in kernels:
                kernel = kernels["cuda"]
                load = functools.partial(_load_blind, kernel.load)
                patch.setitem(kernels, "cuda", backend.Kernel(load, kernel.dtypes, frozenset({"cpu"})))
            patch.delitem(backend._loaded, (operator, "cuda"), raising=False)
        with backend.use_backend("cuda"):
            yield
    finally:
        patch.undo()
        for operator in backend._kernels:
            backend._loaded.pop((operator, "cuda"), None)
