"""Tests of a run without what Windows lacks: a child process loses it, then plays, resumes, reports and compares."""

import ctypes
import importlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MISSING = {
    os: "fork forkpty register_at_fork kill killpg getuid geteuid getgid sched_getaffinity memfd_create pidfd_open "
    "setsid setpgid environb pread pwrite sysconf statvfs chown mkfifo O_NOFOLLOW O_NONBLOCK O_ACCMODE O_CLOEXEC",
    signal: "SIGKILL SIGHUP SIGUSR1 SIGALRM SIGPIPE pthread_sigmask setitimer",
    socket: "AF_UNIX send_fds recv_fds",
    select: "poll epoll",
    mmap: " ".join(name for name in dir(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))),
}
SMALL = ("--workers", "2", "--rounds", "1", "--train-samples", "60", "--clients", "2", "--width", "4", "--threads", "1")


def test_a_run_needs_nothing_that_windows_lacks(tmp_path: Path) -> None:
    given = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    environment = os.environ | given
    done = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "one" / "summary.json").read_text())["rounds"] == 2
    assert (tmp_path / "one" / "report.html").exists()
    assert "fedprox" in (tmp_path / "both" / "comparison.csv").read_text()
    assert "--workers 2 changes nothing here, as workers need Linux." in done.stderr
    assert "Ranks of torchrun share memory as only Linux has it: start the run without torchrun." in done.stdout


def take_away() -> None:
    """Remove modules and functions, and have the rest follow the rules of Windows."""
    sys.modules.update(dict.fromkeys(("fcntl", "resource", "termios", "pwd", "grp", "fedkern._cpu", "fedkern._cuda")))
    for module, names in MISSING.items():
        for name in {*names.split()} & vars(module).keys():
            delattr(module, name)
    sys.platform = "win32"
    os.unlink, os.remove = refuse_open(os.unlink), refuse_open(os.remove)
    os.replace, os.rename = refuse_open(os.replace), refuse_open(os.rename)
    library, flush, open_file = ctypes.CDLL, os.fsync, os.open

    def load_library(name: str | None, *rest: int, **options: int) -> ctypes.CDLL:
        assert name is not None, "a library without a name"
        return library(name, *rest, **options)

    def flush_for_writing(descriptor: int) -> None:
        os.write(descriptor, b"")  # OSError unless open for writing
        flush(descriptor)

    def open_no_folder(path: str, *rest: int, **options: int) -> int:
        assert not os.path.isdir(path), f"{path} is a folder"  # noqa: PTH112
        return open_file(path, *rest, **options)

    ctypes.CDLL, os.fsync, os.open = load_library, flush_for_writing, open_no_folder  # type: ignore[assignment, misc]


def refuse_open(change: Callable[..., None]) -> Callable[..., None]:
    """Return a function that raises PermissionError for files that this process has open or mapped."""

    def change_closed(*paths: str, **options: int) -> None:
        held = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
        held |= {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        if taken := held & {os.path.realpath(path) for path in paths}:
            raise PermissionError(13, "open in this process", *taken)
        change(*paths, **options)

    return change_closed


if __name__ == "__main__":
    # Python's own modules choose by platform when they are imported: before anything is taken away.
    for name in ("logging", "multiprocessing.connection", "random", "tempfile", "matplotlib.pyplot", "rich.live",
                 "torch._dynamo", "torch.distributed"):  # fmt: skip
        importlib.import_module(name)
    take_away()
    from fedkern.errors import UserError
    from fedkern.run import main

    for command in (
        ["fedavg", *SMALL, "--out", "one"],
        ["extend", "one", "--rounds", "2"],
        ["report", "one"],
        ["compare", "fedavg", "fedprox", "--seeds", "1", *SMALL, "--out", "both"],
        ["doctor"],
    ):
        assert main(command) == 0, command
    from fedkern.engine.transport.torchrun_group import LaunchedRank, TorchrunGroup

    try:
        TorchrunGroup(LaunchedRank(0, 2, 0, 2, 0, 0, "job")).meet([])
    except UserError as error:
        print(error)
