"""Tests of the build and the installation: the core's dependencies, its ISA level, life without it, sdist and wheel."""

import os
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import torch

import fedkern
from fedkern import ops
from fedkern.ops._core import backend, loading

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code on the package that this process imported, not on a checkout that is the working directory."""
    found = os.pathsep.join(filter(None, (str(Path(fedkern.__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": found, **environment},
    )  # fmt: skip


def core(name: str) -> Path:
    try:
        return Path(loading.load_core(name).__file__ or "")
    except loading.Unavailable as error:
        pytest.skip(str(error))


def test_core_is_built_from_these_sources() -> None:
    module = backend.cpu_core()
    assert module.source_hash() == loading.source_hash(ROOT / "csrc", "_cpu")


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_core_links_no_torch_and_no_openmp_runtime(name: str) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run(["readelf", "-d", core(name)], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split("]")[0].split(".so")[0] for line in dynamic.splitlines() if "NEEDED" in line}
    allowed = {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "libdl", "librt", "ld-linux-x86-64"}
    assert needed <= allowed, f"{name} links {sorted(needed - allowed)}"


def test_a_core_of_other_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package lies in a checkout whose csrc/ has changed since.

    Without csrc/ beside the package there is nothing to compare.
    """
    backend.cpu_core()
    (tmp_path / "fedkern").mkdir()
    monkeypatch.setattr("fedkern.__file__", str(tmp_path / "fedkern" / "__init__.py"))
    assert loading.stale_cores() == []
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert loading.stale_cores() == []
    for changed, stale in (("cuda/device.cu", False), ("include/fedkern/blend_cuda.h", False), ("cpu/isa.cpp", True)):
        with (tmp_path / "csrc" / changed).open("a") as file:
            file.write("// more\n")
        assert ("fedkern._cpu" in loading.stale_cores()) == stale, f"{changed} was changed"


def test_a_core_that_lacks_what_python_calls_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_isa_applied", False)
    monkeypatch.setattr(backend, "load_core", lambda name: types.SimpleNamespace(take_tensors=lambda *_: None))
    with pytest.raises(loading.Unavailable, match=r"older sources than these Python files: run pip install \."):
        backend.cpu_core()


