"""Tests of signals where Python loses an exception, and of a process's cores, memory, forks and GPU."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch

from fedkern import UserError
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.process import device_use, extras, interrupts, machine
from fedkern.process.forking import cut_connections, has_threads, read_positions, reopen_files
from fedkern.process.interrupts import Terminated, check, in_order
from fedkern.run import main
from python_tests.interrupted import lose, outcome

BOTH = pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])


@pytest.mark.sampled(1)
@BOTH
def test_a_signal_that_a_callback_swallows_is_raised_again(number, kind, capsys):
    def go():
        with in_order():
            lose(number)
            check()

    with pytest.raises(kind):
        go()
    assert "Exception ignored" not in capsys.readouterr().err
    check()  # nothing is left of it


@BOTH
def test_a_second_signal_does_not_end_the_clean_up(number, kind):
    done = []

    def go():
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        finally:
            for sent in (signal.SIGINT, signal.SIGTERM, number):
                os.kill(os.getpid(), sent)
                time.sleep(0.001)
            done.append("cleaned")

    with pytest.raises(kind), in_order():
        go()
    assert done == ["cleaned"]


def test_a_second_signal_gets_through_where_the_first_was_lost():
    def go():
        lose(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise AssertionError("not reached")

    with pytest.raises(Terminated), in_order():
        go()


def test_handlers_are_given_back_and_others_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)

    def own(number, frame):
        raise AssertionError("the caller's")

    given = signal.signal(signal.SIGINT, own)
    try:
        with in_order():
            assert signal.getsignal(signal.SIGINT) is own
            assert isinstance(signal.getsignal(signal.SIGTERM), interrupts.Handler)
            with in_order():  # the outer one serves
                pass
            assert isinstance(signal.getsignal(signal.SIGTERM), interrupts.Handler)
    finally:
        signal.signal(signal.SIGINT, given)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("undrawn", "warm_processes")
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), pytest.param(signal.SIGINT, 130, "inter", marks=pytest.mark.exhaustive)],
)
def test_a_burst_ends_a_command_once_and_resume_gives_the_uninterrupted_run(number, code, word, tmp_path):
    words = ["fedavg", "--data", "digits", "--train-samples", "300", "--rounds", "25", "--clients", "2", "--threads",
             "1", "--workers", "1", "--grad-cam", "0", "--model", "mlp", "--local-steps", "1", "--eval-every",
             "25"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkern.run", *words, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    manifest = tmp_path / "run" / "checkpoints" / "manifest.json"
    end = time.monotonic() + 60
    while not (manifest.exists() and b"round" in manifest.read_bytes()) and time.monotonic() < end:
        time.sleep(0.01)
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.004)
    out, err = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in out + err
    assert (out + err).count(f"{word}") == 1
    assert "--resume" in out + err
    assert 1 <= Checkpoints(tmp_path / "run").open()["round"] < 25
    assert main(["--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert main([*words, "--quiet", "--out", str(tmp_path / "whole")]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# -- machine -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(monkeypatch):
    """Return the text files that a machine of sixteen cores has, by path."""
    texts = {}

    def read(path):
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    monkeypatch.setattr(machine.Path, "read_text", read)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(16)))
    return texts


def test_cores_and_memory_are_those_of_the_control_group(texts):
    texts |= {"/sys/fs/cgroup/cpu.max": "150000 100000", "/sys/fs/cgroup/memory.max": "1000", "/proc/meminfo": "x 1 kB"}
    texts["/sys/fs/cgroup/memory.current"] = "400"
    assert machine.usable_cores() == 1
    assert machine.free_memory() == 600
    texts["/sys/fs/cgroup/cpu.max"], texts["/sys/fs/cgroup/memory.max"] = "max 100000", "max"
    assert machine.usable_cores() == 16
    texts["/proc/meminfo"] = "MemTotal: 9 kB\nMemAvailable: 5 kB\n"
    assert machine.free_memory() == 5 << 10


NESTED = "0::/system.slice/run.service/task"
MOUNTED = "31 23 0:28 {root} {place} rw - {kind} cgroup rw,{more}\n"
OWN_GROUP = "/sys/fs/cgroup/system.slice/run.service/task/"
PARENT = "/sys/fs/cgroup/system.slice/"
DOCKER = MOUNTED.format(root="/docker/abc", place="/sys/fs/cgroup", kind="cgroup2", more="x")


def version_1(controller, group, **files):
    return {f"/sys/fs/cgroup/{controller}/{group}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(("files", "cores", "memory"), [
    ({"/proc/self/cgroup": NESTED, OWN_GROUP + "cpu.max": "100000 100000", OWN_GROUP + "memory.max": "900",
      OWN_GROUP + "memory.current": "100"}, 1, 800),
    ({"/proc/self/cgroup": NESTED, PARENT + "cpu.max": "300000 100000", OWN_GROUP + "cpu.max": "max 100000",
      PARENT + "memory.max": "500", PARENT + "memory.current": "100", OWN_GROUP + "memory.max": "max"}, 3, 400),
    ({"/proc/self/cgroup": NESTED, OWN_GROUP + "memory.max": "900", OWN_GROUP + "memory.current": "700",
      OWN_GROUP + "memory.stat": "anon 1\ninactive_file 600\n", PARENT + "cpu.max": "x"}, 16, 800),
    ({"/proc/self/cgroup": "0::/docker/abc/child", "/proc/self/mountinfo": DOCKER,
      "/sys/fs/cgroup/child/cpu.max": "200000 100000", "/sys/fs/cgroup/memory.max": "70",
      "/sys/fs/cgroup/memory.current": "30"}, 2, 40),
    ({"/proc/self/cgroup": "4:memory:/slurm/job\n2:cpu,cpuacct:/slurm/job/step\n0::/",
      **version_1("cpu", "slurm/job", **{"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"}),
      **version_1("cpu", "slurm/job/step", **{"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}),
      **version_1("memory", "slurm/job", **{"memory.limit_in_bytes": "90", "memory.usage_in_bytes": "40"})}, 4, 50),
    ({"/proc/self/cgroup": "3:cpu:/a", "/proc/self/mountinfo": MOUNTED.format(
        root="/", place="/cgroups/cpu,cpuacct", kind="cgroup", more="cpu,cpuacct"),
      "/cgroups/cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "/cgroups/cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
     2, 1 << 20),
    ({}, 16, 1 << 20),
])  # fmt: skip
def test_limits_are_those_of_the_process_group_and_its_parents(files, cores, memory, texts):
    texts |= {"/proc/meminfo": "MemAvailable: 1024 kB\n", **files}
    assert (machine.usable_cores(), machine.free_memory()) == (cores, memory)


# -- allocator ---------------------------------------------------------------------------------------------------------


FAULTS = """
import json, resource
import torch
from fedkern.process.allocator import keep_freed_memory

