"""FedDRA: its stages, anchors, losses and bytes."""

import dataclasses
import math
import types

import numpy as np
import pytest
import torch

from fedkern import ops
from fedkern.engine.client import Client
from fedkern.engine.rounds.ledger import message_bytes
from fedkern.engine.run import run
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import FedDRA, Federation
from fedkern.methods.common.pooling import EXCHANGES, Pooling
from fedkern.methods.feddra import ALIGNMENT, head_inputs, splice_ends
from fedkern.models.towers import PARTS
from python_tests.methods.feddra_parts import ALIGN, JOINT, LOSSES, SETTINGS

# Stages.


def test_the_first_stage_leaves_encoders_as_they_are(parts):
    p = parts()
    encoders, alignment = p.sizes()
    before = {name: value.clone() for name, value in p.server.state.items() if isinstance(value, torch.Tensor)}
    _, uploads = p.exchange(ALIGN)
    after = p.server.state
    assert torch.equal(after["parameters"][:encoders], before["parameters"][:encoders])
    assert not torch.equal(after["parameters"][encoders:], before["parameters"][encoders:])
    assert all(len(upload.message["parameters"]) == alignment for upload in uploads)
    local = p.context.networks.get("local")
    assert torch.equal(local.parameters[:encoders], before["parameters"][:encoders])
    assert not local.module.image_encoder.training
    assert local.module.image_head.training


@pytest.mark.parametrize("start_from", ["own", "average"])
def test_what_clients_go_on_from_and_that_they_anchor_on_the_average(start_from, parts, monkeypatch):
    p = parts(joint_start=start_from)
    _, uploads = p.exchange(ALIGN)
    seen, own = [], start_from == "own"
    real = Client.train

    def train(client, method, phase, message, **settings):
        seen.append((message["parameters"].clone(), settings["anchor"]["parameters"].clone()))
        return real(client, method, phase, message, **settings)

    monkeypatch.setattr(Client, "train", train)
    encoders, _ = p.sizes()
    average = p.server.state["parameters"].clone()
    p.exchange(JOINT)
    for (start, anchor), upload in zip(seen, uploads, strict=True):
        assert torch.equal(start[encoders:], upload.message["parameters"] if own else average[encoders:])
        assert torch.equal(start[:encoders], average[:encoders])
        assert torch.equal(anchor, average)
    assert torch.equal(seen[0][0], seen[1][0]) != own


@pytest.mark.parametrize("option", [{"stages": "one"}, {"stage_schedule": "sequential"}])
def test_a_start_that_would_do_nothing_is_refused(option):
    with pytest.raises(UserError, match="stage_schedule=per_round"):
        FedDRA.Options(joint_start="average", **option)


def test_samples_of_losses_that_nobody_reports_are_refused():
    with pytest.raises(UserError, match='"loss_samples" has no effect with dro=off'):
        FedDRA.Options.parse(["dro=off", "loss_samples=64"])
    assert FedDRA.Options.parse(["dro=off", "loss_samples=0"]).loss_samples == 0  # a stored run names all options


def test_spliced_replaces_the_ends():
    model = {"parameters": torch.arange(5.0), "buffers": torch.arange(3.0)}
    assert splice_ends(model, {"parameters": torch.tensor([9.0, 8.0])})["parameters"].tolist() == [0, 1, 2, 9, 8]
    assert splice_ends(model, {})["buffers"] is model["buffers"]


def test_the_alignment_modules_are_the_ends_of_the_vectors(parts):
    network = parts().context.networks.build()
    names = [name.partition(".")[0] for name, _ in network.named_parameters()]
    assert names == sorted(names, key=PARTS.index)
    assert PARTS[2:] == ALIGNMENT


@pytest.mark.parametrize(("options", "plan"), [
    ({}, [("alignment", "joint", "losses")] * 4),
    ({"dro": "off"}, [("alignment", "joint")] * 4),
    ({"stages": "one"}, [("joint", "losses")] * 4),
    ({"stage_schedule": "sequential"}, [("alignment", "losses")] + [("joint", "losses")] * 3),
    ({"stage_schedule": "sequential", "dro": "off"}, [("alignment",)] + [("joint",)] * 3),
])  # fmt: skip
def test_plans(options, plan):
    method = FedDRA(FedDRA.Options.parse({key: str(value) for key, value in options.items()}))
    assert [entry.exchanges for entry in method.rounds(Federation(4, (5, 5), 2))] == plan
    shortest = [entry.exchanges for entry in method.rounds(Federation(1, (5, 5), 2))]
    assert shortest == plan[-1:]


