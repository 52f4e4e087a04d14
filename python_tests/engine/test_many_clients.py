"""Runs with many clients and few per round: absent clients cost nothing."""

import gc
import json
import os
import shutil
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkern.data import FederatedData
from fedkern.engine.evaluate import compared_alike
from fedkern.engine.local import samples
from fedkern.engine.rounds.loop import Loop
from fedkern.engine.run import run
from fedkern.engine.store import checkpoints as module
from fedkern.engine.store import client_table
from fedkern.engine.store.checkpoints import BackgroundWriter, Checkpoints
from fedkern.engine.store.client_table import ClientTable
from fedkern.errors import UserError
from fedkern.files import filesystem
from fedkern.listeners import Listener
from fedkern.methods import METHODS
from fedkern.settings.config import FORMAT, load_settings
from python_tests import interrupted
from python_tests.hearing import Hearing

WORKING = 5
STATEFUL = {"buffers": "local", "grad_cam": 0, "eval_every": 50, "batch_size": 2}


@pytest.fixture
def make_many(make_data):
    """Return a function that makes clients of one or two samples each."""

    def make(clients):
        return make_data(sizes=tuple(1 + k % 2 for k in range(clients)), masked=False)

    return make


@pytest.fixture
def small(make_config):
    def make(clients, method="fedavg", **settings):
        plain = {"clients": clients, "sample_fraction": WORKING / clients, **STATEFUL}
        return make_config(method, **{**plain, **settings})

    return make


@pytest.fixture
def writes(monkeypatch):
    """Return names and sizes of later atomic writes and of additions to client tables."""
    found = []
    rename, add = filesystem.replace, ClientTable.add

    def note_file(path, fill, **settings):
        rename(path, fill, **settings)
        found.append((path.name, path.stat().st_size))

    def note_rows(self, plan, rows):
        before = self._place
        place = add(self, plan, rows)
        if before is not None and before["file"] == place["file"]:
            found.append((place["file"], place["bytes"] - before["bytes"]))
        return place

    monkeypatch.setattr(filesystem, "replace", note_file)
    monkeypatch.setattr(ClientTable, "add", note_rows)
    return found


def play(config, data, out, writes):
    writes.clear()
    run(config, out=out, data=data)
    return [(name, size) for name, size in writes if name.startswith(("client", "server", "manifest"))]


def test_what_a_round_writes_follows_from_the_clients_that_work(make_many, small, tmp_path, writes):
    rounds, totals = 12, {}
    for clients in (300, 900):
        found = play(small(clients, rounds=rounds), make_many(clients), tmp_path / str(clients), writes)
        states = [name for name, _ in found if name.startswith("client-")]
        assert len(states) == rounds * WORKING
        shared = len(found) - len(states)
        assert shared <= 3 * rounds + 2  # server, manifest and table, and the manifests of the beginning and the end
        totals[clients] = sum(size for _, size in found)
        largest = max(size for name, size in found if name == "manifest.json")
        assert largest < 40_000
    assert totals[900] < 1.03 * totals[300]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("slack", [0, 1 << 16])
def test_files_are_those_of_the_states(slack, make_many, small, tmp_path, monkeypatch):
    monkeypatch.setattr(client_table, "SLACK", slack)  # without any, tables are begun anew all the time
    run(small(300, rounds=12), out=tmp_path, data=make_many(300))
    checkpoints = Checkpoints(tmp_path)
    entry = checkpoints.peek()
    named, _ = checkpoints.files_of(entry)
    names = {path.name for path in checkpoints.folder.iterdir()}
    states = {name for name in names if name.startswith("client-")}
    assert set(named.values()) <= states
    assert len(states) <= len(named) + WORKING  # those of the checkpoint before, of clients that have worked again
    assert len(names - states) <= 2 + 1 + 2  # two servers, the manifest, a table or two
    assert entry["table"]["file"] in names
    assert len(entry["files"]) == WORKING + 1
    assert json.loads((checkpoints.folder / "manifest.json").read_text())["format"] == FORMAT


def lengths(run):
    """Return the length of every list, dict, set and deque in a run's own objects, by attribute."""
    found, seen, todo = {}, set(), deque([("run", run)])
    while todo:
        where, value = todo.popleft()
        if id(value) in seen or isinstance(value, (torch.Tensor, FederatedData, str)):
            continue
        seen.add(id(value))
        if isinstance(value, (list, dict, set, deque)):
            found[where] = len(value)
            if isinstance(value, list):  # of filters and parts
                todo += [(f"{where}.{type(item).__name__}", item) for item in value[:20]]
        elif type(value).__module__.startswith(("fedkern.engine", "fedkern.settings")):
            todo += [(f"{where}.{name}", attribute) for name, attribute in getattr(value, "__dict__", {}).items()]
    return found


