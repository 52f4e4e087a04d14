"""Personal parts of a network: they train, never travel, and count in the run's evaluation."""

import copy
import dataclasses
import os
import re
import shutil

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fedkern
from fedkern import models
from fedkern.data import normalise
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.methods.baselines.fedavg import FedAvg
from fedkern.models.state import freezing
from fedkern.tasks import CLASSIFICATION
from python_tests.interrupted import Kill, KillAt, forge_state, outcome
from python_tests.own_networks import Small
from python_tests.recording import Recording
from python_tests.smallest import SETTINGS

pytestmark = pytest.mark.usefixtures("forked_workers")


def small():
    torch.manual_seed(3)
    return Small()


def play(out, make_data, method="fedavg", sizes=(20, 13, 9), **settings):
    plain = {
        "model": "cnn", "width": 2, "rounds": 2, "local_epochs": 2, "batch_size": 4, "threads": 1, "client_threads": 1,
        "workers": 1, "grad_cam": 0, "pictures": False, "progress": False,
    }  # fmt: skip
    settings = {**plain, **settings}
    if isinstance(settings["model"], nn.Module):
        del settings["width"]
    settings.setdefault("data", dataclasses.replace(make_data(sizes), name="arrays"))
    return fedkern.simulate(method, out=out, **settings)


def networks(run, clients=3):
    return [run.model(client=k).state_dict() for k in range(clients)]


def same(left, second):
    return all(torch.equal(a[name], b[name]) for a, b in zip(left, second, strict=True) for name in a)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 1e-3},
        {"optimizer": "adamw", "lr": 1e-3, "optimizer_state": "keep"},
        {"momentum": 0.9, "optimizer_state": "keep"},
        {"optimizer": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3)},
    ],
    ids=["sgd", "adamw", "keep", "factory"],
)
def test_a_single_client_trains_as_without(make_data, tmp_path, settings):
    """With one client averaging changes nothing, so every bit is that of a run without personal parts."""
    shared = play(tmp_path / "whole", make_data, sizes=[20], **settings)
    parts = play(tmp_path / "parts", make_data, sizes=[20], personal=["head.*", "layer2.*"], **settings)
    assert same([shared.model().state_dict()], [parts.model(client=0).state_dict()])
    assert parts.metrics == pytest.approx(shared.metrics, abs=0)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_it_is_the_run_of_plain_pytorch(make_data, tmp_path, clip):
    Recording.rows, network = [], small()
    given = {"momentum": 0.9, "lr": 0.1, "weight_decay": 1e-3, "clip_norm": clip}
    run = play(tmp_path / "run", make_data, Recording, model=network, personal="head.*", **given)
    sizes = [20, 13, 9]
    plain = [copy.deepcopy(network) for _ in sizes]
    for turn in range(2):
        for size, local in zip(sizes, plain, strict=True):
            optimiser = torch.optim.SGD(local.train().parameters(), 0.1, 0.9, weight_decay=1e-3)
            for _, _, images, targets in [row for row in Recording.rows if row[:2] == (turn, size)]:
                optimiser.zero_grad()
                cross_entropy(local(images), targets).backward()
                if clip:
                    nn.utils.clip_grad_norm_(local.parameters(), clip)
                optimiser.step()
        states = [local.state_dict() for local in plain]
        for name in [name for name in states[0] if not name.startswith("head") and "num" not in name]:
            mean = sum(size / sum(sizes) * state[name].double() for size, state in zip(sizes, states, strict=True))
            for state in states:
                state[name].copy_(mean)
    for found, expected in zip(networks(run), plain, strict=True):
        for name, value in expected.state_dict().items():
            if "num" not in name:
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


AVERAGING = sorted(
    name for name, kind in METHODS.items() if kind.serves(CLASSIFICATION) and kind().takes_personal
)  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", AVERAGING)
def test_every_averaging_method_shares_the_rest(make_data, make_public, tmp_path, method):
    data = make_public(dataclasses.replace(make_data(), name="arrays"), 12)
    settings = {} if method == "fedproto" else SETTINGS.get(method, {})
    run = play(tmp_path / "run", make_data, method, data=data, personal=["head.*"], **settings)
    own, start = networks(run), models.build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2).state_dict()
    for name in start:
        differs = not torch.equal(own[0][name], own[1][name])
        assert differs is name.startswith("head"), name
        assert differs or "num" in name or not torch.equal(own[0][name], start[name]), name
    shared = sum(value.numel() for name, value in start.items() if not name.startswith("head"))
    state = Checkpoints(run.out).last_server_state()
    vectors = [state[name].numel() for name in ("parameters", "buffers", "integers") if name in state]
    assert shared <= sum(vectors) < shared + 8 * len(start)


