"""Builds fedkern._cpu and fedkern._cuda by driving CMake and Ninja; everything else is in pyproject.toml."""

import functools
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent

# Characters of a path that CMake takes for its own.
UNREADABLE = '";\\$\n'

SETUPTOOLS = 77  # the first that reads the licence in pyproject.toml; as in its build-system table
if int(setuptools.__version__.partition(".")[0]) < SETUPTOOLS:
    sys.exit(f"fedkern: setuptools {setuptools.__version__} is too old, {SETUPTOOLS} or newer is needed: "
             "pip install -U setuptools, or install without --no-build-isolation")  # fmt: skip

WITHOUT = "FEDKERN_CPU=0 installs fedkern without the compiled core, plain PyTorch then serves"


def switch(name: str, *choices: str) -> str:
    """Return the environment variable ``name``, one of auto (where it is unset) and ``choices``, by default 0 and 1."""
    value, choices = os.environ.get(name) or "auto", ("auto", *(choices or ("0", "1")))
    if value not in choices:
        sys.exit(f"fedkern: {name} is {value!r}; it takes {', '.join(choices[:-1])} or {choices[-1]}")
    return value


def switch_cuda() -> str:
    """Return whether to build the CUDA core: 0, 1 (must succeed), or auto (where nvcc works) if a GPU is visible.

    ``FORCE_CUDA=1`` means 1, as in torchvision.
    """
    value = switch("FEDKERN_CUDA")
    if value == "auto" and os.environ.get("FORCE_CUDA") == "1":
        return "1"
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # the second under Windows
    return "0" if value == "auto" and not has_gpu else value


def core_wanted() -> bool:
    """Says whether the compiled core is to be built; without it no compiler is needed."""
    cpu, cuda = switch("FEDKERN_CPU"), switch("FEDKERN_CUDA")
    made_for = sys.platform == "linux" and platform.machine() == "x86_64"
    if cpu == "1" or (cpu == "auto" and made_for):
        return True
    if cuda == "1":
        sys.exit("fedkern: FEDKERN_CUDA=1 needs the CPU core beside the CUDA core; set FEDKERN_CPU=1 too")
    if cpu == "auto":
        say_left_out(platform.machine() if sys.platform == "linux" else sys.platform)
    return False


@functools.cache
def say_left_out(kind: str) -> None:
    """Warns, once, that the core is not made for this ``kind`` of machine."""
    print(
        f"fedkern: warning: the compiled core is made for Linux on x86-64, so it is left out on {kind} and plain "
        "PyTorch serves (FEDKERN_CPU=1 tries to build it)",
        file=sys.stderr,
    )


def missing_tools() -> list[str]:
    """Names what a build of the core needs and this environment lacks."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    missing = [] if any(map(shutil.which, compilers)) else [f"a C++20 compiler ({' or '.join(compilers)})"]
    missing += [f"{name} (pip install {name})" for name in ("cmake", "ninja") if not shutil.which(name)]
    try:
        import pybind11  # noqa: F401
    except ImportError:
        missing.append("pybind11 (pip install pybind11)")
    return missing


class CMakeBuild(build_ext):
    """One CMake build makes every extension; setuptools only says where the results go."""

    def run(self) -> None:
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        if core_wanted():
            self.cmake(target / "fedkern")
            return
        # A core that an earlier build left in place would go on serving.
        for path in map(Path, self.get_outputs()):
            print(f"fedkern: {path} of an earlier build is removed", file=sys.stderr)
            path.unlink()

    def cmake(self, destination: Path) -> None:
        missing = missing_tools()
        if missing:
            sys.exit(f"fedkern: the compiled core cannot be built without {', '.join(missing)}; {WITHOUT}")
        import pybind11

        cmake, ninja = str(shutil.which("cmake")), str(shutil.which("ninja"))
        destination.mkdir(parents=True, exist_ok=True)
        if not set(UNREADABLE) & set(f"{ROOT}{destination}"):
            self.build(cmake, ninja, pybind11.get_cmake_dir(), ROOT, destination)
            return
        # CMake itself does not quote such a path in what it writes: the sources are built where none stands.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "fedkern"
            for name in ("csrc", "cmake"):
                shutil.copytree(ROOT / name, copy / name)
            self.build(cmake, ninja, pybind11.get_cmake_dir(), copy, copy / "built")
            for core in (copy / "built").glob("_c*.so"):
                shutil.copy2(core, destination)

    @staticmethod
    def build(cmake: str, ninja: str, pybind11: str, root: Path, destination: Path) -> None:
        build = root / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # The cache of an earlier isolated build names a ninja that no longer exists, CMake's notes name a compiler that
        # may have changed; `cmake --fresh` would remove the objects with them.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for notes in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(notes)
        cuda = switch_cuda()
        configure = [
            cmake,
            *("-S", str(root / "csrc"), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DFEDKERN_CUDA={cuda}",
            f"-DFEDKERN_ISA={switch('FEDKERN_ISA', 'all')}",
            f"-DFEDKERN_OUTPUT_DIR={destination}",
        ]
        # Ninja's own choice, two jobs more than cores, takes an eighth longer: compilers live on caches.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or cores or 1
        for command in (configure, [cmake, "--build", str(build), "--parallel", str(jobs)]):
            if subprocess.run(command).returncode:
                hint = WITHOUT if cuda == "0" else f"FEDKERN_CUDA=0 leaves out the CUDA core, {WITHOUT}"
                sys.exit(
                    f"fedkern: the compiled core could not be built; this command failed: {' '.join(command)}; {hint}"
                )

    def get_outputs(self) -> list[str]:
        folder = ROOT if self.inplace else Path(self.build_lib)
        return [str(path) for path in (folder / "fedkern").glob("_c*.so")]


class Package(Distribution):
    """Has extensions only where the core is built: without them a wheel fits every platform and Python."""

    def has_ext_modules(self) -> bool:
        return core_wanted()


class FreshBuild(build):
    """Starts from an empty staging folder: setuptools would put files of an earlier build into the wheel."""

    # Without extensions too: build_ext removes a core that an earlier build has left in place.
    sub_commands = [(name, None if name == "build_ext" else when) for name, when in build.sub_commands]  # noqa: RUF012

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def note_commit(package: Path) -> None:
    """Write the checkout's commit into a copy of the package, as a source distribution has its own."""
    # By its path: the package itself need not be importable here.
    if found := runpy.run_path(str(ROOT / "fedkern" / "process" / "commit.py"))["commit"]():
        (package / "commit.txt").write_text(f"{found}\n")


class Copies(build_py):
    """Copies the package's files, and notes the commit; an editable installation asks the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            note_commit(Path(self.build_lib) / "fedkern")


class Sources(sdist):
    """A source distribution that knows its commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        note_commit(Path(base_dir) / "fedkern")


# The extension names the core to setuptools, so that the wheel is tagged for this platform and Python.
setup(
    distclass=Package,
    ext_modules=[Extension("fedkern._cpu", sources=[])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild, "build_py": Copies, "sdist": Sources},
)
