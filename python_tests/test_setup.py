"""Tests of setup.py and CMake before anything is compiled, and of a release for its Pythons and torches."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from fedkern.files.filesystem import hold_lock
from fedkern.ops._core import devices
from fedkern.process import versions
from fedkern.process.commit import commit
from fedkern.report import doctor_page

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("FEDKERN_CPU", "FEDKERN_CUDA", "FEDKERN_ISA", "FORCE_CUDA", "CXX")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names of setup.py, with no switch set and nothing built."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def read_refusal(call: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        call()
    return str(caught.value.code)


def test_the_core_is_wanted_on_linux_on_x86_and_by_those_who_ask(script: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    assert script["core_wanted"]()
    monkeypatch.setenv("FEDKERN_CPU", "0")
    assert not script["core_wanted"]()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("FEDKERN_CPU")
    assert not script["core_wanted"]()
    assert "left out on darwin and plain PyTorch serves (FEDKERN_CPU=1" in capsys.readouterr().err
    assert not script["core_wanted"]()
    assert capsys.readouterr().err == "", "said once"
    monkeypatch.setenv("FEDKERN_CPU", "1")
    assert script["core_wanted"]()


def test_other_processors_than_x86_have_no_core(script: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not script["core_wanted"]()
    assert "made for Linux on x86-64, so it is left out on aarch64 and plain" in capsys.readouterr().err
    monkeypatch.setenv("FEDKERN_CPU", "1")
    assert script["core_wanted"]()


@pytest.mark.parametrize("name", ["FEDKERN_CPU", "FEDKERN_CUDA"])
def test_unknown_values_are_named(script: Any, monkeypatch: Any, name: str) -> None:
    monkeypatch.setenv(name, "yes")
    assert read_refusal(script["core_wanted"]) == f"fedkern: {name} is 'yes'; it takes auto, 0 or 1"
    monkeypatch.setenv("FEDKERN_ISA", "avx")
    assert (
        read_refusal(lambda: script["switch"]("FEDKERN_ISA", "all"))
        == "fedkern: FEDKERN_ISA is 'avx'; it takes auto or all"
    )


@pytest.mark.parametrize(("gpus", "force", "cuda"), [([], "", "0"), ([], "1", "1"), (["nvidia0"], "", "auto")])
def test_cuda_is_built_for_a_gpu_or_on_request(script, monkeypatch, gpus: list[str], force: str, cuda: str) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: iter(gpus))
    monkeypatch.setenv("FORCE_CUDA", force)
    assert script["switch_cuda"]() == cuda


def test_the_cuda_core_alone_cannot_be_had(script: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("FEDKERN_CPU", "0")
    monkeypatch.setenv("FEDKERN_CUDA", "1")
    assert "set FEDKERN_CPU=1 too" in read_refusal(script["core_wanted"])


def test_missing_tools_are_named(script: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler, cmake, ninja, *_ = script["missing_tools"]()
    assert compiler == "a C++20 compiler (c++ or g++ or clang++)"
    assert (cmake, ninja) == ("cmake (pip install cmake)", "ninja (pip install ninja)")
    monkeypatch.setenv("CXX", "ccache g++-14")
    assert script["missing_tools"]()[0] == "a C++20 compiler (ccache)"


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py build with its output in ``folder``."""
    folder.mkdir(exist_ok=True)
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(folder), "build", "--build-base", str(folder)]
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    with hold_lock(ROOT / "setup.py"):  # tests side by side share the folder of compiled objects
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=300
        )


def test_a_build_without_compiler(tmp_path: Path) -> None:
    """The error names the missing tool and the switch that does without, and with the switch no tool is needed."""
    pytest.importorskip("setuptools", "77")  # older ones do not read this pyproject.toml
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    told = build(tmp_path / "failing", PATH=str(nothing), FEDKERN_CPU="1")
    assert told.returncode
    assert "cannot be built without a C++20 compiler" in told.stderr
    assert "FEDKERN_CPU=0 installs fedkern without the compiled core" in told.stderr
    done = build(tmp_path / "done", PATH=str(nothing), FEDKERN_CPU="0")
    assert done.returncode == 0, done.stderr
    (staged,) = (tmp_path / "done").glob("lib*/fedkern")
    assert (staged / "ops" / "_core" / "backend.py").exists()
    assert not list(staged.glob("*.so"))