def test_only_what_is_shared_travels(make_data, tmp_path):
    sent = {}
    for name, parts in {"all": None, "head": "head.*", "norm": "backbone.1.*"}.items():
        run = play(tmp_path / name, make_data, model=small(), rounds=1, personal=parts)
        sent[name] = [run.history.records[-1][f"bytes_{way}"] // 12 for way in ("up", "down")]
    head, norm = 32, 2 * 8 + 2 * 8 + 2  # a bias begins at a multiple of eight; an integer has eight bytes
    assert sent["all"][0] - sent["norm"][0] == norm
    assert sent["all"][0] - sent["head"][0] == pytest.approx(head, abs=5)
    assert all(up == down for up, down in sent.values())


def test_personal_norms_are_fedbn(make_data, tmp_path):
    run = play(tmp_path / "run", make_data, model=small(), personal="backbone.1.*", freeze_bn_after=1)
    left, second, _ = networks(run)
    differing = {name for name in left if not torch.equal(left[name], second[name])}
    assert differing == {name for name in left if name.startswith("backbone.1")}
    with torch.no_grad():
        assert not torch.equal(run.model(client=0)(torch.ones(2, 3, 8, 8)), run.model(client=1)(torch.ones(2, 3, 8, 8)))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("buffers", ["local", "drop"])
def test_other_buffers_are_as_the_policy_says(make_data, tmp_path, buffers):
    run = play(tmp_path / "run", make_data, model=small(), personal="head.*", buffers=buffers, rounds=1)
    states = [Checkpoints(run.out).last_client_state(k) for k in range(3)]
    assert all(("buffers_local" in state) is (buffers == "local") for state in states)
    left, second, _ = networks(run)
    assert not torch.equal(left["head.weight"], second["head.weight"])
    norms = [name for name in left if name.startswith("backbone.1.running")]
    assert len(norms) == (2 if buffers == "local" else 0)
    assert all(torch.equal(left[name], run.model(client=0).state_dict()[name]) for name in norms)
    assert not any(torch.equal(left[name], second[name]) for name in norms)


@pytest.mark.exhaustive
def test_a_loop_of_ones_own_has_the_clients_parts(make_data, tmp_path):
    seen = []

    def train(model, client):
        seen.append((client.id, model.head.weight.detach().clone()))
        with torch.no_grad():
            model.head.weight.fill_(float(len(seen)))
            model.backbone[0].weight.add_(1)

    unread = {"batch_size": None, "local_epochs": None, "lr": None}
    run = play(tmp_path / "run", make_data, model=small(), train=train, personal="head.*", **unread)
    assert [float(weight.mean()) for _, weight in seen[3:]] == [1.0, 2.0, 3.0]
    assert [float(state["head.weight"].mean()) for state in networks(run)] == [4.0, 5.0, 6.0]
    torch.testing.assert_close(networks(run)[1]["backbone.0.weight"], small().backbone[0].weight.detach() + 2)


# -- what is kept --------------------------------------------------------------------------------------------------


def test_bits_in_two_workers_and_killed_and_resumed(make_data, tmp_path):
    settings = {"personal": "head.*", "optimizer_state": "keep", "rounds": 3, "sample_fraction": 0.7, "model": "cnn"}
    single = play(tmp_path / "one", make_data, **settings)
    two = play(tmp_path / "two", make_data, workers=2, **settings)
    with pytest.raises(Kill):
        play(tmp_path / "killed", make_data, listener=KillAt("client", 1, round=2), **settings)
    data = dataclasses.replace(make_data(), name="arrays")
    resumed = fedkern.load(tmp_path / "killed", data=data).resume(progress=False, pictures=False)
    for run in (two, resumed):
        assert outcome(run.out) == outcome(single.out)
        assert same(networks(run), networks(single))
    finished = Checkpoints(single.out).last_client_state(0)["personal"]
    assert set(finished) == {"head.weight", "head.bias"}


def swap(parts):
    parts["head.weight"], parts["head.bias"] = parts["head.bias"], parts["head.weight"]


FORGED = (
    dict.popitem, swap, lambda parts: parts.update(more=torch.ones(1)), lambda parts: parts.update({"head.bias": 1}),
    lambda parts: parts.update({"head.bias": torch.zeros(1)}),  # which PyTorch would broadcast
    lambda parts: parts.update({"head.bias": torch.zeros(3, dtype=torch.int64)}),
)  # fmt: skip


def test_forged_parts_are_refused_in_one_sentence(make_data, tmp_path):
    data = dataclasses.replace(make_data((20, 13, 9)), name="arrays")
    play(tmp_path / "run", make_data, data=data, rounds=1, personal="head.*")
    said = 'The checkpoint is damaged: "personal" of client 1.* does not fit the run\'s network'
    for number, change in enumerate(FORGED):
        out = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        forge_state(out, "client-00001-000001.safetensors", lambda state, change=change: change(state["personal"]))
        run = fedkern.load(out, data=data)
        with pytest.raises(UserError, match=said):
            run.model(client=1)
        assert run.model(client=0)
        with pytest.raises(UserError, match=said):
            run.extend(2, progress=False)


def test_an_absent_client_has_the_parts_of_a_fresh_network(make_data, tmp_path):
    run = play(tmp_path / "run", make_data, rounds=1, sample_fraction=0.4, personal="head.*")
    start = models.build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2).state_dict()
    fresh = [torch.equal(state["head.weight"], start["head.weight"]) for state in networks(run)]
    assert sorted(fresh) == [False, True, True]


