"""Clients that mislead: spoiled uploads, and the patch on models that never saw it."""

import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks.studies import fusefl_misled, spoiled
from benchmarks.studies.study import Case, arguments, run
from fedkern.engine.run import run as run_one
from fedkern.settings.config import RunConfig

TINY = {
    "data": "digits", "clients": 3, "train_samples": 150, "model": "cnn",
    "width": 4, "local_epochs": 2, "partition": "iid", "grad_cam": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "kind", "round_name", "said"),
    [
        (
            "fusefl",
            "shape",
            "level2",
            r"Client 0's upload in round 2 \(.level2.\) has .* are expected; it was left out",
        ),
        ("oneshot-fedavg", "nan", "train", r"Client 0's upload in round 1 holds NaN .*; it was left out"),
    ],
)
def test_a_spoiled_upload_is_named_and_left_out(method, kind, round_name, said, tmp_path):
    case = Case(
        "bad", (*arguments(method, TINY), "--on-nan", "skip"), program=("benchmarks.studies.spoiled", kind, round_name)
    )
    summary = run([case], tmp_path, workers=1)["bad"]
    assert summary["metrics"]["accuracy"] > 0
    assert re.search(said, summary["diagnostics"]["refused-upload-0"])


def test_what_is_spoiled():
    message = {"a": {"n": torch.ones(1), "w": torch.ones(3, 2)}, "count": torch.ones(2, dtype=torch.int64), "x": 3}
    bad = spoiled.KINDS["nan"](message)
    assert bad["a"]["w"].isnan().all()
    assert bad["a"]["n"].isnan().all()
    assert bad["count"].equal(message["count"])
    assert bad["x"] == 3
    cut = spoiled.KINDS["shape"](message)
    assert cut["a"]["w"].shape == (2, 2)
    assert cut["a"]["n"].equal(message["a"]["n"])
    assert cut["count"].equal(message["count"])
    assert message["a"]["w"].shape == (3, 2)


def test_only_one_client_and_round_are_spoiled(monkeypatch):
    class Echo:
        """Uploads what it is sent."""

        name = "echo"

        def client_update(self, client, phase, message):
            return message

    monkeypatch.setattr(spoiled, "METHODS", {"echo": Echo})
    spoiled.spoil("nan", "train")
    method = spoiled.METHODS["echo"]()
    assert method.name == "echo"
    message = {"w": torch.ones(2)}
    for client, round_name in ((1, "train"), (0, "calibrate")):
        assert method.client_update(SimpleNamespace(id=client), SimpleNamespace(name=round_name), message) is message
    assert method.client_update(SimpleNamespace(id=0), SimpleNamespace(name="train"), message)["w"].isnan().all()


@pytest.mark.parametrize("method", ["fusefl", "ensemble", "oneshot-fedavg"])
def test_the_patch_on_a_model(method, tmp_path):
    """On a backdoored run it is the run's own figure."""
    options = {"calibrate": True, "virtual_features": 50}
    config = RunConfig.make(method, options=options, data_options={"backdoor_clients": 1}, **TINY)
    metrics = run_one(config, out=tmp_path)["metrics"]
    found = fusefl_misled.patched(tmp_path, calibrated=True)
    assert found == pytest.approx(metrics["backdoor_accuracy"], abs=0.01)
    before = fusefl_misled.patched(tmp_path, calibrated=False)
    if method == "fusefl":  # it has only one classifier
        assert before == found
    else:
        assert (before is None) == (method == "oneshot-fedavg")
