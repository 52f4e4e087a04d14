"""Files of a run: checkpoints and their fallback, files written in the background, records, and evaluation.csv."""

import json
import math
import threading
import time

import pytest
import torch

from fedkern.downstream.saved_network import read_model
from fedkern.engine.store import checkpoints as module
from fedkern.engine.store import record_files
from fedkern.engine.store.checkpoints import BackgroundWriter, Checkpoints
from fedkern.engine.store.record_files import rows
from fedkern.errors import UserError
from fedkern.messages.states import Packed
from fedkern.settings.config import load_settings


def open_store(*arguments):
    checkpoints = Checkpoints(*arguments)
    checkpoints.open()
    return checkpoints


def test_checkpoints_keep_two_and_forget_what_was_not_committed(tmp_path, commit):
    store = Checkpoints(tmp_path)
    assert store.open() is None
    for number, clients in ((1, (0, 1)), (2, (0,)), (3, (1,))):
        commit(store, number, clients)
    store.write_client(0, 4, {"x": torch.zeros(3)})  # never committed
    names = {p.name for p in store.folder.iterdir()}
    assert "client-00000-000004.safetensors" in names
    second = Checkpoints(tmp_path)
    assert second.open()["round"] == 3
    assert float(second.client_state(0)["x"][0]) == 2
    assert float(second.client_state(1)["x"][0]) == 3
    assert second.client_state(7) == {}
    assert second.server_state() == {"n": 3}
    names = {p.name for p in second.folder.iterdir()}
    assert names == {
        "manifest.json", "clients-000001.jsonl", "server-000002.safetensors", "server-000003.safetensors",
        "client-00000-000002.safetensors",
        "client-00001-000001.safetensors", "client-00001-000003.safetensors",
    }  # fmt: skip


def test_a_client_that_empties_its_state_has_none(tmp_path, commit):
    checkpoints = open_store(tmp_path)
    commit(checkpoints, 1, clients=(3,))
    assert checkpoints.client_state(3) != {}
    checkpoints.write_client(3, 2, {})
    commit(checkpoints, 2)
    again = open_store(tmp_path)
    assert again.client_state(3) == {}


def test_all_checkpoints_damaged(tmp_path, commit):
    checkpoints = open_store(tmp_path)
    commit(checkpoints, 1, (0,))
    (checkpoints.folder / "client-00000-000001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="All checkpoints"):
        Checkpoints(tmp_path).open()


@pytest.mark.parametrize("name", ["server-000002", "client-00000-000002", "participation-000002", "messages-000002"])
def test_a_damaged_file_leads_back_to_the_checkpoint_before(name, tmp_path):
    checkpoints = open_store(tmp_path)
    for number in (1, 2):
        checkpoints.write_client(0, number, {"x": number})
        checkpoints.commit(
            round=number, plan=number, server={"n": number}, info={}, participation={"clock": number},
            messages={sent: {0: {"x": sent}} for sent in range(number)},
        )  # fmt: skip
    (checkpoints.folder / f"{name}.safetensors").write_bytes(b"")
    again = Checkpoints(tmp_path)
    assert again.open()["round"] == 1
    assert again.skipped == [f"{name}.safetensors of round 2"]
    assert (again.server_state(), again.client_state(0)) == ({"n": 1}, {"x": 1})
    assert again.participation_state() == {"clock": 1}
    assert again.messages_in_flight() == {0: {0: {"x": 0}}}


def test_manifest_of_another_format(tmp_path):
    checkpoints = open_store(tmp_path)
    (checkpoints.folder / "manifest.json").write_text(json.dumps({"format": 99, "entries": []}))
    sentence = r"manifest.json has format 99, and this version of fedkern reads format \d+: use the version"
    with pytest.raises(UserError, match=sentence):
        Checkpoints(tmp_path).open()
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.toml").write_text("a_setting_of_that_version = 1\n")
    for read in (record_files.read_summary, record_files.read_metrics, read_model, load_settings):
        with pytest.raises(UserError, match=sentence):
            read(tmp_path)


def test_the_oldest_state_that_a_checkpoint_names(tmp_path):
    checkpoints, found = open_store(tmp_path), []
    for plan in range(1, 6):
        if plan in (1, 2, 4):
            checkpoints.write_client(7, plan, {"x": plan})
        checkpoints.commit(round=plan, plan=plan, server={}, info={})
        found.append(checkpoints.oldest(7))
    assert found == [1, 1, 2, 2, 4]
    assert checkpoints.oldest(6) is None


@pytest.mark.parametrize("beside", [False, True])
def test_a_state_that_is_taken_back_leaves_nothing(beside, tmp_path, commit):
    checkpoints = open_store(tmp_path, writer := BackgroundWriter() if beside else None)
    commit(checkpoints, 1, (6, 7))
    for number in range(2, 6):
        before = {k: checkpoints.clients.get(k) for k in (5, 7)}
        for k in (5, 7):
            checkpoints.write_client(k, number, {"x": torch.zeros(3)})
            checkpoints.name_client(k, before[k])
        assert checkpoints.oldest(7) == 1
        commit(checkpoints, number, (6,))
    checkpoints.settle()
    if writer is not None:
        writer.close()
    again = Checkpoints(tmp_path)
    assert again.open()["round"] == 5
    assert again.client_state(5) == {}
    assert float(again.client_state(7)["x"][0]) == 1
    assert float(again.client_state(6)["x"][0]) == 5
    for k, plans in ((5, []), (6, [4, 5]), (7, [1])):
        names = sorted(path.name for path in again.folder.glob(f"client-{k:05d}-*"))
        assert names == [f"client-{k:05d}-{plan:06d}.safetensors" for plan in plans]


def test_a_state_that_no_file_can_hold_is_one_sentence(tmp_path):
    checkpoints = open_store(tmp_path)
    with pytest.raises(UserError, match=r"^The server's state\['x'\] is of type set: take tensors, numbers, texts"):
        checkpoints.commit(round=1, plan=1, server={"x": {1}}, info={})


# -- record files ------------------------------------------------------------------------------------------------------


def test_records_are_json_that_any_reader_takes(tmp_path):
    metrics = record_files.Metrics(tmp_path)
    metrics.append({"round": 1, "x": math.nan, "y": {"z": (1, math.inf)}})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 1, "x": null, "y": {"z": [1, null]}}\n'
    size = metrics.size
    metrics.append({"round": 2})
    metrics.truncate(size)
    metrics.append({"round": 3})
    assert [r["round"] for r in record_files.read_metrics(tmp_path)] == [1, 3]