ROWS_OF_CLIENTS = {
    "run._run.store.checkpoints._table.rows",  # a row per client that ever worked
    "run._run.store.checkpoints.clients",
    "run._run.context.samples._clients",  # up to PREPARED
}


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_nothing_else_grows_with_the_rounds(workers, make_many, small, tmp_path, monkeypatch):
    running, descriptors, found, play = [], [], [], Loop.play
    monkeypatch.setattr(Loop, "play", lambda self: (running.append(self), play(self))[1])

    def look(record):
        if record["round"] in (8, 16):
            descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
            found.append(lengths(running[0]))

    settings = small(500, rounds=17, workers=workers)
    run(settings, out=tmp_path, data=make_many(500), listener=Hearing(on_round=look))
    early, *_, last = found
    assert "run._run.store.checkpoints._due" in early
    grown = {name for name, length in last.items() if length > early.get(name, 0) + 3 * WORKING}
    assert grown <= ROWS_OF_CLIENTS
    assert {"run._run.store.checkpoints._table.rows"} <= grown  # the test would see it
    assert descriptors[-1] <= descriptors[0] + 3  # a file may be on its way to the disk


def test_prepared_images_are_of_a_few_clients(make_many, small, tmp_path, monkeypatch):
    """The bits are those of a run that keeps all images."""
    data, config = make_many(40), small(40, rounds=25, sample_fraction=1 / 40)
    running, kept, play = [], [], Loop.play
    monkeypatch.setattr(Loop, "play", lambda self: (running.append(self), play(self))[1])
    prepared = Hearing(on_round=lambda record: kept.append(len(running[-1]._run.samples._clients)))
    run(config, out=tmp_path / "all", data=data, listener=prepared)
    assert max(kept) > 12
    kept.clear()
    monkeypatch.setattr(samples, "PREPARED", 2)
    run(config, out=tmp_path / "few", data=data, listener=prepared)
    assert max(kept) == 10  # the clients of ten rounds
    assert interrupted.outcome(tmp_path / "few") == interrupted.outcome(tmp_path / "all")


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def uncut(played_once, make_many, small):
    """Return the outcome of the run of 300 clients and six rounds."""
    return interrupted.outcome(
        played_once("whole", lambda out: run(small(300, rounds=6), out=out, data=make_many(300)))
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("at", [("client", 12), ("round-start", 5), ("round", 3), ("end", 0)])
def test_a_killed_run_goes_on(at, make_many, small, uncut, tmp_path):
    data, config = make_many(300), small(300, rounds=6)
    assert interrupted.kill_and_resume(config, out=tmp_path / "cut", data=data, at=interrupted.KillAt(*at)) == uncut


@pytest.mark.exhaustive
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_every_file(when, make_many, small, tmp_path):
    data, config = make_many(300), small(300, rounds=3, checkpoint_every=2)
    run(config, out=tmp_path / "whole", data=data)
    for count in range(12):
        cut = tmp_path / f"cut{count}"
        with interrupted.killed_at_rename(count, when):
            run(config, out=cut, data=data)
        again = (cut / "config.toml").exists()
        run(load_settings(cut) if again else config, out=cut, resume=again, data=data)
        assert interrupted.outcome(cut) == interrupted.outcome(tmp_path / "whole")


@pytest.fixture
def cut(played_once, make_many, small, tmp_path):
    """Return a run of 300 clients and six rounds, killed in its last round."""

    def play(out):
        interrupted.play_killed(
            small(300, rounds=6), out=out, data=make_many(300), at=interrupted.KillAt("round-start", 5)
        )

    return shutil.copytree(played_once("cut", play), tmp_path / "cut")


def go_on(out, data):
    return run(load_settings(out), out=out, resume=True, data=data)


def test_states_of_absent_clients_are_read_when_they_work(cut, monkeypatch):
    read = []
    checksum = module.checksum
    monkeypatch.setattr(module, "checksum", lambda path: (read.append(path.name), checksum(path))[1])
    checkpoints = Checkpoints(cut)
    entry = checkpoints.open()
    assert sorted(read) == sorted(entry["files"])
    assert len(checkpoints.clients) > WORKING
    absent = next(k for k, name in checkpoints.clients.items() if name not in entry["files"])
    read.clear()
    for _ in range(2):
        assert checkpoints.client_state(absent)["buffers_local"]
    assert read == [checkpoints.clients[absent]]  # a file of another process is checked once


def test_a_damaged_state_is_named_when_its_client_works(cut):
    checkpoints = Checkpoints(cut)
    entry = checkpoints.open()
    absent, name = next((k, name) for k, name in checkpoints.clients.items() if name not in entry["files"])
    path = checkpoints.folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"{name} is missing or damaged: put the file back, or start the run again"):
        checkpoints.client_state(absent)


def test_a_lost_state_is_named_before_the_run_goes_on(cut, make_many):
    checkpoints = Checkpoints(cut)
    entry = checkpoints.open()
    for name in checkpoints.clients.values():
        if name not in entry["files"]:
            (checkpoints.folder / name).unlink()
    with pytest.raises(UserError, match=r"All checkpoints in .* are damaged"):
        go_on(cut, make_many(300))


