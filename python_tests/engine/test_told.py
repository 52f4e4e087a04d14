"""What a run tells of its speed: operations, what the processor can do, a trace of one round."""

import gzip
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from interrupted import outcome
from smallest import SETTINGS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedkern.engine import Listener, device_use, peak, run
from fedkern.engine.peak import Rates
from fedkern.errors import UserError
from fedkern.models import build
from fedkern.models.flops import Counting, uncounted
from fedkern.report.tables import final_table


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache"))


def counted(step):
    with FlopCounterMode(display=False) as torchs:
        step()
    with Counting() as ours:
        step()
    return ours.flops, torchs.get_total_flops()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv1d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, stride=2),
        nn.Linear(4, 7),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("mode", ["forward", "weights", "both"])
def test_operations_are_torchs(layer, mode):
    shape = {nn.Linear: (5, 4), nn.Conv1d: (5, 4, 9)}.get(type(layer), (5, 4, 9, 9))
    images = torch.randn(shape, requires_grad=mode == "both")

    def step():
        with torch.set_grad_enabled(mode != "forward"):
            loss = layer(images).sum()
        if mode != "forward":
            loss.backward()

    ours, torchs = counted(step)
    assert ours == torchs > 0


@pytest.mark.parametrize("name", ["cnn", "resnet8", "mlp"])
def test_a_networks_operations_are_torchs(name):
    network = build(name, classes=10, channels=3, image_size=16, seed=0).train()
    images = torch.randn(4, 3, 16, 16)
    ours, torchs = counted(lambda: network(images).sum().backward())
    assert ours == torchs > 0


def test_operations_of_groups():
    """By hand: torch counts the gradient of a grouped convolution's weights as if it had one group."""
    layer, images = nn.Conv2d(4, 6, 3, groups=2), torch.randn(5, 4, 9, 9, requires_grad=True)
    with Counting() as counts:
        layer(images).sum().backward()
    assert counts.flops == 3 * 2 * (5 * 6 * 7 * 7) * (2 * 3 * 3)


def test_compiled_networks_are_compiled_once():
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    layer = torch.compile(nn.Linear(3, 3), backend=backend)
    for _ in range(3):
        with Counting():
            layer(torch.ones(2, 3))
    assert len(seen) == 1


def test_one_count_inside_another():
    layer = nn.Linear(3, 3)
    plain = nn.Linear.forward
    with Counting() as outer:
        layer(torch.ones(2, 3))
        with Counting() as inner:
            layer(torch.ones(2, 3))
        layer(torch.ones(2, 3))
    assert outer.flops == 3 * inner.flops > 0
    assert nn.Linear.forward is plain


def test_what_a_cache_may_have_is_not_counted():
    layer, images = nn.Linear(3, 4), torch.ones(2, 3)
    with Counting() as counting:
        layer(images)
        once = counting.flops
        with uncounted():
            layer(images)
        assert counting.flops == once > 0
        layer(images)
        assert counting.flops == 2 * once


def test_nothing_is_counted_behind_the_end():
    layer = nn.Linear(3, 3)
    with Counting() as counts:
        layer(torch.ones(2, 3))
    first = counts.flops
    layer(torch.ones(2, 3))
    assert counts.flops == first > 0


def test_a_run_records_its_operations(make_config, make_data, tmp_path):
    summary = run(make_config(rounds=2), out=tmp_path / "run", data=make_data())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    each = [line["flops"]["train"] for line in lines]
    assert each[0] == each[1] > 0
    speed = summary["speed"]
    assert speed["flops"]["train"] == sum(each)
    assert speed["flops_per_second"] == pytest.approx(sum(each) / summary["phases"]["train"])
    assert "peak_flops_per_second" not in speed  # nobody has measured it


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


def test_the_measured_peak_stands_beside(make_config, make_data, tmp_path):
    peak.keep({1: Rates(1e12, 2e12, 1e10)})
    config = make_config(rounds=1, workers="1")
    summary = run(config, out=tmp_path / "run", data=make_data())
    assert summary["speed"]["peak_flops_per_second"] == 1e12
    assert peak.of_a_run(1, 1, "bf16") == 2e12
    assert peak.of_a_run(2, 1, "fp32") is None
    table = final_table({**summary, "method": "fedavg"})
    cells = [str(cell) for column in table.columns for cell in column.cells]
    assert any("% of the most it was seen to reach" in cell for cell in cells)


def test_peaks_are_kept_by_processor(monkeypatch):
    peak.keep({1: Rates(1.0, 2.0, 3.0), 2: Rates(4.0, 5.0, 6.0)})
    assert peak.read().threads == {1: Rates(1.0, 2.0, 3.0), 2: Rates(4.0, 5.0, 6.0)}
    path = peak.file()
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "processor": "another"}))
    assert peak.read() is None
    path.write_text("{")
    assert peak.read() is None


def test_measuring(monkeypatch):
    monkeypatch.setattr(peak, "SECONDS", 0.01)
    monkeypatch.setattr(peak, "SIDE", 64)
    monkeypatch.setattr(peak, "COPIED_BYTES", 1 << 20)
    before = torch.get_num_threads()
    found = dict(peak.measure((1,)))
    assert torch.get_num_threads() == before
    assert all(value > 1e6 for value in (found[1].fp32, found[1].bf16, found[1].copied))


def test_a_trace_of_one_round(make_config, make_data, tmp_path):
    config, data = make_config(rounds=3), make_data()
    run(config, out=tmp_path / "plain", data=data)
    run(config, out=tmp_path / "run", data=data, profile=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "plain")
    with gzip.open(tmp_path / "run" / "profile.json.gz") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    steps = sum(name == "aten::nll_loss_backward" for name in events)
    each = run(make_config(rounds=1), out=tmp_path / "one", data=data)["speed"]["flops"]["train"]
    whole = json.loads((tmp_path / "run" / "summary.json").read_text())["speed"]["flops"]["train"]
    assert whole == 3 * each  # so a round has as many steps as any other
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
