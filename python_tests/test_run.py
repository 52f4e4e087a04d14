"""Tests of the end of a command's process: exit handlers run, and modules are not taken apart."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedkern import run

SEEN = """
import atexit, os, sys
class Module:
    def __del__(self, write=os.write):
        write(2, b"taken apart\\n")
sys.left_by_a_test = Module()
atexit.register(lambda: print("at exit"))
"""
"""A ``sitecustomize`` that tells whether functions of atexit are called and whether modules are taken apart."""

DUE = """
import atexit, ctypes, os, sys, threading, time, types, weakref
from concurrent.futures import ThreadPoolExecutor
from fedkern import run
from fedkern.process import standard_streams

class Module:
    def __del__(self, write=os.write):
        write(2, b"taken apart")

def main():
    global module, pool
    standard_streams.tolerate_lost_output()
    module = Module()
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: CUDA))
    pool = ThreadPoolExecutor(1)
    pool.submit(lambda: (time.sleep(0.1), print("executor")))
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    atexit.register(print, "at exit")
    weakref.finalize(module, print, "finalize")
    ctypes.CDLL(None).printf(b"C library\\n")
    sys.__stdout__.write("first stream\\n")
    return CODE

run.main = main
"""
"""A command of a test, with everything that a process has to do when it ends."""
LATE = """
import atexit, sys, types
from fedkern import run
from fedkern.process import standard_streams

def main():
    standard_streams.tolerate_lost_output()
    sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: False))
    atexit.register(lambda: sys.CLOSED.write("late"))
    return 4

run.main = main
sys.exit(run.command())
"""
"""A command that prints at its end."""

PLUGIN = """
import fedkern

@fedkern.register_metric("own")
def own(logits, labels):
    "A metric of a test."
    return 0.0
"""


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process that buffers its output into a pipe."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}, **variables}


def execute(*words: str, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Return a Python process that has ended."""
    return subprocess.run(
        [sys.executable, *words], input=text, env=environment(**variables), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def due(code: int, end: str, cuda: bool = False) -> subprocess.CompletedProcess[str]:
    return execute("-c", DUE.replace("CODE", str(code)).replace("CUDA", str(cuda)) + end)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("code", [run.OK, 1, run.USAGE, 130, run.BROKEN_PIPE, 143])
def test_what_is_due_happens_and_the_exit_code_stays(code):
    done = due(code, "sys.exit(run.command())")
    assert done.returncode == code
    assert done.stderr == ""
    assert sorted(done.stdout.splitlines()) == [
        "C library", "at exit", "executor", "finalize", "first stream", "thread",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end", "cuda"),
    [
        ("sys.exit(run.command())", True),
        ("def own():\n    return run.command()\nsys.exit(own())", False),
        ("exec('code = run.command()')\nsys.exit(code)", False),
    ],
)
def test_with_cuda_or_called_by_other_code_the_interpreter_ends_the_process(end, cuda):
    done = due(3, end, cuda)
    assert done.returncode == 3
    assert done.stderr == "taken apart"
    assert "thread" in done.stdout.splitlines()


def test_ctrl_c_ends_the_wait_for_threads():
    end = "import signal\nthreading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
    end += "threading._shutdown = lambda: time.sleep(60)\nsys.exit(run.command())"
    done = due(run.OK, end)
    assert (done.returncode, done.stderr) == (run.OK, "")
    assert "at exit" in done.stdout.splitlines()


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_leaves_at_the_end_changes_no_exit_code(closed):
    words = [sys.executable, "-c", LATE.replace("CLOSED", closed)]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    getattr(process, closed).close()
    setattr(process, closed, None)
    told = process.communicate(timeout=60)
    assert (process.returncode, any(told)) == (4, False)


@pytest.fixture
def site(tmp_path) -> str:
    """Return a folder for PYTHONPATH with :data:`SEEN`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SEEN)
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.pathsep.join(paths)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("words", "code"), [
    (("-m", "fedkern.run", "list"), run.OK), (("-m", "fedkern.run", "no-such-command"), run.USAGE),
    ((str(Path(run.__file__)), "list"), run.OK),
])  # fmt: skip
def test_a_command_with_torch_ends_its_process(words, code, site):
    done = execute(*words, PYTHONPATH=site, FEDKERN_CACHE_DIR=os.devnull)  # no flags are kept
    assert done.returncode == code
    assert done.stdout.endswith("at exit\n")
    assert "taken apart" not in done.stderr


def test_the_console_script_says_that_torch_is_loading_and_ends_its_process(site, tmp_path):
    """A terminal shows a line at once.

    The line is gone before the command's own output.
    """
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        module, function = tomllib.load(file)["project"]["scripts"]["fedkern"].split(":")
    script = tmp_path / "fedkern"  # as pip writes it
    script.write_text(f"import sys\nfrom {module} import {function}\nif __name__ == '__main__':\n"
                      f"    sys.exit({function}())\n")  # fmt: skip
    terminal, side = os.openpty()
    done = subprocess.run(
        [sys.executable, str(script), "list"], env=environment(PYTHONPATH=site, FEDKERN_CACHE_DIR=os.devnull),
        stdout=subprocess.PIPE, stderr=side, text=True, timeout=120, check=True,
    )  # fmt: skip
    os.close(side)
    told = os.read(terminal, 1000).decode()
    os.close(terminal)
    assert done.stdout.endswith("at exit\n")
    assert re.fullmatch(r"loading torch \.\.\.\r +\r", told)


def test_a_command_without_torch_ends_as_any_other_process(site):
    done = execute("-m", "fedkern.run", "--version", PYTHONPATH=site)
    assert (done.returncode, done.stderr) == (run.OK, "taken apart\n")


@pytest.mark.exhaustive
def test_a_profiler_writes_its_profile(site, tmp_path):
    done = execute("-m", "cProfile", "-o", str(tmp_path / "profile"), "-m", "fedkern.run", "list", PYTHONPATH=site)
    assert done.stderr.endswith("taken apart\n")
    assert (tmp_path / "profile").stat().st_size


@pytest.mark.exhaustive
def test_an_interactive_interpreter_goes_on(site):
    text = "print('going on', file=sys.stderr)\n"
    done = execute("-i", "-m", "fedkern.run", "list", text=text, PYTHONPATH=site)
    assert "going on" in done.stderr
    assert done.stderr.endswith("taken apart\n")


@pytest.mark.exhaustive
def test_with_a_plugin_the_interpreter_ends_the_process(site, tmp_path):
    plugin = tmp_path / "own.py"
    plugin.write_text(PLUGIN)
    done = execute("-m", "fedkern.run", "list", "--plugin", str(plugin), PYTHONPATH=site)
    assert (done.returncode, done.stderr) == (run.OK, "taken apart\n")
