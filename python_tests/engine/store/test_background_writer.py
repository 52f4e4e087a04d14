"""Files written in the background: in order, nothing after a failure, and readable before they are on disk."""

import json
import threading
import time

import pytest
import torch

from fedkern.engine.store import background_writer as module
from fedkern.engine.store.background_writer import BackgroundWriter
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.messages.states import Packed


@pytest.fixture
def writer():
    made = BackgroundWriter()
    yield made
    made.close()


def test_in_order(writer):
    done = []
    for i in range(20):
        writer.give(lambda i=i: done.append(i), 1)
    writer.settle()
    assert done == list(range(20))


def test_after_a_failure_nothing_more_is_done(writer):
    done, go = [], threading.Event()

    def fails():
        go.wait(10)
        raise UserError("the disk is full.")

    writer.give(fails, 1)
    writer.give(lambda: done.append(1), 1)
    go.set()
    for _ in range(2):
        with pytest.raises(UserError, match="full"):
            writer.settle()
    with pytest.raises(UserError, match="full"):
        writer.give(lambda: done.append(2), 1)
    writer.close()
    assert done == []


def test_who_gives_too_much_waits(writer, monkeypatch):
    monkeypatch.setattr(module, "PENDING_BYTES", 100)
    done = []

    def slow(i):
        time.sleep(0.1)
        done.append(i)

    writer.give(lambda: slow(0), 60)
    writer.give(lambda: slow(1), 40)  # fits beside the first
    assert done == []
    writer.give(lambda: slow(2), 60)
    assert done[:1] == [0]
    writer.settle()
    assert done == [0, 1, 2]


def test_checkpoints_are_those_that_are_written_at_once(tmp_path, writer, commit):
    folders = []
    for name, beside in (("once", None), ("beside", writer)):
        checkpoints = Checkpoints(tmp_path / name, beside)
        checkpoints.open()
        for number, clients in ((1, (0, 1)), (2, (0,)), (3, (1,))):
            commit(checkpoints, number, clients)
        checkpoints.write_client(0, 4, {"x": torch.zeros(3)})  # never committed
        checkpoints.settle()
        folders.append({path.name: path.read_bytes() for path in checkpoints.folder.iterdir()})
    assert folders[0] == folders[1]


def test_a_state_that_waits_can_be_read(tmp_path, writer, commit):
    checkpoints, go = Checkpoints(tmp_path, writer), threading.Event()
    checkpoints.open()
    writer.give(lambda: go.wait(10), 0)
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


def test_what_could_not_be_written_is_not_committed(tmp_path, writer, monkeypatch, commit):
    checkpoints = Checkpoints(tmp_path, writer)
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


def test_the_entry_comes_after_what_it_speaks_of(tmp_path, writer):
    checkpoints, seen = Checkpoints(tmp_path, writer), []
    checkpoints.open()
    manifest = checkpoints.folder / "manifest.json"
    checkpoints.commit(
        round=1, plan=1, server={}, info={}, before=lambda: seen.append(json.loads(manifest.read_text())["entries"])
    )
    checkpoints.settle()
    assert seen == [[]]
    assert len(json.loads(manifest.read_text())["entries"]) == 1


def test_never_more_than_one_commit_behind(tmp_path, writer, monkeypatch, commit):
    """A disk that is slower than the rounds delays them, and does not fall further behind."""
    save, written = Packed.save, []

    def slow(self, path):
        time.sleep(0.02)
        save(self, path)
        written.append(path.name)

    monkeypatch.setattr(Packed, "save", slow)
    checkpoints = Checkpoints(tmp_path, writer)
    checkpoints.open()
    for number in range(1, 6):
        commit(checkpoints, number, (0, 1))
        behind = number - 1
        assert behind == 0 or f"server-{behind:06d}.safetensors" in written
    checkpoints.settle()
    assert len(written) == 15


def test_settling_up_to_a_job(writer):
    go, done = threading.Event(), []
    job = writer.give(lambda: done.append(1), 1)
    writer.give(lambda: go.wait(10), 1)
    writer.settle(job)
    assert done == [1]
    go.set()
    writer.settle()


def test_a_state_that_a_round_writes_twice(tmp_path, writer, commit):
    """Two exchanges write one name, and finishing the first file takes nothing from the second."""
    checkpoints, go = Checkpoints(tmp_path, writer), threading.Event()
    checkpoints.open()
    writer.give(lambda: go.wait(10), 0)
    for value in (1.0, 2.0):
        checkpoints.write_client(0, 1, {"x": torch.full((3,), value)})
    go.set()
    commit(checkpoints, 1)
    checkpoints.settle()
    again = Checkpoints(tmp_path)
    again.open()
    assert again.client_state(0)["x"].tolist() == [2, 2, 2]