def test_a_failing_build_names_the_ways_out(script: Any, monkeypatch: Any, tmp_path: Path) -> None:
    core = script["CMakeBuild"].cmake.__globals__
    monkeypatch.setitem(core, "missing_tools", list)
    monkeypatch.setitem(core, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    pytest.importorskip("pybind11")
    command = script["CMakeBuild"].__new__(script["CMakeBuild"])
    for cuda, hints in (("1", 1), ("0", 0)):
        monkeypatch.setenv("FEDKERN_CUDA", cuda)
        told = read_refusal(lambda: command.cmake(tmp_path / "fedkern"))
        assert told.count("FEDKERN_CUDA=0 leaves out the CUDA core, FEDKERN_CPU=0 installs fedkern without") == hints


ODD = "it's an ünusual, odd folder"


@pytest.mark.exhaustive
def test_a_checkout_and_an_environment_may_lie_anywhere(tmp_path: Path) -> None:
    """Since nvcc cuts -I at commas, a file of every kind is compiled on paths that trip nvcc, CMake or a shell."""
    pybind11 = pytest.importorskip("pybind11")
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("cmake or ninja is not installed")
    checkout, environment = tmp_path / ODD / "fedkern", tmp_path / f"{ODD} too"
    for name in ("csrc", "cmake"):
        shutil.copytree(ROOT / name, checkout / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python, headers = environment / "bin" / "python", environment / "pybind11"
    shutil.copytree(Path(pybind11.__file__).parent, headers)
    command = ["cmake", "-S", checkout / "csrc", "-B", checkout / "build", "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={headers}/share/cmake/pybind11"]
    objects = ["CMakeFiles/_cpu.dir/cpu/isa.cpp.o"]
    if shutil.which("nvcc") and os.environ.get("FEDKERN_CUDA") != "0":
        objects += ["CMakeFiles/cuda_kernels.dir/cuda/device.cu.o", "CMakeFiles/_cuda.dir/bindings/cuda.cpp.o"]
    else:
        objects += ["CMakeFiles/_cpu.dir/Unity/unity_cpu_cxx.cxx.o"]
    for step in (command, ["ninja", "-C", checkout / "build", *objects]):
        one_architecture = {**os.environ, "CUDAARCHS": "80-real"}  # the one architecture that is asked for
        done = subprocess.run(step, capture_output=True, text=True, timeout=300, env=one_architecture)
        assert done.returncode == 0, done.stdout + done.stderr
        if step is command and len(objects) == 3:
            assert re.search(r"with nvcc [\d.]+ for 80-real\n", done.stdout)


def test_where_cmake_cannot_build_a_copy_is_built(script: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """CMake writes paths with a double quote unescaped.

    The core is built elsewhere and copied back.
    """
    pytest.importorskip("pybind11")
    checkout = tmp_path / 'a "quoted" folder'
    for name in ("csrc", "cmake"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "file").write_text(name)
    names = script["CMakeBuild"].cmake.__globals__
    monkeypatch.setitem(names, "missing_tools", list)
    monkeypatch.setitem(names, "ROOT", checkout)
    commands = []

    def run(command: list[str]) -> subprocess.CompletedProcess[list[str]]:
        commands.append(command)
        for word in command:
            if word.startswith("-DFEDKERN_OUTPUT_DIR="):
                built = Path(word.partition("=")[2])
                built.mkdir()
                (built / "_cpu.so").write_text((built.parent / "csrc" / "file").read_text())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    command = script["CMakeBuild"].__new__(script["CMakeBuild"])
    command.cmake(checkout / "fedkern")
    assert len(commands) == 2
    assert '"' not in "".join(map(str, [word for command in commands for word in command]))
    assert (checkout / "fedkern" / "_cpu.so").read_text() == "csrc"


def configure(folder: Path, nvcc: str, cuda: str) -> subprocess.CompletedProcess[str]:
    """Configure the core with a script ``nvcc`` first on PATH."""
    pybind11 = pytest.importorskip("pybind11")
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("cmake or ninja is not installed")
    script = folder / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n{nvcc}\n")
    script.chmod(0o755)
    command = ["cmake", "-S", ROOT / "csrc", "-B", folder / "build", "-G", "Ninja", f"-DFEDKERN_CUDA={cuda}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUDA")}
    path = os.pathsep.join([str(script.parent), os.environ["PATH"]])
    result = subprocess.run(command, env=kept | {"PATH": path}, capture_output=True, text=True, timeout=300)
    result.stderr = " ".join(result.stderr.split())  # CMake breaks lines
    return result


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("echo no libcudart >&2; exit 1", "it does not run (--version: 1) no libcudart"),
        pytest.param('[ "$1" = --version ]', "CMake says: ", marks=pytest.mark.exhaustive),
    ],
)
def test_an_nvcc_that_does_not_serve_leaves_the_cpu_core(nvcc: str, reason: str, tmp_path: Path) -> None:
    told = configure(tmp_path, nvcc, "auto")
    assert told.returncode == 0, told.stderr
    assert "building for the CPU alone" in told.stderr
    assert reason in told.stderr
    assert "_cuda.dir" not in (tmp_path / "build" / "build.ninja").read_text()