class Large(FedAvg):
    """FedAvg whose client 1 uploads too large an update in the second round."""

    def client_update(self, client, phase, message):
        result = super().client_update(client, phase, message)
        if (client.id, phase.round) == (1, 1):
            result["parameters"] = result["parameters"] + 100
        return result


def test_a_client_whose_upload_is_refused_keeps_what_it_had(make_data, tmp_path):
    run = play(tmp_path / "run", make_data, Large, personal="head.*", max_update_norm=50.0, on_nan="skip")
    before = play(tmp_path / "before", make_data, Large, personal="head.*", max_update_norm=50.0, rounds=1)
    assert [drop["client"] for drop in run.history.records[1]["dropped"]] == [1]
    after, earlier = networks(run), networks(before)
    assert [torch.equal(a["head.weight"], b["head.weight"]) for a, b in zip(after, earlier, strict=True)] == [0, 1, 0]


# -- figures -------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_clients_networks(make_data, tmp_path):
    data = dataclasses.replace(make_data(two_tests=False), name="arrays")
    data = dataclasses.replace(data, client_tests=tuple(data.clients))
    run = play(tmp_path / "run", make_data, data=data, personal="head.*", local_epochs=4, eval_every=1)

    def accuracy(k, split):
        inputs = normalise(split.images, data.form.mean, data.form.std)
        with torch.no_grad():
            return float((run.model(client=k)(inputs).argmax(1) == split.labels).double().mean())

    test = data.tests[""]
    assert run.metrics["accuracy"] == pytest.approx(sum(accuracy(k, test) for k in range(3)) / 3)
    own = [accuracy(k, split) for k, split in enumerate(data.clients)]
    assert [run.summary["client_metrics"][str(k)]["accuracy"] for k in range(3)] == pytest.approx(own)
    assert run.metrics["worst_client_accuracy"] == pytest.approx(min(own))
    assert run.metrics["balanced_accuracy"] > 0
    assert run.history["accuracy"][-1] == run.metrics["accuracy"]


def test_a_finished_run_is_evaluated_by_the_clients_networks(make_data, tmp_path):
    data = dataclasses.replace(make_data(), name="arrays")
    run = play(tmp_path / "run", make_data, data=data, personal="head.*", model=small())
    found = run.evaluate()
    assert found == {name: run.metrics[name] for name in found}
    assert {"id_accuracy", "ood_loss", "validation_accuracy", "id_auroc"} <= set(found)


def test_a_run_ends_by_the_clients_figures(make_data, tmp_path):
    run = play(tmp_path / "whole", make_data, personal="head.*", rounds=4)
    losses = run.history["id_loss"]
    stopped = play(tmp_path / "run", make_data, personal="head.*", rounds=4, stop_at=f"id_loss<={losses[1]}")
    assert len(stopped.history) == min(i for i, loss in enumerate(losses, 1) if loss <= losses[1])
    assert stopped.summary["stopped"]["by"] == "stop-at"


