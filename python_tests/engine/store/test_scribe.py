"""Files written beside the rounds: in order, nothing after a failure, and read before they are on the disk."""

import json
import threading
import time

import pytest
import torch

from fedkern.engine.store import scribe as module
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.scribe import Scribe
from fedkern.errors import UserError
from fedkern.messages.states import Packed


@pytest.fixture
def scribe():
    made = Scribe()
    yield made
    made.close()


def test_in_order(scribe):
    done = []
    for i in range(20):
        scribe.give(lambda i=i: done.append(i), 1)
    scribe.settle()
    assert done == list(range(20))


def test_after_a_failure_nothing_more_is_done(scribe):
    done, go = [], threading.Event()

    def fails():
        go.wait(10)
        raise UserError("the disk is full.")

    scribe.give(fails, 1)
    scribe.give(lambda: done.append(1), 1)
    go.set()
    for _ in range(2):
        with pytest.raises(UserError, match="full"):
            scribe.settle()
    with pytest.raises(UserError, match="full"):
        scribe.give(lambda: done.append(2), 1)
    scribe.close()
    assert done == []


def test_who_gives_too_much_waits(scribe, monkeypatch):
    monkeypatch.setattr(module, "PENDING_BYTES", 100)
    done = []

    def slow(i):
        time.sleep(0.1)
        done.append(i)

    scribe.give(lambda: slow(0), 60)
    scribe.give(lambda: slow(1), 40)  # fits beside the first
    assert done == []
    scribe.give(lambda: slow(2), 60)
    assert done[:1] == [0]
    scribe.settle()
    assert done == [0, 1, 2]


def test_checkpoints_are_those_that_are_written_at_once(tmp_path, scribe, commit):
    folders = []
    for name, beside in (("once", None), ("beside", scribe)):
        checkpoints = Checkpoints(tmp_path / name, beside)
        checkpoints.open()
        for number, clients in ((1, (0, 1)), (2, (0,)), (3, (1,))):
            commit(checkpoints, number, clients)
        checkpoints.write_client(0, 4, {"x": torch.zeros(3)})  # never committed
        checkpoints.settle()
        folders.append({path.name: path.read_bytes() for path in checkpoints.folder.iterdir()})
    assert folders[0] == folders[1]


def test_a_state_that_waits_can_be_read(tmp_path, scribe, commit):
    checkpoints, go = Checkpoints(tmp_path, scribe), threading.Event()
    checkpoints.open()
    scribe.give(lambda: go.wait(10), 0)
    state = {"x": torch.arange(3.0)}
    checkpoints.write_client(0, 1, state)
    state["x"].zero_()  # the client goes on
    found = checkpoints.client_state(0)
    assert found["x"].tolist() == [0, 1, 2]
    found["x"].zero_()  # who reads it may change it
    assert checkpoints.client_state(0)["x"].tolist() == [0, 1, 2]
    assert not list(checkpoints.folder.glob("client-*"))
    go.set()
    commit(checkpoints, 1)
    checkpoints.settle()
    again = Checkpoints(tmp_path)
    again.open()
    assert again.client_state(0)["x"].tolist() == [0, 1, 2]


def test_what_could_not_be_written_is_not_committed(tmp_path, scribe, monkeypatch, commit):
    checkpoints = Checkpoints(tmp_path, scribe)
    checkpoints.open()
    commit(checkpoints, 1, (0,))
    checkpoints.settle()

    def full(self, path):
        raise UserError(f"{path} cannot be written, the disk is full.")

    monkeypatch.setattr("fedkern.messages.states.Packed.save", full)
    commit(checkpoints, 2)
    with pytest.raises(UserError, match="disk is full"):
        checkpoints.settle()
    monkeypatch.undo()
    with pytest.raises(UserError, match="disk is full"):
        commit(checkpoints, 3, (0,))
    again = Checkpoints(tmp_path)
    assert again.open()["round"] == 1
    assert again.client_state(0)["x"].tolist() == [1, 1, 1]


def test_the_entry_comes_after_what_it_speaks_of(tmp_path, scribe):
    checkpoints, seen = Checkpoints(tmp_path, scribe), []
    checkpoints.open()
    manifest = checkpoints.folder / "manifest.json"
    checkpoints.commit(
        round=1, plan=1, server={}, info={}, before=lambda: seen.append(json.loads(manifest.read_text())["entries"])
    )
    checkpoints.settle()
    assert seen == [[]]
    assert len(json.loads(manifest.read_text())["entries"]) == 1


def test_never_more_than_one_commit_behind(tmp_path, scribe, monkeypatch, commit):
    """A disk that is slower than the rounds holds them up, instead of falling ever more behind."""
    save, written = Packed.save, []

    def slow(self, path):
        time.sleep(0.02)
        save(self, path)
        written.append(path.name)

    monkeypatch.setattr(Packed, "save", slow)
    checkpoints = Checkpoints(tmp_path, scribe)
    checkpoints.open()
    for number in range(1, 6):
        commit(checkpoints, number, (0, 1))
        behind = number - 1
        assert behind == 0 or f"server-{behind:06d}.safetensors" in written
    checkpoints.settle()
    assert len(written) == 15


def test_settling_up_to_a_job(scribe):
    go, done = threading.Event(), []
    first = scribe.give(lambda: done.append(1), 1)
    scribe.give(lambda: go.wait(10), 1)
    scribe.settle(first)
    assert done == [1]
    go.set()
    scribe.settle()


def test_a_state_that_a_round_writes_twice(tmp_path, scribe, commit):
    """Once for each of its exchanges, under one name: the first file's end takes nothing from the second one."""
    checkpoints, go = Checkpoints(tmp_path, scribe), threading.Event()
    checkpoints.open()
    scribe.give(lambda: go.wait(10), 0)
    for value in (1.0, 2.0):
        checkpoints.write_client(0, 1, {"x": torch.full((3,), value)})
    go.set()
    commit(checkpoints, 1)
    checkpoints.settle()
    again = Checkpoints(tmp_path)
    again.open()
    assert again.client_state(0)["x"].tolist() == [2, 2, 2]
