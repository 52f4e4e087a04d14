"""The lock of a run folder: one process at a time, also on file systems without locks."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.files import atomic, folder_lock
from fedkern.files.folder_lock import FolderLock
from fedkern.listeners import Listener
from fedkern.settings.stored import load_settings
from python_tests.interrupted import KillAt, play_killed

HOLDER = """
import errno, fcntl, sys, time
from pathlib import Path
from fedkern.files import folder_lock

def flock(file, operation):
    raise OSError(errno.ENOTSUP, "no locks here")

fcntl.flock = flock
folder_lock.BEAT = 0.05
with folder_lock.FolderLock(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def refusing(number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    return flock


LOCKS = {
    "no such call": refusing(errno.ENOSYS),
    "not here": refusing(errno.ENOTSUP),
    "no lock daemon": refusing(errno.ENOLCK),
    "another machine's": lambda file, operation: None,  # locks that the other machine does not see
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"BEAT": 0.05, "WATCH": 0.5, "SETTLE": 0.1}.items():
        monkeypatch.setattr(folder_lock, name, value)


def of_another_machine(path):
    path.write_bytes(b"1\nelsewhere\nanother boot\n0123456789abcdef\n000000000007\n")


@pytest.mark.parametrize("lock", ["the system's", *LOCKS, "no fcntl"])
def test_exclusive_and_released(lock, tmp_path, monkeypatch):
    """Locks may be missing in the file system or the operating system, or stay on one machine."""
    if lock in LOCKS:
        monkeypatch.setattr(fcntl, "flock", LOCKS[lock])
    elif lock == "no fcntl":
        monkeypatch.setattr(folder_lock, "fcntl", None)
    with FolderLock(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()}\n")


def test_a_second_process_neither_waits_for_nor_disturbs_the_first(make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", LOCKS["not here"])
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on .*: wait for it, or"):
            run(make_config(), out=tmp_path, data=make_data())
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.communicate()
    run(make_config(rounds=1), out=tmp_path, data=make_data())  # what a killed process left holds nobody up
    assert (tmp_path / "summary.json").exists()


def test_a_lock_file_that_nobody_changes_is_taken_over(tmp_path):
    of_another_machine(tmp_path / ".lock")
    with FolderLock(tmp_path) as lock:
        lock.check()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_whose_folder_was_taken_over_stops(resumed, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT", 60)  # a beat that has just looked would write over the other's name

    class TakenOver(Listener):
        def on_round(self, record):
            if record["round"] == 2:
                of_another_machine(tmp_path / ".lock")

    if resumed:
        play_killed(make_config(rounds=4), out=tmp_path, data=make_data(), at=KillAt("round-start", round=2))
    config = load_settings(tmp_path) if resumed else make_config(rounds=4)
    with pytest.raises(UserError, match=r"Process 1 on elsewhere has taken over .*: this one stops here"):
        run(config, out=tmp_path, data=make_data(), listener=TakenOver(), resume=resumed)
    assert b"elsewhere" in (tmp_path / ".lock").read_bytes()  # still the other one's
    manifest = (tmp_path / "checkpoints" / "manifest.json").read_text()
    assert '"round": 1' in manifest
    assert '"round": 2' not in manifest


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe"])
def test_a_lock_file_that_is_something_else(kind, tmp_path):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    if kind != "dangling link":
        victim.write_text("mine")
    if "link" in kind:
        (os.link if kind == "hard link" else os.symlink)(victim, folder / ".lock")
    else:
        os.mkfifo(folder / ".lock")
    with pytest.raises(UserError, match=r"\.lock cannot be written \(it is (a link|no regular file)"):
        FolderLock(folder).__enter__()
    assert victim.exists() == (kind != "dangling link")
    assert kind == "dangling link" or victim.read_text() == "mine"


def test_a_lock_that_cannot_be_filled_is_one_sentence(tmp_path, monkeypatch):
    def full(*words):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_lock.os, "write", full)
    with pytest.raises(atomic.Unwritable, match=r"\.lock cannot be written, the disk is full: free some space"):
        FolderLock(tmp_path).__enter__()
