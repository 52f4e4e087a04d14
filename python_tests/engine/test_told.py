"""What a run tells of its cost: bytes of exchanges, a trace of one round, memory and time."""

import gzip
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.listeners import Listener
from fedkern.process import device_use
from python_tests.interrupted import outcome
from python_tests.smallest import SETTINGS


def test_the_bytes_of_several_exchanges_stand_apart(make_config, make_pairs, tmp_path):
    config = make_config("feddra", **SETTINGS["feddra"], rounds=2)
    run(config, out=tmp_path / "run", data=make_pairs())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    several = [line for line in lines if "bytes" in line]
    assert several
    for line in several:
        assert line["bytes"].keys() == {name for name in line["phases"] if name.startswith("train/")}
        for way in ("up", "down"):
            assert sum(each[way] for each in line["bytes"].values()) == line[f"round_bytes_{way}"]


def test_a_trace_of_one_round(make_config, make_data, tmp_path):
    config, data = make_config(rounds=3), make_data()
    run(config, out=tmp_path / "plain", data=data)
    run(config, out=tmp_path / "run", data=data, profile=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "plain")
    with gzip.open(tmp_path / "run" / "profile.json.gz") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    steps = sum(name == "aten::nll_loss_backward" for name in events)
    batches = sum(-(-len(split.labels) // config.batch_size) for split in data.clients)
    assert 0 < steps <= config.local_epochs * batches
    assert not (tmp_path / "plain" / "profile.json.gz").exists()


def test_a_trace_where_workers_would_work(make_config, make_data, tmp_path):
    config = make_config(rounds=1, workers="2")
    run(config, out=tmp_path / "run", data=make_data(), profile=True)
    with gzip.open(tmp_path / "run" / "profile.json.gz") as file:
        assert b"aten::convolution_backward" in file.read()


def test_a_trace_that_is_there_is_not_written_over(make_config, make_data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile.json.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"profile\.json\.gz"):
        run(make_config(rounds=1), out=tmp_path / "run", data=make_data())


def test_private_records_have_no_trace(make_config, make_data, tmp_path):
    """From a trace a client's number of steps can be read."""
    with pytest.raises(UserError, match="--profile writes what every client computed"):
        run(make_config(rounds=1, records="private"), out=tmp_path / "run", data=make_data(), profile=True)
    assert not any((tmp_path / "run").glob("*"))


def test_what_a_round_takes_of_a_gpu(monkeypatch):
    """The engine's side of it, with a GPU that is made up: none is needed to ask one."""
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


class Watched(Listener):
    """This process's memory and the time at the end of every round."""

    def __init__(self):
        self.resident, self.times = [], []

    def on_round(self, record):
        self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self.times.append(time.perf_counter())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc tells the memory")
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_memory_and_rounds_stay_as_they_are(method, make_config, make_data, tmp_path):
    """A thousand rounds of 200 clients, of which ten take part; where a round slows down, pytest -s shows it."""
    config = make_config(method, rounds=1000, clients=200, sample_fraction=0.05, eval_every=100, workers="1")
    seen = Watched()
    run(config, out=tmp_path / "run", data=make_data((3, 4, 5, 6) * 50), listener=seen)
    assert len(seen.resident) == 1000
    grown = max(seen.resident[900:]) - max(seen.resident[100:300])
    assert grown < 8 << 20, f"{grown / 1e6:.1f} MB more"
    each = [after - before for before, after in itertools.pairwise(seen.times)]
    early, late = statistics.median(each[100:300]), statistics.median(each[-200:])
    print(f"{method}: {1e3 * early:.1f} ms a round, then {1e3 * late:.1f}; {grown / 1e6:.1f} MB more")
