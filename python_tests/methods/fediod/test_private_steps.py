"""FedIOD's private steps in a federation: clipped rows, shards that train and serve, and reports."""

import copy
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods.fediod import private_messages as privacy
from fedkern.methods.fediod.discriminators import Discriminators
from fedkern.methods.fediod.losses import patch_entropy
from fedkern.settings.stored import load_settings
from python_tests.extras import needs_accounting
from python_tests.methods.fediod_play import TINY, World, cleared_and_live, frozen, same

SHARDED = {"epsilon": 50.0, "shards": 3, "noise": "seed"}


@pytest.fixture
def world(make_config, make_data):
    return lambda **options: World(make_config, make_data(), **options)


def norms(rows):
    return rows.flatten(1).norm(dim=1)


def test_a_row_is_the_gradient_of_an_images_own_loss(world):
    """Neither the batch nor the number of clients affects a row.

    The report has the median norm of the rows before clipping.
    """
    w = world(w_real=8.0, iterations=3)
    for phase in w.phases(w.round(), 0):
        messages, _ = w.exchange(phase)
        if phase.exchange == "images 2":  # client 0, whose turn it is, trains for the last time
            images = messages[0]["images"].clone().requires_grad_()
            discriminators = w.clients[0].round_cache["answers"].discriminators
            realism = patch_entropy(discriminators.module(images), True)[0]
            (rows,) = torch.autograd.grad(realism.sum(), images)
        if phase.exchange == "gradients 2":
            assert w.clients[0].report["norm_d"] == pytest.approx(float(norms(rows).median()), rel=1e-3)
            assert "norm_d" not in w.clients[1].report
        elif phase.exchange != "distil 2":
            assert "norm_d" not in w.clients[0].report


@needs_accounting
def test_the_rows_that_are_clipped_are_those_whose_norms_are_told(world, monkeypatch):
    """The same step with and without privacy reports the median of the rows before the noise."""
    given = []
    monkeypatch.setattr(privacy, "sanitise", lambda client, rows, options: given.append(rows) or rows)
    open_, private = world(iterations=1, disc_weight=False), world(iterations=1, disc_weight=False, epsilon=50.0)
    for w in (open_, private):
        w.play(w.round(), 0)
    assert len(given) == 3
    assert open_.clients[0].report["norm_d"] == pytest.approx(float(norms(given[0]).median()), rel=1e-3)
    assert "norm_d" not in private.clients[0].report
    a, b = (w.server.state["generator"]["parameters"] for w in (open_, private))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # the weights taken out of the rows are back in the sum


@needs_accounting
def test_the_records_tell_the_norms_of_runs_without_privacy_alone(make_config, make_data, tmp_path):
    options = {**TINY, "batched": True}
    for name, extra in (("open", {}), ("private", SHARDED)):
        config = make_config("fediod", model="cnn", rounds=2, grad_cam=0, options={**options, **extra})
        run(config, out=tmp_path / name, data=make_data())
    told = [[k for k, c in r["clients"].items() if c.get("norm_d", 0) > 0]
            for r in read_metrics(tmp_path / "open") if "critic_loss" in r["clients"].get("0", {})]  # fmt: skip
    assert told == [["0"], ["1"]]
    assert not any("norm_" in name for r in read_metrics(tmp_path / "private")
                   for c in r.get("clients", {}).values() for name in c)  # fmt: skip


# -- shards ------------------------------------------------------------------------------------------------------------


def steps_by_shard(w, client):
    return {shard: kept["steps"] for shard, kept in w.clients[client].state["critics"].items()}


def kept_whoever_serves(world, monkeypatch, iterations):
    """Return client 0's discriminators after a round, once with the first and once with the last shard serving."""
    states = []
    for serves in (0, 2):
        monkeypatch.setattr(privacy, "serving_shard", lambda *a, shard=serves: shard)
        w = world(iterations=iterations, batched=False, **SHARDED)
        for phase in w.phases(w.round(), 0):
            if phase.exchange.startswith("images"):  # without the others the generator stays as it is
                w.exchange(phase)
        states.append(frozen(w.clients[0].state["critics"]))
    return states


