"""Flower apps with fedkern's strategies on a real SuperLink and real SuperNodes, and their failures."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flwr.app import Context, RecordDict

from python_tests.flower.fake_grid import FakeGrid
from python_tests.flower.federation import Federation, write_project
from python_tests.flower.test_quickstart import HERE, module

pytestmark = [pytest.mark.flower, pytest.mark.exhaustive]

QUICKSTART = HERE / "quickstart"


def faulty(folder: Path, nodes: int, **config) -> Path:
    """Return the app with nodes that misbehave as their node_config says."""
    names = {
        "task.py": "task.py",
        "honest_client_app.py": "client_app.py",
        "client_app.py": "faulty_client_app.py",
        "server_app.py": "strict_server_app.py",
    }
    files = {name: (QUICKSTART / source).read_text() for name, source in names.items()}
    return write_project(folder, files, **{"nodes": nodes, "rounds": 1, "deadline": 120.0, **config})


def left_out(federation: Federation) -> list[tuple[int, int, str]]:
    """Return round, SuperNode's place and reason of every reply that did not count."""
    found = json.loads((federation.folder / "left_out.json").read_text())
    return [(round, federation.node(node).number, reason) for round, node, reason, _ in found]


def model(federation: Federation) -> dict[str, torch.Tensor]:
    return torch.load(federation.folder / "final_model.pt", weights_only=True)


def by_the_honest(folder: Path, monkeypatch) -> dict[str, torch.Tensor]:
    """Return the network after one round of SuperNode 0 alone, in this process."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    module("task", QUICKSTART / "task.py", monkeypatch)
    client_app = module("honest_client_app", QUICKSTART / "client_app.py", monkeypatch).app
    server_app = module("server_app", QUICKSTART / "strict_server_app.py", monkeypatch).app
    node = Context(1, 10, {"partition-id": 0}, RecordDict(), {})
    grid = FakeGrid({10: lambda message: client_app(message, node).content})
    server_app(grid, Context(1, 0, {}, RecordDict(), {"nodes": 1, "rounds": 1, "deadline": 5.0}))
    return torch.load(folder / "final_model.pt", weights_only=True)


def assert_equal(left, right):
    assert list(left) == list(right)
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def test_faulty_replies_are_named_and_the_others_count(tmp_path, monkeypatch):
    """The network is that of the honest node in one process, and no process is left."""
    faults = ["", "nan", "shape", "oversized", "malformed", "missing", "raises"]
    (tmp_path / "federation").mkdir()
    with Federation(tmp_path / "federation") as federation:
        federation.start_nodes(*({"fault": fault} for fault in faults))
        project = faulty(tmp_path / "project", len(faults))
        outcome = federation.run(project)
        assert outcome.is_completed, outcome.log
        assert len(federation.processes()) > 2 * len(faults)  # each SuperNode has its SuperExec
        reasons = {number: reason for _, number, reason in left_out(federation)}
        assert reasons == {1: "finite", 2: "shapes", 3: "size", 4: "size", 5: "keys", 6: "error"}
        for number in reasons:
            node = next(node for node in federation.running() if node.number == number)
            assert f"Round 1: the reply of node {node.id} " in outcome.log
        assert "in a_broken_pipeline" in outcome.log  # the client's traceback
        assert "ZeroDivisionError: division by zero at this site" in outcome.log
        found = model(federation)
    assert federation.processes() == []
    assert_equal(found, by_the_honest(tmp_path / "alone", monkeypatch))