def test_a_cut_table_falls_back_to_the_checkpoint_before(cut, make_many, uncut):
    newest = Checkpoints(cut).peek()
    path = cut / "checkpoints" / newest["table"]["file"]
    path.write_bytes(path.read_bytes()[:-5])
    go_on(cut, make_many(300))
    found = interrupted.outcome(cut)
    assert path.name in found[2]["diagnostics"]["damaged-checkpoint"]
    assert interrupted.without(found, "damaged-checkpoint") == uncut


def test_what_an_interrupted_commit_left_in_the_table_is_dropped(cut, make_many, uncut):
    path = cut / "checkpoints" / Checkpoints(cut).peek()["table"]["file"]
    with path.open("a") as file:
        file.write('{"0": ["client-00000-0000')
    go_on(cut, make_many(300))
    assert interrupted.outcome(cut) == uncut


@pytest.mark.parametrize("slack", [0, 1 << 16])
def test_what_is_written_beside_the_rounds_is_what_is_written_at_once(slack, commit, tmp_path, monkeypatch):
    monkeypatch.setattr(client_table, "SLACK", slack)
    folders = []
    for name, beside in (("once", None), ("beside", BackgroundWriter())):
        checkpoints = Checkpoints(tmp_path / name, beside)
        checkpoints.open(fresh=True)
        for number in range(1, 9):
            checkpoints.write_client(280, number, {"x": torch.ones(1)} if number % 2 else {})
            commit(checkpoints, number, (number % 3, 290))
        checkpoints.settle()
        if beside is not None:
            beside.close()
        folders.append({path.name: path.read_bytes() for path in checkpoints.folder.iterdir()})
        again = Checkpoints(tmp_path / name)
        assert again.open()["round"] == 8
        assert {k: float(again.client_state(k)["x"][0]) for k in (0, 1, 2, 290)} == {0: 6, 1: 7, 2: 8, 290: 8}
        assert again.client_state(280) == {}
    assert folders[0] == folders[1]


# -- work over all clients ---------------------------------------------------------------------------------------------


class Samples(tuple):
    looks = 0

    def __iter__(self):
        type(self).looks += 1
        return super().__iter__()


def test_scaffold_adds_the_samples_up_once_a_round(make_many, small, tmp_path, monkeypatch):
    update = METHODS["scaffold"].server_update
    looks = []

    def count_looks(self, server, phase, uploads):
        samples = Samples(server.federation.samples)
        monkeypatch.setattr(server, "federation", replace(server.federation, samples=samples))
        Samples.looks = 0
        update(self, server, phase, uploads)
        looks.append(Samples.looks)

    monkeypatch.setattr(METHODS["scaffold"], "server_update", count_looks)
    run(small(300, "scaffold", rounds=2, buffers="average"), out=tmp_path, data=make_many(300))
    assert max(looks) <= 2


def test_own_test_sets_are_measured_once():
    class Set:
        looks = 0

        def __len__(self):
            Set.looks += 1
            return 2

    sets = compared_alike({k: Set() for k in range(200)})
    assert {data.loss_batch for data in sets.values()} == {2}
    assert Set.looks == 200
    assert compared_alike({}) == {}


# -- the real size -----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_ten_thousand_clients(make_many, small, tmp_path):
    data = make_many(10_000)
    config = small(10_000, "scaffold", rounds=3, sample_fraction=0.01, buffers="average", eval_every=3)
    interrupted.check_interruption(config, tmp_path, data=data, at=interrupted.KillAt("round-start", 2))
    states = list((tmp_path / "whole" / "checkpoints").glob("client-*"))
    assert 200 < len(states) <= 300
    assert (tmp_path / "whole" / "checkpoints" / "manifest.json").stat().st_size < 500_000


@pytest.mark.slow
def test_a_thousand_rounds(make_many, small, tmp_path):
    """Round 1,000 needs no more memory, descriptors, files and time than round 300."""

    class Meter(Listener):
        essential = True

        def __init__(self):
            self.used, self.rows = [], {}

        def on_round(self, record):
            self.used.append(time.process_time())
            if record["round"] % 100 == 0:
                gc.collect()
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                self.rows[record["round"]] = (
                    pages * os.sysconf("SC_PAGE_SIZE"),
                    len(list(Path("/proc/self/fd").iterdir())),
                    len(list((tmp_path / "checkpoints").iterdir())),
                )

    meter = Meter()
    config = small(10_000, "scaffold", rounds=1000, sample_fraction=0.01, buffers="average", eval_every=100)
    run(config, out=tmp_path, data=make_many(10_000), listener=meter)
    early, late = meter.rows[300], meter.rows[1000]
    assert late[0] < 1.05 * early[0]
    assert abs(late[1] - early[1]) <= 3  # a file may be on its way to the disk
    assert late[2] <= 10_000 + 2 * 100 + 10
    rounds = np.diff(meter.used)
    # What else the processor does makes rounds longer: the fastest tenth of a hundred rounds tells.
    assert np.quantile(rounds[899:], 0.1) < 1.4 * np.quantile(rounds[200:300], 0.1)