def faults():
    torch.set_num_threads(1)
    found = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(1 << 20) for _ in range(8)]  # of 4 MB
        del blocks
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[4:])

before = faults()
kept = keep_freed_memory()
print(json.dumps([before, kept, faults()]))
"""


def count_faults(**environment: str) -> tuple[int, bool, int]:
    found = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    before, kept, after = json.loads(found.stdout)
    return before, kept, after


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
def test_freed_memory_stays():
    # A small block that happens to lie above the freed ones keeps them in the process without our help.
    for _ in range(20):
        before, kept, after = count_faults()
        if before > 8 * 256:
            break
    assert kept
    assert before > 8 * 256  # pages, of 4 kB or more, mapped anew: otherwise this test shows nothing
    assert after < before / 20


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")]
)
def test_the_user_has_the_last_word(name, value):
    _, kept, _ = count_faults(**{name: value})
    assert not kept


# -- device use --------------------------------------------------------------------------------------------------------


def test_what_a_round_takes_of_a_gpu(monkeypatch):
    """A made-up GPU suffices for the engine's side."""
    assert device_use.figures(torch.device("cpu")) == {}
    gpu, reset = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 45)
    device_use.begin(gpu)
    assert reset == [gpu]
    assert device_use.figures(gpu) == {"peak_bytes": 123, "utilisation": 45}

    def untold(device):
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.cuda, "utilization", untold)
    assert device_use.figures(gpu) == {"peak_bytes": 123, "utilisation": None}