@pytest.mark.exhaustive
def test_an_nvcc_that_was_insisted_on_is_an_error(tmp_path: Path) -> None:
    told = configure(tmp_path, "exit 1", "1")
    assert told.returncode
    assert f"FEDKERN_CUDA=1, but {tmp_path / 'bin' / 'nvcc'} cannot build the CUDA core: it does not run" in told.stderr


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [("9.0\n8.6\n9.0\n", "90;86"), ("7.5\n12.0\n", "120"), ("7.5\n99.9\n", "80"), ("No devices were found\n", "80")],
)
def test_the_cuda_core_is_built_for_this_machines_gpus(tmp_path: Path, gpus: str, expected: str) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    for name, said in (("nvidia-smi", gpus), ("nvcc", "sm_75\nsm_80\nsm_86\nsm_90\nsm_120\n")):
        (tmp_path / name).write_text(f"#!/bin/sh\nprintf '{said}'\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "ask.cmake").write_text(
        f'include("{ROOT}/cmake/Cuda.cmake")\nfedkern_architectures(nvcc found)\nmessage("${{found}}")\n'
    )
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    command = ["cmake", "-DFEDKERN_CUDA=0", "-P", tmp_path / "ask.cmake"]
    told = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    assert told.stderr == f"{expected}\n"


@pytest.mark.parametrize("version", ["65.5.0", "76.1", "9"])
def test_an_old_setuptools_is_one_sentence(version, monkeypatch):
    monkeypatch.setattr("setuptools.__version__", version)
    with pytest.raises(SystemExit, match=rf"setuptools {version} is too old, 77 or newer"):
        runpy.run_path(str(Path(__file__).parents[1] / "setup.py"), run_name="old")


def test_the_commit_is_that_of_the_checkout_or_what_was_noted(tmp_path: Path) -> None:
    assert commit(tmp_path / "fedkern") == ""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-C", str(tmp_path)]
    if shutil.which("git") is None:
        pytest.skip("no git")
    (tmp_path / "fedkern").mkdir()
    (tmp_path / "fedkern" / "code.py").write_text("1")
    recorded = tmp_path / "benchmarks" / "results" / "study.json"
    recorded.parent.mkdir(parents=True)
    recorded.write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    asked = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    recorded.write_text("2")  # no code
    commit.cache_clear()
    assert commit(tmp_path / "fedkern") == asked.stdout.strip() != ""
    (tmp_path / "fedkern" / "code.py").write_text("2")
    commit.cache_clear()
    assert commit(tmp_path / "fedkern") == f"{asked.stdout.strip()}-dirty"
    (tmp_path / "fedkern" / "commit.txt").write_text("abc1234\n")
    commit.cache_clear()
    assert commit(tmp_path / "fedkern") == "abc1234"
    commit.cache_clear()