class Told(FedAvg):
    """FedAvg whose clients report their number of rounds and their process, as figures on their own set."""

    stateless = False

    def client_update(self, client, phase, message):
        client.state["rounds"] = client.state.get("rounds", 0) + 1
        return super().client_update(client, phase, message)

    def evaluate_own(self, model, data, client):
        figures = super().evaluate_own(model, data, client)
        rounds = client.state.get("rounds", 0)
        client.state["rounds"] = -1  # is not kept
        return {**figures, "rounds": rounds, "process": os.getpid()}


def read(run, name):
    figures = run.summary["client_metrics"]
    return [figures[str(k)][name] for k in range(len(figures))]


def nameless(found):
    """Return an outcome without process ids."""
    model, metrics, summary = found
    for record in (*metrics, summary):
        for figures in record.get("client_metrics", {}).values():
            del figures["process"]
    return model, metrics, summary


@pytest.fixture
def own_sets(make_data):
    data = dataclasses.replace(make_data((20, 13, 9, 8)), name="arrays")
    return dataclasses.replace(data, client_tests=tuple(data.clients))


def test_a_client_is_judged_where_it_works_and_by_its_state(make_data, own_sets, tmp_path):
    settings = {"data": own_sets, "personal": "head.*", "rounds": 3, "sample_fraction": 0.5, "eval_every": 2}
    single = play(tmp_path / "one", make_data, Told, **settings)
    two = play(tmp_path / "two", make_data, Told, workers=2, **settings)
    with pytest.raises(Kill):
        play(tmp_path / "killed", make_data, Told, listener=KillAt("client", 1, round=3), **settings)
    given = {"data": own_sets, "trusted": [f"{__name__}:Told"]}
    resumed = fedkern.load(tmp_path / "killed", **given).resume(progress=False, pictures=False)
    taken = [sum(str(k) in record["clients"] for record in single.history.records) for k in range(4)]
    assert read(single, "rounds") == taken
    assert len({*taken}) > 1
    assert {*read(single, "process")} == {os.getpid()}
    assert len({*read(two, "process")} - {os.getpid()}) == 2
    expected = nameless(outcome(single.out))
    assert nameless(outcome(two.out)) == nameless(outcome(resumed.out)) == expected
    for k in range(4):
        states = [Checkpoints(run.out).last_client_state(k) for run in (single, two, resumed)]
        assert [state.get("rounds", 0) for state in states] == [taken[k]] * 3


def test_a_method_with_one_network_sees_the_clients_states_too(make_data, own_sets, tmp_path):
    run = play(tmp_path / "run", make_data, Told, data=own_sets, sample_fraction=0.5, rounds=3)
    assert read(run, "rounds") == [sum(str(k) in record["clients"] for record in run.history.records) for k in range(4)]


def test_a_run_that_is_resumed_at_its_end_has_its_figures(make_data, own_sets, tmp_path):
    """The evaluation comes after the workers have ended."""
    settings = {"data": own_sets, "personal": "head.*", "rounds": 2}
    uncut = play(tmp_path / "whole", make_data, **settings)
    with pytest.raises(Kill):
        play(tmp_path / "run", make_data, listener=KillAt("end"), workers=2, **settings)
    (tmp_path / "run" / "summary.json").unlink(missing_ok=True)
    resumed = fedkern.load(tmp_path / "run", data=own_sets).resume(progress=False, pictures=False)
    assert outcome(resumed.out) == outcome(uncut.out)


class Failing(FedAvg):
    """FedAvg whose client 1 cannot be evaluated."""

    kind = ZeroDivisionError

    def evaluate_own(self, model, data, client):
        if client.id == 1:
            raise self.kind("no figures")
        return super().evaluate_own(model, data, client)


class Refusing(Failing):
    """A failing method whose error is the user's."""

    kind = UserError


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "workers"), [(Failing, 2), (Refusing, 1), (Failing, 1), (Refusing, 2)])
def test_a_failed_evaluation_names_its_client(make_data, own_sets, tmp_path, method, workers):
    with pytest.raises(UserError) as failed:
        play(tmp_path / "run", make_data, method, data=own_sets, personal="head.*", workers=workers)
    reason = "ZeroDivisionError: no figures" if method is Failing else "no figures"
    sentence = rf"The evaluation of client 1's network failed in round 1: {reason} \(test_personal\.py, line \d+\)\."
    assert re.fullmatch(sentence, str(failed.value))
    assert failed.value.exit_code == (1 if method is Failing else 2)
    assert ("raise self.kind" in failed.value.traceback) is (method is Failing)


