"""Tests of finished runs under another classifier."""

import pytest

from benchmarks.studies.recalibrate import Classifier, recalibrate
from fedkern.engine.run import run
from fedkern.settings.config import RunConfig

TINY = {
    "data": "digits", "clients": 3, "train_samples": 300, "model": "cnn",
    "width": 4, "local_epochs": 4, "partition": "dirichlet:0.5", "grad_cam": 0,
}  # fmt: skip
STILL = 1e-12  # a learning rate that leaves the classifier where it was


@pytest.mark.parametrize("method", ["fusefl", "ensemble"])
def test_it_starts_from_the_classifier_before_and_gets_somewhere(method, tmp_path):
    calibrated = {"calibrate": True, "virtual_features": 50}
    metrics = run(RunConfig.make(method, options=calibrated, **TINY), out=tmp_path)["metrics"]
    # Features side by side start from the mean of the members' logits, or of the branches'.
    options = {"calibrate": False, "final_fuse": "concat"} if method == "fusefl" else {}
    plain = run(RunConfig.make(method, options=options, **TINY), out=tmp_path / "plain")["metrics"]
    before = {"concat": plain["accuracy"]}
    if method == "fusefl":
        before["mean"] = metrics["uncalibrated_accuracy"]
    kinds = [Classifier(pool, lr, "diagonal") for pool in ("mean", "concat") for lr in (STILL, 0.1)]
    found = recalibrate(tmp_path, kinds)
    for pool, accuracy in before.items():
        assert found[f"{pool}, lr 1e-12, diagonal"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    for pool in ("mean", "concat"):
        assert found[f"{pool}, lr 0.1, diagonal"]["accuracy"] > found[f"{pool}, lr 1e-12, diagonal"]["accuracy"]


def test_an_ordinary_network_is_one_branch(tmp_path):
    metrics = run(RunConfig.make("oneshot-fedavg", **TINY), out=tmp_path)["metrics"]
    kinds = [Classifier(pool, lr, "diagonal") for pool in ("mean", "concat") for lr in (STILL, 0.1)]
    found = recalibrate(tmp_path, kinds)
    for pool in ("mean", "concat"):
        assert found[f"{pool}, lr 1e-12, diagonal"]["accuracy"] == pytest.approx(metrics["accuracy"], abs=1e-9)
    assert found[kinds[1].name] == found[kinds[3].name]
    assert found[kinds[1].name]["accuracy"] > metrics["accuracy"]


def test_networks_that_cannot_be_calibrated_anew(tmp_path):
    run(RunConfig.make("oneshot-fedavg", options={"calibrate": True, "virtual_features": 50}, **TINY), out=tmp_path)
    with pytest.raises(ValueError, match=r"only its calibrated classifier left: run it with calibrate=false"):
        recalibrate(tmp_path, [Classifier("mean", 0.1)])
    run(RunConfig.make("fedavg", **{**TINY, "data": "segdigits", "model": "unet", "partition": "iid"}, rounds=1),
        out=tmp_path / "unet")  # fmt: skip
    with pytest.raises(TypeError, match="features and a linear head, not UNet"):
        recalibrate(tmp_path / "unet", [Classifier("mean", 0.1)])
