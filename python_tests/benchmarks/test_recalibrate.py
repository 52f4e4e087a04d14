"""Finished runs under another classifier."""

import json

import pytest

from benchmarks.recalibrate import FILE, Classifier, recalibrate
from fedkern.engine import RunConfig, run

TINY = {
    "data": "digits", "clients": 3, "train_samples": 300, "model": "cnn",
    "width": 4, "local_epochs": 4, "partition": "dirichlet:0.5", "grad_cam": 0,
}  # fmt: skip
STILL = 1e-12  # a learning rate that leaves the classifier where it was


@pytest.mark.parametrize("method", ["fusefl", "ensemble"])
def test_it_starts_from_the_classifier_before_and_gets_somewhere(method, tmp_path):
    calibrated = {"calibrate": True, "virtual_features": 50}
    metrics = run(RunConfig.make(method, options=calibrated, **TINY), out=tmp_path)["metrics"]
    before = metrics["uncalibrated_accuracy"] if method == "fusefl" else None
    if before is None:  # without a head of its own an ensemble gives the mean of its members' logits
        plain = run(RunConfig.make(method, **TINY), out=tmp_path / "plain")["metrics"]
        before = plain["accuracy"]
    kinds = [Classifier(pool, lr, "diagonal") for pool in ("mean", "concat") for lr in (STILL, 0.1)]
    found = recalibrate(tmp_path, kinds)
    pool = "mean" if method == "fusefl" else "concat"
    assert found[f"{pool}, lr 1e-12, diagonal"]["accuracy"] == pytest.approx(before, abs=1e-9)
    for pool in ("mean", "concat"):
        assert found[f"{pool}, lr 0.1, diagonal"]["accuracy"] > found[f"{pool}, lr 1e-12, diagonal"]["accuracy"]
    assert json.loads((tmp_path / FILE).read_text()) == found
    (tmp_path / "model.safetensors").unlink()
    assert recalibrate(tmp_path, kinds[:1]) == {kinds[0].name: found[kinds[0].name]}  # kept, not made again


def test_networks_it_does_not_know(tmp_path):
    run(RunConfig.make("oneshot-fedavg", **TINY), out=tmp_path)
    with pytest.raises(TypeError, match="fused networks and ensembles"):
        recalibrate(tmp_path, [Classifier("mean", 0.1)])