# -- a client's network --------------------------------------------------------------------------------------------


def test_the_network_of_a_client_must_be_named(make_data, tmp_path):
    run = play(tmp_path / "run", make_data, personal="head.*", rounds=1, pictures=True, grad_cam=4)
    assert not (run.out / "gradcam.png").exists()
    said = r"The clients of .* keep head\.bias, head\.weight to themselves, which model\.safetensors has as it began"
    for ask in (run.model, lambda: run.export(tmp_path / "x", "state-dict"), lambda: run.predict([])):
        with pytest.raises(UserError, match=said):
            ask()
    for wrong in (3, -1, True, "1"):
        with pytest.raises(UserError, match="client must be a number from 0 to 2, not"):
            run.model(client=wrong)
    with pytest.raises(UserError, match="best=True is the global network"):
        run.model(client=0, best=True)
    shared = play(tmp_path / "whole", make_data, rounds=1)
    with pytest.raises(UserError, match="have no networks of their own beside the global one: leave client out"):
        shared.model(client=0)


@pytest.mark.exhaustive
def test_the_network_of_a_script(make_data, tmp_path):
    network = small()
    network.backbone[0].requires_grad_(False)
    run = play(tmp_path / "run", make_data, model=network, personal="head.*", pictures=True)
    left, second, _ = networks(run)
    assert {*left} == {*network.state_dict()}
    assert torch.equal(left["backbone.0.weight"], network.backbone[0].weight)
    assert not torch.equal(left["head.weight"], second["head.weight"])
    data = dataclasses.replace(make_data(), name="arrays")
    assert fedkern.load(run.out, model=network, data=data).plot()


def test_marks_stay_with_the_layers():
    network = small()
    freezing.keep(network, ["head.*", "backbone.1.running_*"], "net")
    expected = ["backbone.1.running_mean", "backbone.1.running_var", "head.bias", "head.weight"]
    assert freezing.names(network) == freezing.names(copy.deepcopy(network)) == expected
    assert freezing.names(nn.ModuleList([network])) == [f"0.{name}" for name in expected]
    assert freezing.names(small()) == []


# -- refusals ------------------------------------------------------------------------------------------------------

WRONG = {
    "no name": ("fedavg", {"personal": "haed.*"}, r"personal=.haed\.\*. matches no trained parameter and no "
                r"travelling buffer of cnn: its parts are .*head\.\*\. Did you mean .head\.\*.\?"),
    "frozen": ("fedavg", {"personal": "head.*", "freeze": "head.*"}, "matches no trained parameter"),
    "everything": ("fedavg", {"personal": "*"}, "leaves nothing of cnn to be shared: name fewer of its parts"),
    "local": ("local", {"personal": "head.*"}, "personal is for methods whose clients train the whole of one network"),
    "one-shot": ("oneshot-fedavg", {"personal": "head.*", "rounds": None}, "oneshot-fedavg with these options is none"),
    "fml": ("fml", {"personal": "head.*"}, "and fml with these options is none"),
    "fedproto": ("fedproto", {"personal": "head.*", "options": {"networks": "personal"}}, "fedproto with these"),
    "noise": ("fedavg", {"personal": "head.*", "dp_clip": 1.0, "dp_noise": 1.0}, "dp_noise is not for personal: it"),
    "pool": ("fedavg", {"personal": "head.*", "buffers": "pool"}, "pool"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "settings", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_kept_is_said_first(make_data, refuses, tmp_path, method, settings, said):
    with refuses(said):
        play(tmp_path / "run", make_data, method, **settings)


def test_flower_is_refused_before_a_project_is_written(tmp_path, capsys):
    from fedkern.run import main

    words = ["fedavg", "--data", "digits", "--clients", "3", "--personal", "head.*", "--flower", str(tmp_path / "app")]
    assert main(words) == 2
    assert "--personal is not for Flower" in capsys.readouterr().err
    assert not (tmp_path / "app").exists()