# -- extras ------------------------------------------------------------------------------------------------------------


ROOT = Path(__file__).resolve().parents[2]
OFFERED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
BARE = re.compile(r"[\w-]+")


@pytest.mark.parametrize("extra", extras.PACKAGES)
def test_an_extra_is_installed_from_the_checkout_or_by_its_packages(extra, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert extras.install(extra) == f"pip install '.[{extra}]'"
    (tmp_path / "pyproject.toml").touch()  # of a project of the user's
    for folder in (ROOT / "docs", tmp_path):
        monkeypatch.chdir(folder)
        words = extras.install(extra).removeprefix("pip install ").replace("'", "").split()
        assert [BARE.match(word)[0] for word in words] == [BARE.match(entry)[0] for entry in OFFERED[extra]]


def test_a_package_of_no_extra_is_installed_by_its_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"^to_pandas needs it: pip install pandas\.$"):
        extras.import_extra("to_pandas needs it", "pandas", "fedkern.nothing")


def test_no_sentence_installs_fedkern_from_an_index():
    """No index has fedkern: whoever registers the name would control what such a command installs."""
    folders = ("fedkern", "python_tests", "examples", "docs", "benchmarks")
    places = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".md", ".toml")]
    for path in [*places, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        if path.name != Path(__file__).name:
            assert not re.search(r"pip install \S*fedkern\[", path.read_text("utf-8")), path


# -- forking -----------------------------------------------------------------------------------------------------------


def test_a_fork_has_positions_of_its_own(tmp_path):
    (tmp_path / "values").write_bytes(bytes(range(100)))
    read = os.open(tmp_path / "values", os.O_RDONLY)
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    with tempfile.TemporaryFile(dir=tmp_path) as gone:  # has no name any more
        gone.write(b"abc")
        gone.seek(1)
        os.lseek(read, 40, os.SEEK_SET)
        positions = read_positions()
        assert (positions[read], positions[gone.fileno()]) == (40, 1)
        assert log not in positions
        assert not {0, 1, 2} & {*positions}
        if not (child := os.fork()):
            reopen_files(positions)
            fits = os.read(read, 3) == bytes([40, 41, 42]) and os.read(gone.fileno(), 1) == b"b"
            os.write(log, b"child")
            os._exit(0 if fits else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert os.read(read, 1) == bytes([40])
        assert os.lseek(gone.fileno(), 0, os.SEEK_CUR) == 1
    os.write(log, b" parent")
    assert (tmp_path / "log").read_bytes() == b"child parent"  # which both write has one position
    os.close(read)
    os.close(log)


def test_a_fork_ends_its_share_in_connections():
    near, peer = socket.socketpair()
    kept, far = socket.socketpair()
    if not (child := os.fork()):
        cut_connections(kept.fileno())
        kept.send(near.recv(1) or b"nothing")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert far.recv(9) == b"nothing"
    peer.send(b"a")
    assert near.recv(1) == b"a"  # the parent's is as before
    for end in (near, peer, kept, far):
        end.close()


def test_threads_of_fedkern_do_not_count():
    end = threading.Event()
    for name, counts in (("fedkern-lock", False), ("reader", True)):
        thread = threading.Thread(target=end.wait, name=name)
        thread.start()
        found = has_threads()
        end.set()
        thread.join()
        end.clear()
        assert found == counts
        assert not has_threads()