@pytest.mark.exhaustive
def test_importing_hashes_no_sources() -> None:
    core("_cpu")
    if not list(Path(fedkern.__file__).parent.glob("_cpu.*")):
        pytest.skip("this checkout shadows an installed fedkern, whose core is compared with it on purpose")
    result = run_python(
        "from fedkern.ops._core import loading; loading.source_hash = None\n"
        "import fedkern.run, torch; from fedkern import ops; ops.entropy(torch.zeros(2, 3))"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.exhaustive
def test_the_cuda_core_is_loaded_for_cuda_tensors_alone() -> None:
    core("_cuda")
    result = run_python(
        "import sys, torch; from fedkern import ops; ops.entropy(torch.zeros(2, 3))\n"
        "sys.exit('fedkern._cuda' in sys.modules)"
    )
    assert result.returncode == 0, result.stderr


def test_cuda_core_is_built_from_these_sources() -> None:
    if os.environ.get("FEDKERN_CUDA") != "1":
        pytest.skip("FEDKERN_CUDA is not 1")
    module = loading.load_core("_cuda")
    assert module.source_hash() == loading.source_hash(ROOT / "csrc", "_cuda")


@pytest.mark.exhaustive
@pytest.mark.parametrize("level", backend.ISAS)
def test_isa_is_forced_or_refused(level: str) -> None:
    available = backend.cpu_core().available_isas()
    result = run_python(
        "import torch; from fedkern import ops; from fedkern.ops._core import backend\n"
        "x = torch.arange(12.0).reshape(3, 4)\n"
        "print(ops.kl_div(x, x.flip(1)).item(), backend.cpu_core().isa())",
        FEDKERN_CPU_ISA=level,
    )
    if level in available:
        value, isa = result.stdout.split()
        assert isa == level
        x = torch.arange(12.0).reshape(3, 4)
        assert float(value) == pytest.approx(ops.kl_div(x, x.flip(1)).item(), rel=1e-5)
    else:
        assert result.returncode != 0
        assert level in result.stderr.splitlines()[-1]


def test_unknown_isa_is_named_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    core("_cpu")
    monkeypatch.setenv("FEDKERN_CPU_ISA", "sse9")
    monkeypatch.setattr(backend, "_isa_applied", False)
    with pytest.raises(ValueError, match=r"FEDKERN_CPU_ISA.*portable, avx2, avx512"):
        backend.cpu_core()


def test_everything_works_without_core_and_triton() -> None:
    blocked = (
        "import importlib.abc, sys\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in {'fedkern._cpu', 'fedkern._cuda'} or name.split('.')[0] in {'triton', 'pynvml'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    result = run_python(
        blocked + "import torch, fedkern; from fedkern import ops; from fedkern.ops._core import backend\n"
        "x = torch.randn(5, 7, requires_grad=True); ops.kl_div(x, torch.randn(5, 7)).backward()\n"
        "assert x.grad.abs().sum() > 0\n"
        "ops.blend(torch.randn(4, 3), torch.randn(4, 3), 0.5, index=torch.tensor([1, 0, 3, 2]))\n"
        "assert torch.equal(ops.weighted_mean([torch.ones(9)] * 3, [1, 2, 3]), torch.ones(9))\n"
        "assert all(row.serves == (row.backend == 'reference') for row in backend.status())\n"
        "assert all(row.reason for row in backend.status())\n"
        "import fedkern.run; sys.exit(fedkern.run.main(['doctor']) or 0)"
    )
    assert result.returncode == 0, result.stderr
    assert "fedkern._cpu" in result.stdout  # and why it does not serve


STEPS = """
import sys, torch, fedkern.engine.executors.worker, fedkern.methods, fedkern.ops, fedkern.run
from torch import nn
from fedkern.models import blocks, build, cost, fused, optimisers
from fedkern.process.torch_modes import modes, set_modes
assert fedkern.run.main(['list']) == 0
for name in ("cnn", "unet", "resnet8"):
    network = build(name, classes=3, channels=3, image_size=32, seed=0)
cost.measure_cost(network, torch.zeros(2, 3, 32, 32))
blocks.cut_network(network, 2).interfaces((3, 32, 32))
x = torch.ones(3)
x.grad = x.clone()
optimisers.SGD([x], 0.1, 0.9).step()
optimisers.Adam([x], 0.1).step()
fused.make_adaptor("cnn1x1", (4, 3, 3), 2)
parts = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)) for _ in range(2)]
assert fedkern.ops.FusedBlocks(parts).eval()(torch.ones(2, 3, 9, 9)).shape[1] == 16
set_modes(modes())
late = {"torch._dynamo", "sympy", "triton", "transformers", "fedkern.ops._core.triton"} & set(sys.modules)
set_modes({**modes(), "deterministic": True, "warn_only": True})
assert modes()["warn_only"]
sys.exit(", ".join(late) or 0)
"""


@pytest.mark.exhaustive
def test_what_takes_seconds_to_import_is_imported_by_those_who_need_it() -> None:
    """The compiler of torch would cost each run and worker a second, and Triton reads a switch when it is imported."""
    result = run_python(STEPS)
    assert result.returncode == 0, result.stderr


def test_forced_backend_that_is_missing_is_an_error() -> None:
    with backend.use_backend("cuda"), pytest.raises(RuntimeError, match=r"cuda.*forced"):
        ops.entropy(torch.zeros(2, 3))


def source_distribution(folder: Path) -> Path:
    """Make a source distribution of the checkout and return the folder it unpacks to."""
    pytest.importorskip("setuptools", "77")  # older ones do not read this pyproject.toml
    command = ["setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--formats=tar", "--dist-dir", folder]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=300)
    (archive,) = folder.glob("fedkern-*.tar")
    with tarfile.open(archive) as file:
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    return archive.with_suffix("")


@pytest.mark.exhaustive
def test_a_source_distribution_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    wanted = ["csrc", "cmake", "fedkern", "setup.py", "pyproject.toml", "LICENSE", "README.md"]
    listing = subprocess.run(["git", "ls-files", "-z", *wanted], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"git does not list the checkout: {listing.stderr.strip()}")
    tracked = {name for name in listing.stdout.split("\0") if name}
    assert {"csrc/CMakeLists.txt", "cmake/Cuda.cmake"} <= tracked
    folder = source_distribution(tmp_path)
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not {name for name in tracked if (ROOT / name).exists()} - held
    assert not [name for name in held if name.endswith((".so", ".pyc", ".png"))]


@pytest.mark.slow
def test_wheel_twice_from_one_source_distribution(tmp_path: Path) -> None:
    """The contents of an sdist are built in isolation twice.

    The second wheel holds the core and nothing stale.

    The folder's name has characters that trip nvcc, CMake and shells.
    """
    tmp_path = tmp_path / "it's an ünusual, odd folder"
    tmp_path.mkdir()
    checkout = source_distribution(tmp_path)
    names = []
    for attempt in ("first", "second"):
        if attempt == "second":
            (checkout / "fedkern" / "errors.py").rename(checkout / "fedkern" / "renamed.py")
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path / attempt, checkout],
            check=True,
            timeout=600,
        )
        (wheel,) = (tmp_path / attempt).glob("*.whl")
        names.append(set(zipfile.ZipFile(wheel).namelist()))
    assert any(name.startswith("fedkern/_cpu") for name in names[1])
    assert "fedkern/py.typed" in names[1]
    assert "fedkern/errors.py" in names[0]
    assert "fedkern/errors.py" not in names[1]
    assert not any(name.startswith(("build", "csrc", "python_tests", "benchmarks")) for name in names[1])
