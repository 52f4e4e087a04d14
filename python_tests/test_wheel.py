"""Tests of a wheel as strangers install it: from an index, into a new environment, with no compiler on PATH."""

import email
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fedkern.files.filesystem import hold_lock

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / ".ci" / "smoke.py"

pytestmark = pytest.mark.exhaustive


def environment(**variables: str) -> dict[str, str]:
    """Return an environment without the caller's settings of pip, setup.py and the installed package."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "FEDKERN_", "CXX", "CMAKE"))}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


def setup(folder: Path, *commands: object, **variables: str) -> None:
    """Run setup.py in the checkout.

    All of its output but compiled objects lies in ``folder``.
    """
    pytest.importorskip("setuptools", "77")  # older ones do not read this pyproject.toml
    with hold_lock(ROOT / "setup.py"):  # tests side by side share the folder of compiled objects
        run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, *commands, cwd=ROOT, **variables)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of this checkout with the CPU core alone.

    Objects of an earlier build are used.
    """
    missing = [name for name in ("cmake", "ninja") if not shutil.which(name)]
    missing += [] if any(map(shutil.which, ("c++", "g++", "clang++"))) else ["a C++ compiler"]
    if missing:
        pytest.skip(f"no wheel can be built without {' and '.join(missing)}")
    pytest.importorskip("pybind11", "3")
    folder = tmp_path_factory.mktemp("wheel")
    steps = ("build", "--build-base", folder / "build", "bdist_wheel", "--bdist-dir", folder / "staged")
    setup(folder, *steps, "--dist-dir", folder / "dist", FEDKERN_CPU="1", FEDKERN_CUDA="0")
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("sources")
    setup(folder, "sdist", "--formats=gztar", "--dist-dir", folder)
    (found,) = folder.glob("*.tar.gz")
    return found


def index(folder: Path, *files: Path) -> str:
    """Make an index with these files of fedkern and return its address."""
    page = folder / "simple" / "fedkern"
    page.mkdir(parents=True)
    lines = []
    for file in files:
        shutil.copy2(file, page)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        lines.append(f'<a href="{file.name}#sha256={digest}">{file.name}</a>')
    (page / "index.html").write_text("<!DOCTYPE html><html><body>" + "\n".join(lines) + "</body></html>")
    return page.parent.as_uri()


def bare(folder: Path, *start: str) -> Path:
    """Make an environment without fedkern and return its folder of programs.

    All other installed packages are linked: nothing is fetched.

    Args:
        folder: where the environment will lie.
        start: lines of Python that run whenever its interpreter starts.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    packages = folder / "others"
    packages.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if path.suffix != ".pth" and not path.name.lower().startswith(("fedkern", "__editable__", "__pycache__")):
            (packages / path.name).symlink_to(path)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join([str(packages), *start]) + "\n")
    return folder / "bin"


def install(programs: Path, address: str, *options: str) -> None:
    python = programs / "python"
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--index-url", address, *options, "fedkern")
    run(*command, cwd=programs.parent, PATH=str(programs))


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.endswith(f"-{tag}-{tag}-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        needs = email.message_from_bytes(archive.read(metadata))
    assert [name for name in names if name.startswith("fedkern/_c") and name.endswith(".so")]
    assert {
        f"fedkern/comparison/{name}" for name in ("example.toml", "papers/mcmahan2017.py", "papers/mcmahan2017.toml")
    } <= {*names}
    assert not [
        name for name in names if name.split("/")[0] in ("csrc", "cmake", "build", "python_tests", "benchmarks")
    ]
    required = dict(
        line.partition(">=")[::2] for line in needs.get_all("Requires-Dist") or () if "extra ==" not in line
    )
    assert required["torch"] == "2.11", "with no upper limit"
    assert needs["Requires-Python"] == ">=3.11"


def test_a_build_again_compiles_nothing(wheel: Path, tmp_path: Path) -> None:
    def objects() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (ROOT / "build").glob("cmake-*/CMakeFiles/**/*.o")}

    before = objects()
    assert before
    setup(tmp_path, "build_ext", "--build-lib", tmp_path, FEDKERN_CPU="1", FEDKERN_CUDA="0")
    assert list(tmp_path.glob("fedkern/_cpu*.so"))
    assert objects() == before


def test_the_wheel_needs_no_compiler(wheel: Path, tmp_path: Path) -> None:
    programs = bare(tmp_path / "environment")
    install(programs, index(tmp_path, wheel))
    path = str(programs)
    assert not [name for name in ("c++", "g++", "clang++", "cmake", "ninja") if shutil.which(name, path=path)]
    tried = run(programs / "python", SMOKE, "cpu", cwd=tmp_path, PATH=path)
    assert "this machine can run " in " ".join(tried.stdout.split())
    run(programs / "fedkern", "list", cwd=tmp_path, PATH=path)


def test_elsewhere_the_source_distribution_installs_without_a_core(sources: Path, tmp_path: Path) -> None:
    """A platform other than Linux on x86-64 has no core.

    The same interpreter is made to report such a platform.
    """
    with tarfile.open(sources) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/CMakeLists.txt", "csrc/bindings/cpu.cpp", "cmake/Cuda.cmake"} <= held
    programs = bare(tmp_path / "environment", "import platform; platform.machine = lambda: 'riscv64'")
    install(programs, index(tmp_path, sources), "--no-build-isolation")
    (installed,) = (tmp_path / "environment").glob("lib/python*/site-packages/fedkern-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in installed.read_text()
    tried = run(programs / "python", SMOKE, "reference", cwd=tmp_path, PATH=str(programs))
    assert "cpu" not in tried.stdout.splitlines()[-1].split()
    assert "fedkern's compiled kernels are made for Linux on x86-64, and this is Linux on riscv64" in tried.stderr
