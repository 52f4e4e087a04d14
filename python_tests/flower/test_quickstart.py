"""The page's two lines on an app like Flower's quickstart: before and after, in one process and in a simulation."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flwr.app import Context, RecordDict

from python_tests.flower.fake_grid import FakeGrid

pytestmark = pytest.mark.flower

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = "".join((ROOT / "docs" / name).read_text() for name in ("flower.md", "flower-reference.md"))
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)
(SERVER,) = (block for block in BLOCKS if block.startswith("# server_app.py"))
OURS, THEIRS = "from fedkern.flower.strategies import FedAvg", "from flwr.serverapp.strategy import FedAvg"

SIMULATION = """
from client_app import app as client_app
from flwr.simulation import run_simulation
from server_app import app as server_app

run_simulation(
    server_app=server_app, client_app=client_app, num_supernodes=3,
    backend_config={"init_args": {"num_cpus": 1, "include_dashboard": False}, "client_resources": {"num_cpus": 1}},
)
"""


def module(name, path, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


def nodes(client_app):
    """Return three nodes that run the ClientApp, each with its own partition."""

    def node(partition):
        context = Context(1, 10 + partition, {"partition-id": partition}, RecordDict(), {})
        return lambda message: client_app(message, context).content

    return {10 + partition: node(partition) for partition in range(3)}


def play(code, folder, monkeypatch):
    """Return the app's final network, and the module's result."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "server_app.py").write_text(code)
    module("task", HERE / "quickstart/task.py", monkeypatch)
    client_app = module("client_app", HERE / "quickstart/client_app.py", monkeypatch).app
    server_app = module("server_app", folder / "server_app.py", monkeypatch).app
    server_app(FakeGrid(nodes(client_app)), Context(1, 0, {}, RecordDict(), {}))
    return torch.load(folder / "final_model.pt", weights_only=True)


def assert_alike(left, right):
    assert list(left) == list(right)
    for key, value in left.items():
        torch.testing.assert_close(value.double(), right[key].double(), rtol=1e-3, atol=1e-4)


def test_the_page_changes_one_import():
    assert SERVER.count(OURS) == 1
    assert THEIRS not in SERVER


def test_the_app_learns_the_same_with_either_strategy(tmp_path, monkeypatch):
    ours = play(SERVER, tmp_path / "ours", monkeypatch)
    theirs = play(SERVER.replace(OURS, THEIRS), tmp_path / "theirs", monkeypatch)
    assert_alike(ours, theirs)
    assert ours["norm.num_batches_tracked"].dtype == torch.int64
    assert ours["norm.num_batches_tracked"] == 9


def test_the_other_blocks_run(monkeypatch):
    module("task", HERE / "quickstart/task.py", monkeypatch)
    for block in BLOCKS:
        if block != SERVER:
            exec(compile(block, "a page on Flower", "exec"), {})


@pytest.mark.exhaustive
def test_a_simulation_learns_the_same_with_either_strategy(tmp_path):
    pytest.importorskip("ray", reason="Flower's simulation needs ray: pip install 'flwr[simulation]'")
    found = []
    for name, code in (("ours", SERVER), ("theirs", SERVER.replace(OURS, THEIRS))):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("task.py", "client_app.py"):
            (folder / file).write_text((HERE / "quickstart" / file).read_text())
        (folder / "server_app.py").write_text(code)
        (folder / "simulate.py").write_text(SIMULATION)
        paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            [sys.executable, "simulate.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=170
        )
        assert (folder / "final_model.pt").exists(), done.stderr[-3000:]
        found.append(torch.load(folder / "final_model.pt", weights_only=True))
    assert_alike(*found)