@pytest.mark.sampled(1)
@needs_accounting
@pytest.mark.parametrize("serves", [None, 0, 2], ids=["drawn", "the first", "the last"])
def test_shards_train_in_turn_whichever_serves(world, monkeypatch, serves):
    """Clients of 20, 13 and 9 samples train four, four and three times a round of four."""
    asked = Counter()
    drawn = privacy.serving_shard
    monkeypatch.setattr(
        privacy, "serving_shard", lambda *a: asked.update([shard := drawn(*a) if serves is None else serves]) or shard
    )
    w = world(iterations=4, **SHARDED)
    for number in range(3):
        w.play(w.round(), number)
    for k, trained in enumerate((12, 12, 9)):
        found = steps_by_shard(w, k)
        assert [found[shard] for shard in range(3)] == [trained // 3] * 3
    assert asked.total() == 36  # one draw for every gradient, none for the distillation
    assert set(asked) == ({0, 1, 2} if serves is None else {serves})


@needs_accounting
def test_a_discriminator_does_not_remember_who_served(world, monkeypatch):
    """With the same images the states after training are equal bit for bit, for all serving shards."""
    states = kept_whoever_serves(world, monkeypatch, iterations=4)
    assert [list(state) for state in states] == [[0, 1, 2]] * 2  # in this order, too
    assert all(kept["steps"] for kept in states[0].values())
    assert same(*states)


@needs_accounting
def test_a_discriminator_that_has_not_trained_does_not_tell_whether_it_served(world, monkeypatch):
    states = kept_whoever_serves(world, monkeypatch, iterations=1)
    assert [[kept["steps"] for kept in state.values()] for state in states] == [[1, 0, 0]] * 2
    assert list(states[0]) == list(states[1])
    assert same(*states)


@needs_accounting
def test_what_is_reported_does_not_tell_who_serves(world, monkeypatch):
    """The recorded realism is that of the shard whose turn it is to train."""
    told = []
    for serves in (0, 1, 2):
        monkeypatch.setattr(privacy, "serving_shard", lambda *a, shard=serves: shard)
        w = world(iterations=2, **SHARDED)
        for phase in w.phases(w.round(), 0)[:2]:  # the gradients' answers report
            w.exchange(phase)
        told.append([dict(w.clients[k].report) for k in range(3)])
    assert {"critic_loss", "realism"} <= set(told[0][0])
    assert told[0] == told[1] == told[2]


@needs_accounting
def test_the_gradient_comes_through_the_shard_that_serves(world, monkeypatch):
    given = []
    monkeypatch.setattr(privacy, "sanitise", lambda client, rows, options: given.append(rows) or rows)
    monkeypatch.setattr(privacy, "serving_shard", lambda *a: 2)
    w = world(iterations=1, **SHARDED)
    images, gradients = w.phases(w.round(), 0)[:2]
    sent = w.exchange(images)[0][0]["images"].clone().requires_grad_()
    module = copy.deepcopy(w.clients[0].round_cache["answers"].discriminators.module)
    for name, tensor in module.parts()[0].items():
        tensor.copy_(w.clients[0].state["critics"][2]["weights"][name])
    (expected,) = torch.autograd.grad(patch_entropy(module(sent), True).sum(), sent)
    w.exchange(gradients)
    torch.testing.assert_close(given[0], expected, rtol=1e-4, atol=1e-8)


@needs_accounting
def test_a_cohort_with_shards_gives_the_numbers_of_messages(world):
    worlds = [world(iterations=2, batched=batched, **SHARDED) for batched in (True, False)]
    for w in worlds:
        for number in range(2):
            w.play(w.round(), number)
    for name in ("student", "generator"):
        for part, value in worlds[0].server.state[name].items():
            torch.testing.assert_close(value, worlds[1].server.state[name][part], rtol=1e-3, atol=2e-5)
    for k in range(3):
        assert steps_by_shard(worlds[0], k) == steps_by_shard(worlds[1], k)


@needs_accounting
def test_a_round_with_shards_goes_on_where_the_one_before_ended(world):
    """With two iterations and three shards the turn follows from the iteration, not from cached state."""
    worlds = cleared_and_live(world, 3, iterations=2, **SHARDED)
    assert same(worlds[0].server.state, worlds[1].server.state)
    for k in range(3):
        assert same(worlds[0].clients[k].state, worlds[1].clients[k].state)


@needs_accounting
def test_withheld_confidence_is_neither_judged_nor_sent(world, monkeypatch):
    def judge(self, images):
        raise AssertionError("nobody is told")

    monkeypatch.setattr(Discriminators, "judge", judge)
    w = world(iterations=2, disc_weight=True, **SHARDED)
    w.play(w.round(), 0)
    for phase in w.phases(w.round(), 1)[:3]:
        _, answers = w.exchange(phase)
        assert {name for answer in answers.values() for name in answer} == (
            {"gradients"} if phase.exchange == "gradients 0" else {"logits"}
        )


# -- local teachers ----------------------------------------------------------------------------------------------------


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
