"""One-shot FedAvg and CCVR: one round, one average, and calibration of the classifier only."""

import pytest
import torch

from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods.baselines.oneshot_fedavg import OneShotFedAvg
from fedkern.ops import FlatParameters
from python_tests.saved_network import same_network, tensors

FAST = {"virtual_features": 50, "calibration_epochs": 1}


def test_is_fedavg_with_one_round(make_data, make_config, tmp_path):
    data = make_data()
    run(make_config("fedavg", rounds=1, local_epochs=3), out=tmp_path / "a", data=data)
    run(make_config("oneshot-fedavg", model="cnn", rounds=None, local_epochs=3), out=tmp_path / "b", data=data)
    assert same_network(tmp_path / "a", tmp_path / "b")
    assert len(read_metrics(tmp_path / "b")) == 1


def test_calibration_changes_the_classifier_alone(make_data, make_config, tmp_path):
    data = make_data()
    run(make_config("oneshot-fedavg", model="cnn", rounds=None), out=tmp_path / "plain", data=data)
    config = make_config("oneshot-fedavg", model="cnn", rounds=None, options={"calibrate": True, **FAST})
    run(config, out=tmp_path / "flag", data=data)
    run(make_config("ccvr", model="cnn", rounds=None, options=FAST), out=tmp_path / "ccvr", data=data)
    plain, flag = (tensors(tmp_path / name) for name in ("plain", "flag"))
    assert same_network(tmp_path / "flag", tmp_path / "ccvr")
    changed = {name for name in plain if not torch.equal(plain[name], flag[name])}
    assert changed == {"head.weight", "head.bias"}
    before, after = read_metrics(tmp_path / "ccvr")
    assert before["accuracy" if "accuracy" in before else "id_accuracy"] is not None
    assert read_metrics(tmp_path / "plain")[0]["loss"] == before["loss"]
    assert after["round"] == 2


def test_bytes_of_calibration(make_data, make_config, tmp_path):
    """Clients send counts, means and scatters of their classes.

    The averaged network goes down a second time.
    """
    data = make_data()
    config = make_config("ccvr", model="cnn", rounds=None, options=FAST)
    run(config, out=tmp_path, data=data)
    plain, two = read_metrics(tmp_path)
    flat = FlatParameters(RunContext(config, data).networks.build())
    model = 4 * (len(flat.parameters) + len(flat.buffers)) + 8 * len(flat.integers)
    width = tensors(tmp_path)["head.weight"].shape[1]
    present = [len(set(client.labels.tolist())) for client in data.clients]
    up = sum(4 * (3 + c * (width + width * (width + 1) // 2)) for c in present)
    assert two["bytes_up"] - plain["bytes_up"] == up
    assert two["bytes_down"] - plain["bytes_down"] == plain["bytes_down"] == 3 * model


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("value", "why", "nobody"),
    [
        (float("inf"), "infinite values in scatters", "No client is left in round 2"),
        # What a declaration cannot say the pooling finds out.
        (-1.0, "class statistics of client 2 cannot be used", "statistics of every client were refused"),
    ],
)
def test_bad_statistics_are_left_out_and_named(value, why, nobody, make_data, make_config, tmp_path, monkeypatch):
    real = OneShotFedAvg.client_update

    def poison(self, client, phase, message):
        answer = real(self, client, phase, message)
        if "scatters" in answer and client.id in bad:
            answer["scatters"][0, 0] = value
        return answer

    monkeypatch.setattr(OneShotFedAvg, "client_update", poison)
    bad = {2}
    config = make_config("ccvr", model="cnn", rounds=None, options=FAST, on_nan="skip")
    summary = run(config, out=tmp_path / "one", data=make_data())
    assert why in summary["diagnostics"]["refused-upload-2"]
    assert [entry["client"] for record in read_metrics(tmp_path / "one") for entry in record.get("dropped", ())] == [2]
    with pytest.raises(UserError, match=why):
        run(config.replace(on_nan="stop"), out=tmp_path / "stop", data=make_data())
    bad = {0, 1, 2}
    with pytest.raises(UserError, match=nobody):
        run(config, out=tmp_path / "all", data=make_data())


@pytest.mark.parametrize("method", ["ccvr", "ensemble", "feddf", "dense"])
def test_running_statistics_are_needed(method, make_data, make_public, make_config, tmp_path):
    config = make_config(method, model="cnn", rounds=None, buffers="local")
    with pytest.raises(UserError, match=f"{method} needs the running statistics .* --buffers average"):
        run(config, out=tmp_path, data=make_public(make_data()))
    assert not (tmp_path / "config.toml").exists()