def test_a_cut_off_last_line_is_no_record_and_damage_elsewhere_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: No such file"):
        record_files.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"rou')
    assert record_files.read_metrics(tmp_path) == [{"round": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(UserError, match="line 2, is damaged"):
        record_files.read_metrics(tmp_path)


# -- evaluation file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["validation_north", "validation_"],
        ["mean", "worst"],
        ["", "loss"],
        ["a", "a_b"],
        ["id", "id_north"],
        ["_", "a_"],
    ],
)
def test_every_set_has_rows_of_its_own(names):
    figures = {"accuracy": 0.5, "top2": 0.75}
    metrics = {f"{name}_{figure}" if name else figure: v for name in names for figure, v in figures.items()}
    derived = {"validation_accuracy": 0.1, "mean_client_accuracy": 0.2, "worst_client_loss": 0.3}
    found = list(rows({**derived, **metrics}, [f"{name}_" if name else "" for name in names], {}))
    assert found == [("", name or "test", figure, v) for name in names for figure, v in figures.items()]


# -- background writer -------------------------------------------------------------------------------------------------


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
        checkpoints = open_store(tmp_path / name, beside)
        for number, clients in ((1, (0, 1)), (2, (0,)), (3, (1,))):
            commit(checkpoints, number, clients)
        checkpoints.write_client(0, 4, {"x": torch.zeros(3)})  # never committed
        checkpoints.settle()
        folders.append({path.name: path.read_bytes() for path in checkpoints.folder.iterdir()})
    assert folders[0] == folders[1]


def test_a_state_that_waits_can_be_read(tmp_path, writer, commit):
    checkpoints, go = open_store(tmp_path, writer), threading.Event()
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
    again = open_store(tmp_path)
    assert again.client_state(0)["x"].tolist() == [0, 1, 2]


def test_what_could_not_be_written_is_not_committed(tmp_path, writer, monkeypatch, commit):
    checkpoints = open_store(tmp_path, writer)
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
    checkpoints, seen = open_store(tmp_path, writer), []
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
    checkpoints = open_store(tmp_path, writer)
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
    checkpoints, go = open_store(tmp_path, writer), threading.Event()
    writer.give(lambda: go.wait(10), 0)
    for value in (1.0, 2.0):
        checkpoints.write_client(0, 1, {"x": torch.full((3,), value)})
    go.set()
    commit(checkpoints, 1)
    checkpoints.settle()
    again = open_store(tmp_path)
    assert again.client_state(0)["x"].tolist() == [2, 2, 2]
