"""Tests that a Flower app records itself, in one process and in a simulation, and is compared with fedkern's runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flwr.app import Context, RecordDict

import fedkern
from python_tests.flower.fake_grid import FakeGrid
from python_tests.flower.test_quickstart import module

pytestmark = pytest.mark.flower
ROOT = Path(__file__).parents[2]
APP = ROOT / "examples/flower_record/app.py"


def test_a_strategy_records_its_rounds(tmp_path, monkeypatch):
    app = module("recorded_app", APP, monkeypatch)

    def node(partition):
        context = Context(1, 10 + partition, {"partition-id": partition}, RecordDict(), {})
        return lambda message: app.client_app(message, context).content

    for seed in (0, 1):
        grid = FakeGrid({10 + partition: node(partition) for partition in range(app.CLIENTS)})
        app.make_server(str(tmp_path / f"flower-{seed}"), seed)(grid, Context(1, 0, {}, RecordDict(), {}))
    data = fedkern.FederatedData.from_datasets(
        [app.load_table(k) for k in range(app.CLIENTS)], test=app.load_table(10, 1000)
    )
    settings = {"data": data, "model": app.build_network, "progress": False, "workers": 1, **app.SETTINGS}
    ours = fedkern.compare("fedavg", seeds=2, out=tmp_path / "ours", **settings)
    found = fedkern.compare([tmp_path, ours.folder], out=tmp_path / "result")
    flower, own = found.table
    assert (flower["group"], own["group"]) == ("fedavg (Flower)", "fedavg")
    assert abs(own["accuracy_difference"]) < 0.1
    assert flower["bytes"] >= own["bytes"] == 2 * 4 * 42 * app.CLIENTS * app.ROUNDS
    assert "they do not differ" in found.notes[-1]


@pytest.mark.exhaustive
def test_the_app_runs_in_a_simulation(tmp_path):
    pytest.importorskip("ray", reason="Flower's simulation needs ray: pip install 'flwr[simulation]'")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(APP)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert "| fedavg (Flower) | 2 |" in done.stdout, done.stderr[-3000:]
