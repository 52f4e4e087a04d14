"""What a run tells of its cost: bytes of exchanges, a trace of one round, memory and time."""

import gzip
import json

import pytest
import torch

from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.process import device_use
from python_tests.interrupted import outcome


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