# Losses.


def test_loss_at_a_random_start_and_of_identical_pairs(parts):
    p = parts()
    batch = p.clients[0].batch(np.arange(16))
    x, y = p.context.networks.build().train()(batch.inputs, batch.targets)
    assert ops.contrastive(x, y).item() < 2 * math.log(16) + 3
    pairs = torch.eye(16)
    assert ops.contrastive(pairs, pairs).item() < 1e-3


def test_no_gradient_reaches_the_anchors_or_frozen_encoders(parts):
    p = parts()
    model, glob = p.context.networks.build().train(), p.context.networks.build().eval()
    received = types.SimpleNamespace(model=glob, round_cache={}, epochs=1, samples=20, message={}, extras={})
    batch = dataclasses.replace(p.clients[0].batch(np.arange(8)), phase=ALIGN)
    p.method.loss(model, batch, received)[0].backward()
    assert all(parameter.grad is None for parameter in glob.parameters())
    assert all(parameter.grad is None for name in PARTS[:2] for parameter in getattr(model, name).parameters())
    assert all(parameter.grad is not None for parameter in model.image_head.parameters())


def test_anchors_use_what_the_statistics_computed_with_the_same_model(parts, monkeypatch):
    p = parts(stage_schedule="sequential")
    pooling, client, extras = Pooling(p.method), p.clients[0], []
    real = Client.train
    monkeypatch.setattr(Client, "train", lambda *args, **how: extras.append(how["extras"]) or real(*args, **how))
    for _ in range(2):
        p.exchange(JOINT)
        message = pooling.send(p.server, dataclasses.replace(JOINT, exchange=EXCHANGES[0]))
        for k in p.clients:
            pooling.client_update(k, dataclasses.replace(JOINT, exchange=EXCHANGES[0]), message)
        p.exchange(LOSSES)
    assert [bool(known) for known in extras] == [False] * 3 + [True] * 3
    known, rows = client.state["heads"], p.method.rows(client)[0]
    network, batch = client.frozen(client.state["model"]), client.batch(np.arange(client.samples)[::-1].copy())
    assert known["rows"].tolist() == rows.tolist() == sorted(rows)
    for side in ("image", "text"):
        compute, seen = getattr(network, f"{side}_token"), []
        monkeypatch.setattr(network, f"{side}_token", lambda part: seen.append(part) or compute(part))  # noqa: B023
        with torch.no_grad():
            found, expected = head_inputs(side, network, batch, known), head_inputs(side, network, batch, {})
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        counts = [len(part if side == "image" else part.ids) for part in seen]
        assert counts == [client.samples - len(rows), client.samples]
        fresh = head_inputs(side, network, dataclasses.replace(batch, fresh=True), known)
        assert torch.equal(fresh, expected)


def test_losses_are_taken_on_samples_that_never_train_and_in_batches_of_one_size(parts, monkeypatch):
    p = parts(sizes=(40, 20, 13), loss_share=0.2)
    trained, judged, batches = {}, {}, []
    for client in p.clients:
        train, held = p.method.rows(client)
        trained[client.id], judged[client.id] = set(train.tolist()), set(held.tolist())
        assert not trained[client.id] & judged[client.id]
        assert trained[client.id] | judged[client.id] == set(range(client.samples))
    real = Client.batch
    monkeypatch.setattr(
        Client, "batch", lambda self, rows: (batches.append((self.id, set(rows.tolist()))), real(self, rows))[1]
    )
    p.exchange(LOSSES)
    assert {len(rows) for _, rows in batches} == {3}  # a fifth of 13
    assert all(rows <= judged[k] for k, rows in batches)
    assert sum(k == 0 for k, _ in batches) == 2  # of 8 samples, the two left over stay out


def test_training_samples_as_in_the_released_code(parts):
    p = parts(loss_split="train")
    train, held = p.method.rows(p.clients[0])
    assert len(train) == 20
    assert set(held.tolist()) <= set(train.tolist())


# Whole runs.


