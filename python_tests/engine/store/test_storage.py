"""States, checkpoints, ledger, locks and records on disk."""

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from fedkern.downstream.saved_network import read_model
from fedkern.engine.ledger import Ledger, message_bytes
from fedkern.engine.store import records
from fedkern.engine.store.background_writer import BackgroundWriter
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.client_table import INLINE
from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.messages import states
from fedkern.methods.base import Phase
from fedkern.settings.stored import load_settings

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


leaf = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(DTYPES).map(lambda d: (torch.arange(6) % 2).reshape(2, 3).to(d)),
)  # fmt: skip
tree = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=6), st.integers(-5, 5)), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=6), tree, max_size=4))
def test_any_state_round_trips(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("state") / "x.safetensors"
    states.save(path, content)
    assert same(states.load(path), content)


def test_awkward_tensors_round_trip(tmp_path):
    base = torch.arange(240.0).reshape(2, 4, 5, 6)
    content = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "strided": base[:, ::2, :, 1:4],
        "view": base[0, 0, 0, :2],
        "shared": base,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "grad": torch.ones(3, requires_grad=True),
        "array": np.arange(4),
        "dict": {"$tensor": 1, "tensor": "t0", 3: {"dict": []}},
    }
    states.save(tmp_path / "x.safetensors", content)
    back = states.load(tmp_path / "x.safetensors")
    assert same({**content, "grad": content["grad"].detach()}, back)
    assert (tmp_path / "x.safetensors").stat().st_size < 6000  # the small view did not drag its base along


def test_same_state_same_bytes(tmp_path):
    content = {"b": torch.ones(3), "a": {"x": 1, "y": torch.zeros(2)}}
    states.save(tmp_path / "1", content)
    states.save(tmp_path / "2", content)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("bad", [{"x": object()}, {"x": {1.5: 2}}, {"x": [{True: 1}]}, {"x": {1, 2}}])
def test_what_cannot_be_stored_is_named(bad, tmp_path):
    with pytest.raises(TypeError, match=r"state\['x'\]"):
        states.save(tmp_path / "x", bad)
    assert not list(tmp_path.iterdir())


def test_damaged_state(tmp_path):
    states.save(tmp_path / "x", {"a": torch.ones(100)})
    content = (tmp_path / "x").read_bytes()
    for cut in (b"", content[:50], b"\xff" * 100):
        (tmp_path / "x").write_bytes(cut)
        with pytest.raises(ValueError, match="missing or damaged"):
            states.load(tmp_path / "x")
    with pytest.raises(ValueError, match="missing or damaged"):
        states.load(tmp_path / "y")


def test_a_state_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "FORMAT", states.FORMAT + 1)
    states.save(tmp_path / "x", {"a": torch.ones(1)})
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"x has format 2, and this version of fedkern reads format {states.FORMAT}:"):
        states.load(tmp_path / "x")


def test_fingerprint_sees_every_change():
    content = {"a": torch.zeros(3), "n": 1, "d": {"x": [1.5, torch.ones(2)]}, "w": np.zeros(2)}
    before = states.fingerprint(content)
    assert states.fingerprint(content) == before
    for change in (
        lambda: content["a"].add_(1),
        lambda: content.update(n=2),
        lambda: content["d"]["x"].append(0),
        lambda: content.update(a=torch.zeros(3)),
        lambda: content["w"].__setitem__(0, 1),
        lambda: content.pop("n"),
    ):
        now = states.fingerprint(content)
        change()
        assert states.fingerprint(content) != now


def test_fingerprint_knows_a_tensor_in_the_memory_of_the_last():
    content = {"a": torch.zeros(20_000_000)}
    before, place = states.fingerprint(content), content["a"].data_ptr()
    for _ in range(3):
        del content["a"]
        content["a"] = torch.zeros(20_000_000)
        assert content["a"].data_ptr() != place, "it may have the number and the version of the old one as well"
        assert states.fingerprint(content) != before


def test_writes_are_complete_or_absent(tmp_path):
    atomic.write_bytes(tmp_path / "x", b"old")

    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        atomic.write(tmp_path / "x", fail)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(UserError, match="cannot be written"):
        atomic.write_bytes(tmp_path / "missing" / "x", b"")


def test_ledger_counts_tensors_numbers_and_texts():
    message = {
        "a": torch.zeros(5),
        "b": {"c": torch.zeros(3, dtype=torch.float16), "n": 2},
        "t": "äb",
        "l": [1.0, None],
    }
    assert message_bytes(message) == 20 + 6 + 8 + 3 + 8
    ledger = Ledger(2)
    ledger.book(0, "up", message, phase=Phase(0, "level1", "update"))
    ledger.book(1, "down", message, phase=Phase(1, "level2", "update"))
    ledger.book(1, "down", message)
    summary = ledger.summary()
    assert (summary["up"], summary["down"], summary["one_off_down"], summary["total"]) == (45, 45, 45, 135)
    assert summary["clients"]["1"] == {"up": 0, "down": 45, "one_off_up": 0, "one_off_down": 45}
    assert Ledger(2, **ledger.to_dict()).summary() == summary


