"""Builds fedkern._cpu and fedkern._cuda by driving CMake and Ninja; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake build makes every extension; setuptools only says where the results go."""

    def run(self) -> None:
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        self.cmake(target / "fedkern")

    def cmake(self, destination: Path) -> None:
        import pybind11

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        destination.mkdir(parents=True, exist_ok=True)
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if not cmake or not ninja:
            sys.exit("fedkern: cmake and ninja are needed to build the compiled core: pip install cmake ninja")
        configure = [
            cmake,
            # The cache of an earlier isolated build names a ninja that no longer exists.
            "--fresh",
            *("-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFEDKERN_CUDA={os.environ.get('FEDKERN_CUDA', 'auto')}",
            f"-DFEDKERN_OUTPUT_DIR={destination}",
        ]
        for command in (configure, [cmake, "--build", str(build)]):
            if subprocess.run(command).returncode:
                sys.exit(f"fedkern: the compiled core could not be built; this command failed: {' '.join(command)}")

    def get_outputs(self) -> list[str]:
        folder = ROOT if self.inplace else Path(self.build_lib)
        return [str(path) for path in (folder / "fedkern").glob("_c*.so")]


class FreshBuild(build):
    """Starts from an empty staging folder: setuptools would put files of an earlier build into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


# The extension names the core to setuptools, so that the wheel is tagged for this platform and Python.
setup(ext_modules=[Extension("fedkern._cpu", sources=[])], cmdclass={"build": FreshBuild, "build_ext": CMakeBuild})
