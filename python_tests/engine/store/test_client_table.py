"""The table of many clients, and the lock of a run folder, also on file systems without locks."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fedkern.engine.run import run
from fedkern.engine.store import client_table
from fedkern.engine.store.client_table import ClientTable, Row, read_rows
from fedkern.errors import UserError
from fedkern.files import atomic, folder_lock
from fedkern.files.folder_lock import FolderLock
from fedkern.listeners import Listener
from fedkern.settings.config import load_settings
from python_tests.interrupted import KillAt, play_killed


def row(client, plan):
    return Row(f"client-{client:05d}-{plan:06d}.safetensors", 1000 * client + plan, (plan, plan, 0, 0))


def test_rows_come_back(tmp_path):
    table, known, places = ClientTable(tmp_path), {}, []
    rng = np.random.default_rng(0)
    for plan in range(1, 60):
        changed = {int(k): row(int(k), plan) for k in rng.choice(400, 20, replace=False)}
        changed[500] = Row(None, None, (plan, 0, 0, 0))
        known |= changed
        places.append((table.add(plan, changed), dict(known)))
    assert table.rows == known
    for place, rows in places[-3:]:
        assert read_rows(tmp_path, place) == rows
    again = ClientTable(tmp_path)
    again.open(places[-2][0])
    assert again.rows == places[-2][1]
    place = again.add(60, {3: Row()})  # over what was added after that checkpoint
    assert read_rows(tmp_path, place) == {**places[-2][1], 3: Row()}


def test_a_commit_writes_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(client_table, "SLACK", 0)
    table, total, changes, files = ClientTable(tmp_path), 0, 0, set()
    before = None
    for plan in range(1, 301):
        changed = {(7 * plan + i) % 1000: row((7 * plan + i) % 1000, plan) for i in range(7)}
        changes += len(client_table._line(changed))
        place = table.add(plan, changed)
        unmoved = before is not None and before["file"] == place["file"]
        total += place["bytes"] - (before["bytes"] if unmoved else 0)
        files.add(place["file"])
        before = place
    assert 2 < len(files) < 20  # begun anew now and then
    assert total < 4 * changes
    assert place["bytes"] < 3 * len(client_table._line(table.rows))


def test_line_ends_of_windows_are_named(tmp_path):
    table = ClientTable(tmp_path)
    for plan in (1, 2):
        place = table.add(plan, {1: row(1, plan)})
    path = tmp_path / place["file"]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(ValueError, match=r"not what the run wrote, as its line ends became CRLF: mend the file by"):
        read_rows(tmp_path, place)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, place: path.unlink(),
        lambda path, place: path.write_bytes(path.read_bytes()[:-1]),
        lambda path, place: path.write_bytes(path.read_bytes().replace(b"1", b"2")),
        lambda path, place: place.update(file="../elsewhere.jsonl"),
        lambda path, place: place.update(file=3),
        lambda path, place: place.update(bytes=10**18),
        lambda path, place: place.update(bytes=-1),
        lambda path, place: place.pop("sum"),
    ],
)
def test_damage_is_a_value_error(damage, tmp_path):
    place = ClientTable(tmp_path).add(1, {1: row(1, 1)})
    damage(tmp_path / place["file"], place)
    with pytest.raises(ValueError, match="is missing or damaged"):
        read_rows(tmp_path, place)
    with pytest.raises(ValueError, match="is missing or damaged"):
        ClientTable(tmp_path).open(place)


@pytest.mark.parametrize(
    "content",
    [
        [1], {"1": 2}, {"x": [None, None, []]}, {"1": ["../../etc/passwd", 3, []]}, {"1": [None, None, [1, 2]]},
        {"1": ["client-00001-000001.safetensors", "3", []]}, {"1": [None, None, ["a", 0, 0, 0]]},
    ],
)  # fmt: skip
def test_rows_of_somebody_else_are_looked_at(content, tmp_path):
    import zlib

    line = (json.dumps(content) + "\n").encode()
    (tmp_path / "clients-000001.jsonl").write_bytes(line)
    place = {"file": "clients-000001.jsonl", "bytes": len(line), "sum": zlib.crc32(line)}
    with pytest.raises(ValueError, match="is damaged"):
        read_rows(tmp_path, place)


def test_a_table_that_cannot_be_lengthened_is_one_sentence(tmp_path):
    table = ClientTable(tmp_path)
    (tmp_path / table.add(1, {1: row(1, 1)})["file"]).unlink()
    with pytest.raises(UserError, match=r"clients-000001\.jsonl cannot be written"):
        table.add(2, {1: row(1, 2)})


# -- folder lock -------------------------------------------------------------------------------------------------------


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