def test_a_build_notes_the_commit_and_records_and_doctor_tell_it(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    known = commit(ROOT / "fedkern")
    script["note_commit"](tmp_path)
    noted = tmp_path / "commit.txt"
    assert (noted.read_text().strip() if noted.exists() else "") == known
    monkeypatch.setattr(versions, "commit", lambda: "abc1234")
    monkeypatch.setattr(doctor_page, "commit", lambda: "abc1234")
    assert versions.versions()["commit"] == "abc1234"
    assert doctor_page.versions()["fedkern"].endswith(" (commit abc1234)")
    monkeypatch.setattr(versions, "commit", lambda: "")
    assert "commit" not in versions.versions()


# -- release -----------------------------------------------------------------------------------------------------------


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CHECKLIST = ROOT / "docs" / "releasing.md"


def pythons() -> list[str]:
    prefix = "Programming Language :: Python :: 3."
    return [name.rpartition(" ")[2] for name in PROJECT["project"]["classifiers"] if name.startswith(prefix)]


def workflow() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    path = ROOT / ".github" / "workflows" / "wheels.yml"
    if not path.exists():
        pytest.skip("workflows are not part of a source distribution")
    return yaml.safe_load(path.read_text())


def test_a_wheel_is_made_for_every_python() -> None:
    builds = PROJECT["tool"]["cibuildwheel"]["build"]
    assert builds == [f"cp{version.replace('.', '')}-manylinux_x86_64" for version in pythons()]
    assert len(builds) >= 4


def test_torch_triton_and_python_have_no_upper_limit() -> None:
    everything = [*PROJECT["project"]["dependencies"], PROJECT["project"]["requires-python"]]
    everything += PROJECT["project"]["optional-dependencies"]["triton"]
    assert not [line for line in everything if "<" in line]
    assert PROJECT["project"]["requires-python"] == f">={pythons()[0]}"


def test_the_workflow_tests_every_wheel_with_the_oldest_and_the_newest_torch() -> None:
    jobs = workflow()["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"] == pythons()
    (oldest,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("torch"))
    assert matrix["torch"] == [f"{oldest.replace('>=', '==')}.*", "torch"]


def test_every_address_of_the_project_is_that_of_its_metadata() -> None:
    project = PROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    notebooks = [*ROOT.glob("examples/*.ipynb")]
    naming = [ROOT / "CITATION.cff", ROOT / "docs" / "cite.md", *notebooks]
    texts = {
        path: path.read_text()
        for path in (*naming, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.yml"))
    }
    for path, text in texts.items():
        addresses = set(re.findall(r"github(?:\.com)?/([\w.-]+/fedkern)\b", text))
        assert addresses == {project} or (path not in naming and not addresses), path
    assert all(f"/{project}/blob/main/examples/{path.name})" in texts[path] for path in notebooks)
    assert f"version: {PROJECT['project']['version']}\n" in texts[ROOT / "CITATION.cff"]


def test_only_a_tag_publishes_and_only_what_was_tested() -> None:
    jobs = workflow()["jobs"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert "refs/tags/v" in jobs["publish"]["if"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]


def test_the_checklist_names_the_toolkit_and_its_driver() -> None:
    script = ROOT / ".ci" / "install-cuda"
    (toolkit,) = re.findall(r"CUDA_TOOLKIT:-(\d+)-\d+\}", script.read_text())
    (full,) = re.findall(r"CUDA_TOOLKIT:-(\d+-\d+)\}", script.read_text())
    text = CHECKLIST.read_text()
    assert f"CUDA {full.replace('-', '.')}" in text
    assert devices.DRIVERS[int(toolkit)] in text


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_is_built_as_the_wheels_are_and_of_the_whole_checkout(name: str) -> None:
    text, environment = (ROOT / name).read_text(), PROJECT["tool"]["cibuildwheel"]["environment"]
    assert re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE) == ["."]
    ignored = [pattern.removeprefix("**/") for pattern in (ROOT / ".dockerignore").read_text().split()]
    for needed in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "csrc/CMakeLists.txt",
        "cmake/Cuda.cmake",
        "fedkern/run.py",
    ):
        assert (ROOT / needed).exists()
        assert not [part for part in Path(needed).parts for pattern in ignored if fnmatch(part, pattern)]
    assert f"FEDKERN_ISA={environment['FEDKERN_ISA']}" in text
    assert set(re.findall(r'CUDAARCHS="(.*?)"', text)) <= {environment["CUDAARCHS"]}
    assert f"torch=={(ROOT / 'README.md').read_text().partition('torch==')[2].split()[0]}" in text


def test_the_script_for_the_container_says_what_it_lacks(tmp_path: Path) -> None:
    """The script fails before it installs anything."""
    done = subprocess.run(
        [shutil.which("bash") or "/bin/bash", str(ROOT / ".ci" / "install-cuda")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "CUDA_RPM_REPOSITORY: set it to" in done.stderr