def test_bytes_of_a_round_are_those_of_the_notes(parts):
    """Method notes 3.10: alignment modules and model once each way, and one number each."""
    p = parts(settings={"buffers": "average"})
    encoders, alignment = p.sizes()
    extra = {name: len(p.server.state[name]) for name in ("buffers", "integers")}  # all of them of the heads
    model, part = (4 * (n + extra["buffers"]) + 8 * extra["integers"] for n in (encoders + alignment, alignment))

    def measure(phase):
        sent, uploads = p.exchange(phase)
        own = sent.get(0, sent)
        return message_bytes(own), message_bytes(uploads[0].message)

    traffic = [measure(phase) for phase in (ALIGN, JOINT, LOSSES)]
    assert traffic == [(model + 8, part), (part + 8, model), (model + 8, 8)]
    assert [measure(phase) for phase in (ALIGN, JOINT, LOSSES)] == [(8, part), (part + 8, model), (model + 8, 8)]


def test_an_average_that_nobody_uses_does_not_travel(parts, monkeypatch):
    """Without anchors, clients that keep their own alignment modules train as if they had got the average."""

    def play():
        p = parts(anchors=False)
        travelled = []
        for phase in (ALIGN, JOINT, LOSSES) * 2:
            sent, uploads = p.exchange(phase)
            travelled.append((message_bytes(sent.get(0, sent)), message_bytes(uploads[0].message)))
        return p.server.state, travelled

    state, travelled = play()
    assert [up for _, up in travelled[0::3]] == [0, 0]
    assert [down for down, _ in travelled[1::3]] == [8, 8]  # the client's weight alone
    monkeypatch.setattr(FedDRA, "averaged", True)
    before, after = play()
    assert after[0][1] == after[1][0] - 8 > 1000
    assert [row[1] for row in after[1::3]] == [row[1] for row in travelled[1::3]]
    assert all(torch.equal(state[name], before[name]) for name in ("parameters", "weights"))


@pytest.mark.parametrize(("options", "averaged"), [
    ({"anchors": False}, False),
    ({"anchors": False, "joint_start": "average"}, True),
    ({"anchors": False, "stage_schedule": "sequential"}, True),
    ({}, True),
])  # fmt: skip
def test_when_the_average_of_the_first_stage_is_of_use(options, averaged):
    assert FedDRA(FedDRA.Options.parse(options)).averaged == averaged


@pytest.mark.sampled(1)
@pytest.mark.parametrize("eval_every", [1, 2])
def test_a_run_logs_weights_and_losses_and_keeps_them(eval_every, make_pairs, make_config, tmp_path):
    config = make_config(
        "feddra", **SETTINGS, rounds=2, client_test=0.2, eval_every=eval_every, options={"alignment_steps": 1}
    )
    summary = run(config, out=tmp_path, data=make_pairs())
    records = read_metrics(tmp_path)
    stored = Checkpoints(tmp_path).last_server_state()["weights"]
    assert [set(record["clients"]["0"]) >= {"weight", "own_loss"} for record in records] == [True, True]
    assert sum(records[1]["clients"][k]["weight"] for k in "012") == pytest.approx(1)
    assert records[1]["clients"]["0"]["weight"] != pytest.approx(1 / 3, abs=1e-6)
    assert float(stored.max()) == summary["metrics"]["largest_weight"]
    metrics = summary["metrics"]
    assert metrics["worst_client_loss"] >= metrics["mean_client_loss"]
    assert metrics["robust_worst_loss"] == max(c["own_loss"] for c in records[1]["clients"].values())
    assert {"train/alignment", "train/joint", "train/losses"} <= set(summary["phases"])
    exchanges = summary["bytes"]["exchanges"]
    assert exchanges["joint"]["up"] > exchanges["alignment"]["up"] > exchanges["losses"]["up"] == 2 * 3 * 8
    assert sum(e["up"] for e in exchanges.values()) == summary["bytes"]["up"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("options", [
    {"stages": "one", "anchors": False, "dro": False},
    {"anchors": False},
    {"stage_schedule": "sequential", "dro_apply": "loss"},
    {"weighting": "samples", "loss_split": "train", "rho": 0.0},
])  # fmt: skip
def test_variants_run(options, make_pairs, make_config, tmp_path):
    config = make_config(
        "feddra", **SETTINGS, rounds=2, sample_fraction=0.67, options={"alignment_steps": 1, **options}
    )
    metrics = run(config, out=tmp_path, data=make_pairs())["metrics"]
    assert 0 <= metrics["i2t_r1"] <= 1
