"""Teachers of FedIOD: from an earlier run, user-defined, and their training."""

import pytest
import torch
from safetensors.torch import save_file

from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.settings.stored import load_settings
from python_tests.methods.fediod_play import TINY


def test_without_a_hold_out_the_teachers_are_those_of_the_ensemble(make_data, make_config, tmp_path):
    data = make_data()
    settings = {"grad_cam": 0, "model": "cnn", "local_epochs": 2}
    options = {**TINY, "holdout": 0.0, "iterations": 1}
    run(make_config("fediod", rounds=1, options=options, **settings), out=tmp_path / "own", data=data)
    run(make_config("ensemble", rounds=None, **settings), out=tmp_path / "members", data=data)
    members, _ = read_model(tmp_path / "members")
    run(make_config("ensemble", rounds=None, teachers=str(tmp_path / "own"), **settings), out=tmp_path / "x", data=data)
    brought, _ = read_model(tmp_path / "x")
    for name, value in members.state_dict().items():
        assert torch.equal(value, brought.state_dict()[name]), name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["oneshot-fedavg", "dense", "fediod"])
def test_teachers_of_an_earlier_run_or_of_ones_own(method, make_data, make_config, tmp_path):
    """Teachers read from a run give the bits of the same networks read from files."""
    data, generated = make_data(), {"nz": 4, "ngf": 2}
    options = {
        "dense": {**generated, "generator_steps": 1, "synthesis_batch": 4, "distill_epochs": 1},
        "fediod": {**TINY, "iterations": 1},
    }
    run(make_config("ensemble", model="cnn", rounds=None), out=tmp_path / "run", data=data)
    (tmp_path / "own").mkdir()
    for k, member in enumerate(read_model(tmp_path / "run")[0].members):
        if k == 1:
            torch.save(member.state_dict(), tmp_path / "own" / "client-1.pt")
        else:
            save_file(
                {n: v.contiguous() for n, v in member.state_dict().items()},
                tmp_path / "own" / f"client-{k}.safetensors",
            )
    results = []

    # A teacher that is brought may have trained on what would be held out here.
    def unseen(folder):
        return [c for record in read_metrics(folder) for c in record.get("clients", {}).values() if "holdout" in c]

    for folder in ("run", "own"):
        config = make_config(method, model="cnn", rounds=1 if method == "fediod" else None, grad_cam=0,
                             teachers=str(tmp_path / folder), options=options.get(method, {}))  # fmt: skip
        run(config, out=tmp_path / f"with-{folder}", data=data)
        results.append(read_model(tmp_path / f"with-{folder}")[0].state_dict())
        assert method != "fediod" or not unseen(tmp_path / f"with-{folder}")
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert load_settings(tmp_path / "with-own").teachers == str(tmp_path / "own")


def test_a_method_that_trains_none_takes_no_teachers(make_config, tmp_path):
    with pytest.raises(UserError, match="--teachers is not for fedavg"):
        make_config("fedavg", teachers=str(tmp_path))