def test_ledger_tells_what_has_changed():
    ledger, rows = Ledger(1000), {}
    for number in range(1, 30):
        phase = Phase(number, "train", "update")
        ledger.book(number % 7, "up", 1.0, phase=phase)
        ledger.book(900, "down", "abc")
        changed = ledger.changed_rows()
        assert list(changed) == [number % 7, 900]
        rows |= changed
    assert (ledger.total_up, ledger.total_down) == (29 * 8, 0)
    again = Ledger(1000)
    again.restore(ledger.sums(), rows)
    assert again == ledger
    assert again.summary() == ledger.summary()
    assert again.changed_rows() == {}
    assert list(Ledger(1000, **ledger.to_dict()).changed_rows()) == [0, 1, 2, 3, 4, 5, 6, 900]


def test_checkpoints_keep_two_and_forget_what_was_not_committed(tmp_path, commit):
    first = Checkpoints(tmp_path)
    assert first.open() is None
    for number, clients in ((1, (0, 1)), (2, (0,)), (3, (1,))):
        commit(first, number, clients)
    first.write_client(0, 4, {"x": torch.zeros(3)})  # never committed
    names = {p.name for p in first.folder.iterdir()}
    assert "client-00000-000004.safetensors" in names
    second = Checkpoints(tmp_path)
    assert second.open()["round"] == 3
    assert float(second.client_state(0)["x"][0]) == 2
    assert float(second.client_state(1)["x"][0]) == 3
    assert second.client_state(7) == {}
    assert second.server_state() == {"n": 3}
    names = {p.name for p in second.folder.iterdir()}
    assert names == {
        "manifest.json", "server-000002.safetensors", "server-000003.safetensors", "client-00000-000002.safetensors",
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


@pytest.mark.parametrize("name", ["server-000002", "client-00000-000002", "participation-000002"])
def test_a_damaged_file_leads_back_to_the_checkpoint_before(name, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open()
    for number in (1, 2):
        checkpoints.write_client(0, number, {"x": number})
        checkpoints.commit(round=number, plan=number, server={"n": number}, info={}, participation={"clock": number})
    (checkpoints.folder / f"{name}.safetensors").write_bytes(b"")
    again = Checkpoints(tmp_path)
    assert again.open()["round"] == 1
    assert again.skipped == [f"{name}.safetensors of round 2"]
    assert (again.server_state(), again.client_state(0)) == ({"n": 1}, {"x": 1})
    assert again.participation_state() == {"clock": 1}


def test_manifest_of_another_format(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.open()
    (checkpoints.folder / "manifest.json").write_text(json.dumps({"format": 99, "entries": []}))
    sentence = r"manifest.json has format 99, and this version of fedkern reads format \d+: use the version"
    with pytest.raises(UserError, match=sentence):
        Checkpoints(tmp_path).open()
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.toml").write_text("a_setting_of_that_version = 1\n")
    for read in (records.read_summary, records.read_metrics, read_model, load_settings):
        with pytest.raises(UserError, match=sentence):
            read(tmp_path)


def test_records_are_json_that_any_reader_takes(tmp_path):
    metrics = records.Metrics(tmp_path)
    metrics.append({"round": 1, "x": math.nan, "y": {"z": (1, math.inf)}})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 1, "x": null, "y": {"z": [1, null]}}\n'
    size = metrics.size
    metrics.append({"round": 2})
    metrics.truncate(size)
    metrics.append({"round": 3})
    assert [r["round"] for r in records.read_metrics(tmp_path)] == [1, 3]


def test_a_cut_off_last_line_is_no_record_and_damage_elsewhere_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: No such file"):
        records.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"rou')
    assert records.read_metrics(tmp_path) == [{"round": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(UserError, match="line 2, is damaged"):
        records.read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full: free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied.: put that right, then try again"),
    ],
    ids=["full", "full by safetensors", "forbidden"],
)
def test_the_way_out_fits_what_went_wrong(error, advice, tmp_path):
    def fail(path):
        raise error

    with pytest.raises(UserError, match=f"x cannot be written.*{advice}"):
        atomic.write(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_file_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    atomic.write_bytes(tmp_path / "x", b"content")
    assert order == ["fsync", "rename", "fsync"]  # file, name, folder


@pytest.mark.parametrize("clients", [8, INLINE + 1])
def test_the_oldest_state_that_a_checkpoint_names(clients, tmp_path):
    checkpoints = Checkpoints(tmp_path, clients=clients)
    checkpoints.open(fresh=True)
    found = []
    for plan in range(1, 6):
        if plan in (1, 2, 4):
            checkpoints.write_client(7, plan, {"x": plan})
        checkpoints.commit(round=plan, plan=plan, server={}, info={})
        found.append(checkpoints.oldest(7))
    assert found == [1, 1, 2, 2, 4]
    assert checkpoints.oldest(6) is None


@pytest.mark.parametrize("clients", [8, INLINE + 1])
@pytest.mark.parametrize("beside", [False, True])
def test_a_state_that_is_taken_back_leaves_nothing(beside, clients, tmp_path, commit):
    checkpoints = Checkpoints(tmp_path, writer := BackgroundWriter() if beside else None, clients=clients)
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
