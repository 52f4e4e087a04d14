"""Checkpoints: their files, and the fallback when a file is damaged."""

import json

import pytest
import torch

from fedkern.downstream.saved_network import read_model
from fedkern.engine.store import record_files
from fedkern.engine.store.background_writer import BackgroundWriter
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.settings.stored import load_settings


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
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open()
    commit(checkpoints, 1, clients=(3,))
    assert checkpoints.client_state(3) != {}
    checkpoints.write_client(3, 2, {})
    commit(checkpoints, 2)
    again = Checkpoints(tmp_path)
    again.open()
    assert again.client_state(3) == {}


def test_all_checkpoints_damaged(tmp_path, commit):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open()
    commit(checkpoints, 1, (0,))
    (checkpoints.folder / "client-00000-000001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="All checkpoints"):
        Checkpoints(tmp_path).open()


@pytest.mark.parametrize("name", ["server-000002", "client-00000-000002", "participation-000002", "messages-000002"])
def test_a_damaged_file_leads_back_to_the_checkpoint_before(name, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open()
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
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open()
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
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open(fresh=True)
    found = []
    for plan in range(1, 6):
        if plan in (1, 2, 4):
            checkpoints.write_client(7, plan, {"x": plan})
        checkpoints.commit(round=plan, plan=plan, server={}, info={})
        found.append(checkpoints.oldest(7))
    assert found == [1, 1, 2, 2, 4]
    assert checkpoints.oldest(6) is None


@pytest.mark.parametrize("beside", [False, True])
def test_a_state_that_is_taken_back_leaves_nothing(beside, tmp_path, commit):
    checkpoints = Checkpoints(tmp_path, writer := BackgroundWriter() if beside else None)
    checkpoints.open(fresh=True)
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
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open()
    with pytest.raises(UserError, match=r"^The server's state\['x'\] is of type set: take tensors, numbers, texts"):
        checkpoints.commit(round=1, plan=1, server={"x": {1}}, info={})
