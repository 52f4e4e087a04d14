"""FuseFL: its levels, traffic and refusals, and the invariants of docs/methods/fusefl.md, section 9."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedkern.downstream.saved_network import read_model
from fedkern.engine import client as engine_client
from fedkern.engine.rounds.ledger import message_bytes
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import METHODS, FuseFL, Phase
from fedkern.methods.fusefl.method import base_width, scaled_width, tensors_of
from fedkern.models import Ensemble, build
from fedkern.models.blocks import BlockNetwork, cut_network
from fedkern.models.cost import stored_bytes
from fedkern.models.fused import FusedNetwork
from fedkern.settings.config import RunConfig
from python_tests.methods.fusefl_play import PLAIN, Play, config_of, equal, flat

# -- invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("final", ["mean", "concat"])
def test_one_block_is_the_ensemble_of_locally_trained_networks(final, make_data, make_config, tmp_path):
    data = make_data()
    config = config_of(make_config, {"blocks": 1, "calibrate": False, "width": "2", "final_fuse": final})
    run(config, out=tmp_path / "fused", data=data)
    local = make_config("local", **{**PLAIN, "rounds": 1}, width=2)
    run(local, out=tmp_path / "local", data=data)
    fused, members = read_model(tmp_path / "fused")[0], read_model(tmp_path / "local")[0].members
    x = torch.randn(5, 3, 8, 8)
    ensemble = Ensemble(list(members), pool=final)
    torch.testing.assert_close(fused.features(x), ensemble.features(x), rtol=1e-5, atol=1e-6)
    head = ensemble.joint_head()
    torch.testing.assert_close(fused(x), head(ensemble.features(x)), rtol=1e-5, atol=1e-6)
    if final == "concat":
        torch.testing.assert_close(fused(x), ensemble(x), rtol=1e-5, atol=1e-6)  # the mean of the members' logits


def test_frozen_levels_keep_their_bits(make_data, make_config):
    for mode in ("owner", "batch"):
        play = Play(config_of(make_config, {"blocks": 3, "frozen_bn": mode, "width": "2"}), make_data())
        kept = {}
        for number, entry in enumerate(play.method.rounds(play.context.federation)):
            play.round(number, entry.name)
            for level, before in kept.items():
                assert equal(play.server.state["levels"][level], before)
            kept = copy.deepcopy(play.server.state["levels"])
        for client in play.clients.values():  # what they keep is what the server has, parameters and buffers
            assert equal(client.state["levels"], {i: kept[i] for i in (1, 2)})
        for k, own in kept[1].items():
            assert equal(own, play.up[0][k])
        assert any("running_mean" in name for name in flat(kept))


def test_order_of_clients_changes_nothing(make_data, make_config):
    config = config_of(make_config, {"blocks": 2, "width": "2"})
    ordered = Play(config, make_data()).go()
    reordered = Play(config, make_data(), order=(2, 0, 1), backwards=True).go()
    assert equal(ordered.server.state["levels"], reordered.server.state["levels"])
    x = torch.randn(4, 3, 8, 8)
    a, b = ordered.method.model(ordered.server), reordered.method.model(reordered.server)
    assert torch.equal(a.features(x), b.features(x))
    torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-4)  # statistics are summed in order of arrival


def test_what_a_client_trains_is_the_fused_network_before_it_is_fused(make_data, make_config):
    """A client computes level 2's features from its own part, and they equal its branch of the fused level 2."""
    play = Play(config_of(make_config, {"blocks": 2, "width": "2", "calibrate": False}), make_data()).go()
    model = play.method.model(play.server)
    x = torch.randn(4, 3, 8, 8)
    joined = model.levels[0](x)
    for k, pair in play.server.state["levels"][2].items():
        network = cut_network(play.clients[k].network(width=2), 2)
        network.blocks[1].load_state_dict(pair["block"])
        conv = nn.Conv2d(joined.shape[1], joined.shape[1] // 3, 1)
        conv.load_state_dict(pair["adaptor"])
        own = network.blocks[1].eval()(conv(joined))
        torch.testing.assert_close(model.levels[1](joined).chunk(3, 1)[k], own, rtol=1e-4, atol=1e-5)


# -- plan and bytes ------------------------------------------------------------------------------------------------


def test_the_budget_is_divided_and_the_first_levels_get_the_rest():
    method = FuseFL(FuseFL.Options(blocks=3))
    assert [method.epochs(level, 8) for level in (1, 2, 3)] == [3, 3, 2]
    assert [method.epochs(level, 3) for level in (1, 2, 3)] == [1, 1, 1]
    assert [entry.name for entry in method.rounds(None)] == ["level1", "level2", "level3", "calibrate"]
    assert [entry.name for entry in FuseFL(FuseFL.Options(calibrate=False)).rounds(None)] == ["level1", "level2"]


def test_every_byte_is_accounted_for(make_data, make_config, tmp_path):
    config = config_of(make_config, {"blocks": 3, "width": "2"})
    summary = run(config, out=tmp_path, data=make_data())
    play = Play(config, make_data()).go()
    found, clients = summary["metrics"], 3
    assert summary["bytes"]["up"] == sum(message_bytes(m) for level in play.up for m in level.values())
    assert summary["bytes"]["down"] == sum(message_bytes(m) for level in play.down for m in level.values())
    names = ("level1", "level2", "level3", "calibrate")
    for direction, travelled in (("up", play.up), ("down", play.down)):
        for name, level in zip(names, travelled, strict=True):
            assert found[f"{name}_{direction}_bytes"] == sum(message_bytes(m) for m in level.values()) / clients
    # A client's uploads are its network and its adaptors; what it gets are the others'.
    network = cut_network(build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2), 3)
    adaptors = [4 * (3 * c * c + c) for c in (2, 4)]
    assert found["levels_up_bytes"] == message_bytes(network.state_dict()) + sum(adaptors)
    ups = [found[f"{name}_up_bytes"] for name in names[:3]]
    head = message_bytes(network.head.state_dict())
    assert found["level1_down_bytes"] == 3 * 8  # numbers: a width, epochs, epochs before
    assert found["level2_down_bytes"] == 2 * ups[0] + 3 * 8
    assert found["level3_down_bytes"] == 2 * ups[1] + 3 * 8
    assert found["calibrate_down_bytes"] == 2 * (ups[2] - head) + 8
    fused, _ = read_model(tmp_path)
    fused.plain_head = None  # kept for comparison only
    assert found["parameters"] == sum(p.numel() for p in fused.parameters())
    single = build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2)
    blocks = message_bytes(network.state_dict()) - head
    assert found["memory_ratio"] == (3 * (blocks + sum(adaptors)) + head) / message_bytes(single.state_dict())
    assert found["model_bytes"] == message_bytes(single.state_dict())


def test_the_learning_rate_steps_at_the_epochs_of_the_whole_run(make_data, make_config, monkeypatch):
    """Five epochs over two levels are three and two, so the fourth epoch of the run begins level two."""
    seen = []
    real = engine_client.train_async

    def spy(client, method, phase, network, data, received, schedule, *arguments, **options):
        seen.append([schedule.lr_at(epoch) for epoch in range(schedule.epochs)])
        return real(client, method, phase, network, data, received, schedule, *arguments, **options)

    monkeypatch.setattr(engine_client, "train_async", spy)
    config = config_of(make_config, {"blocks": 2, "width": "2"}, local_epochs=5, lr=0.5, lr_steps="2,3")
    play = Play(config, make_data())
    play.order = [0]
    play.round(0, "level1")
    play.order = [0]
    play.round(1, "level2")
    assert [pytest.approx(rates) for rates in seen] == [[0.5, 0.5, 0.05], [0.005, 0.005]]


def test_the_record_of_every_level_and_both_accuracies(make_data, make_config, tmp_path):
    run(config_of(make_config, {"blocks": 2, "width": "2"}), out=tmp_path, data=make_data())
    level, second, third = read_metrics(tmp_path)
    assert not any("accuracy" in name for name in level)
    assert second["id_accuracy"] == third["id_uncalibrated_accuracy"]
    assert third["id_loss"] != second["id_loss"]


@pytest.mark.parametrize(
    ("option", "model", "clients", "width"),
    [("auto", "resnet18", 5, 29), ("auto", "resnet18", 10, 20), ("auto", "resnet18", 50, 9), ("7", "resnet18", 5, 7)],
)
def test_widths(option, model, clients, width):
    network = build(model, classes=10, channels=3, image_size=32, seed=0)
    assert scaled_width(option, network, clients) == width


@pytest.mark.parametrize("name", ["cnn", "resnet8", "mlp", "vit-tiny", "mobilenetv2", "efficientnet-b0"])
def test_the_base_width_is_read_from_the_network(name):
    assert base_width(build(name, classes=2, channels=3, image_size=16, seed=0, width=8)) == 8


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("settings", "options"), [
    ({"model": "mlp", "width": 6}, {"blocks": 3, "ccvr_compat": True}),
    ({"model": "resnet8"}, {"blocks": 5, "adaptor": "avg", "final_fuse": "sum"}),
    ({"model": "resnet8"}, {"blocks": 3, "adaptor": "sum", "covariance": "diagonal"}),
    ({"model": "vit-tiny", "width": 4, "local_epochs": 2}, {"blocks": 2, "adaptor_init": "random"}),
    ({"model": "resnet8"}, {"blocks": 2, "final_fuse": "concat"}),
    ({"model": "cnn"}, {"models": "resnet18,resnet10", "blocks": 2, "width": "1", "frozen_bn": "batch"}),
])  # fmt: skip
def test_it_runs_and_comes_back(settings, options, make_data, make_config, tmp_path):
    config = config_of(make_config, options, **{"local_epochs": 5, **settings})
    summary = run(config, out=tmp_path, data=make_data())
    model, _ = read_model(tmp_path)
    assert 0 <= summary["metrics"]["id_accuracy"] <= 1
    assert "id_uncalibrated_accuracy" in summary["metrics"]
    logits = model(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()
    adaptors = [name for name in flat(Play(config, make_data()).server.state) if "adaptor" in name]
    assert not adaptors


def test_only_cnn1x1_adaptors_travel(make_data, make_config):
    for kind in ("avg", "sum", "cnn1x1"):
        play = Play(config_of(make_config, {"blocks": 2, "width": "2", "adaptor": kind}), make_data())
        play.round(0, "level1")
        play.round(1, "level2")
        assert ("adaptor" in play.up[1][0]) == (kind == "cnn1x1")
        assert "head" in play.up[1][0]
        assert "head" not in play.up[0][0]


def test_statistics_of_frozen_levels(make_data, make_config):
    """Batch statistics leave no trace.

    As in the released code, the statistics of the last client stay.
    """
    models = {}
    for mode in ("owner", "batch", "code"):
        play = Play(config_of(make_config, {"blocks": 2, "frozen_bn": mode, "width": "2"}), make_data()).go()
        models[mode] = play
    owner, batch, code = (models[mode].server.state for mode in ("owner", "batch", "code"))
    assert equal(owner["levels"][1], batch["levels"][1])
    assert equal(owner["levels"][1], code["levels"][1])
    assert not equal(owner["levels"][2], batch["levels"][2])
    assert "statistics" not in batch
    last = models["code"].up[1][2]["statistics"]
    assert equal(code["statistics"], last)
    model = models["code"].method.model(models["code"].server)
    found = model.levels[0].statistics()
    for k in range(3):
        assert equal(found[k], last[1][k])
        assert not equal(found[k], {name: owner["levels"][1][k]["block"][name] for name in found[k]})


def test_features_are_kept_where_images_are_not_augmented(make_data, make_config, monkeypatch):
    play = Play(config_of(make_config, {"blocks": 2, "width": "2"}), make_data())
    play.round(0, "level1")
    sent = play.method.send(play.server, Phase(1, "level2", "update"))
    joined, prepare, asked = FusedNetwork.run_levels, FuseFL.prepare, []

    def spy(method, model, batch, received):
        found = prepare(method, model, batch, received)
        torch.testing.assert_close(found["inputs"], joined(model.frozen, batch.inputs), rtol=1e-4, atol=1e-5)
        return found

    monkeypatch.setattr(FuseFL, "prepare", spy)
    monkeypatch.setattr(FusedNetwork, "run_levels", lambda network, x: asked.append(len(x)) or joined(network, x))
    message, samples = {**sent[0], "epochs": 2}, play.clients[0].samples
    play.method.client_update(play.clients[0], Phase(1, "level2", "update"), message)
    assert sum(asked) == samples
    monkeypatch.setattr("fedkern.methods.common.frozen.CACHE_BYTES", 0)
    play.method.client_update(play.clients[0], Phase(1, "level2", "update"), message)
    assert sum(asked) == 3 * samples


@pytest.mark.exhaustive
def test_fifty_clients(make_data, make_config, tmp_path):
    config = config_of(make_config, {"blocks": 2}, clients=50, local_epochs=2, width=16)
    summary = run(config, out=tmp_path, data=make_data(sizes=(3,) * 50))
    model, _ = read_model(tmp_path)
    assert [level.count for level in model.levels] == [50, 50]
    # 50 networks of width 2, and an adaptor from 50 x 4 to 4 channels at each.
    network = cut_network(build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2), 2)
    own = sum(p.numel() for block in network.blocks for p in block.parameters())
    head = sum(p.numel() for p in network.head.parameters())
    assert summary["metrics"]["parameters"] == 50 * (own + 50 * 4 * 4 + 4) + head
    ordinary = stored_bytes(build("cnn", classes=3, channels=3, image_size=8, seed=0, width=16))
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert stored == pytest.approx(summary["metrics"]["memory_ratio"] * ordinary, rel=0.03)


# -- fusefl uploads ----------------------------------------------------------------------------------------------------


# -- uploads that cannot be used -----------------------------------------------------------------------------------


def tampering(level, change, client=1):
    class Tampering(FuseFL):
        def client_update(self, place, phase, message):
            upload = super().client_update(place, phase, message)
            if phase.name == level and place.id == client:
                change(upload)
            return upload

    return Tampering


def nan(upload):
    upload["block"] = {name: value * torch.nan if value.is_floating_point() else value
                       for name, value in upload["block"].items()}  # fmt: skip


def shape(upload):
    name = next(iter(upload["block"]))
    upload["block"] = {**upload["block"], name: upload["block"][name][:1]}


def missing(upload):
    del upload["adaptor"]


def statistics(upload):
    upload["means"] = upload["means"] * torch.inf


@pytest.mark.sampled(1)
@pytest.mark.parametrize("final", ["mean", "concat"])
@pytest.mark.parametrize(("level", "change", "said"), [
    ("level1", nan, r"round 1 \(\"level1\"\) holds NaN or infinite values in block\.0\.0\.weight"),
    ("level2", shape, r"Client 1's upload in round 2 \(\"level2\"\) has block\..* of shape \[1, .* are expected"),
    ("level2", missing, r"Client 1's upload in round 2 \(\"level2\"\) lacks adaptor"),
    ("calibrate", statistics, r"round 3 \(\"calibrate\"\) holds NaN or infinite values in means"),
])  # fmt: skip
def test_bad_uploads_are_named_or_left_out(level, change, said, final, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fusefl", tampering(level, change))
    options = {"blocks": 2, "width": "2", "final_fuse": final}
    with pytest.raises(UserError, match=said + r".*--on-nan skip"):
        run(config_of(make_config, options), out=tmp_path / "stop", data=make_data())
    counts = {"level1": [2, 3], "level2": [3, 2], "calibrate": [3, 3]}[level]
    summary = run(config_of(make_config, options, on_nan="skip"), out=tmp_path / "skip", data=make_data())
    assert list(summary["diagnostics"]).count("refused-upload-1") == 1
    model, _ = read_model(tmp_path / "skip")
    assert [own.count for own in model.levels] == counts
    assert torch.isfinite(model(torch.randn(2, 3, 8, 8))).all()


def test_no_statistics_left_is_an_error(make_data, make_config):
    play = Play(config_of(make_config, {"width": "2"}, on_nan="skip"), make_data())
    play.round(0, "level1")
    play.round(1, "level2")
    with pytest.raises(UserError, match="class statistics of every client were refused"):
        play.method.server_update(play.server, Phase(2, "calibrate", "update"), iter([]))


def test_a_backdoored_block_is_one_branch_and_touches_no_other(make_data, make_config):
    """The block has the right shape and is finite, so it is accepted, but other clients' blocks stay the same."""
    config, data = config_of(make_config, {"blocks": 2, "width": "2"}), make_data()
    honest, attacked = Play(config, data), Play(config, data)
    honest.round(0, "level1")

    def flip(upload):
        flipped = {name: -value for name, value in upload["block"].items() if name.endswith("weight")}
        upload["block"] = {**upload["block"], **flipped}

    attacked.method = tampering("level1", flip)(attacked.method.options)
    attacked.go()
    good, bad = honest.server.state["levels"][1], attacked.server.state["levels"][1]
    assert [k for k in range(3) if not equal(good[k], bad[k])] == [1]
    assert torch.isfinite(attacked.method.model(attacked.server)(torch.randn(2, 3, 8, 8))).all()


def test_a_client_that_diverges_at_one_level_takes_part_in_the_next(make_data, make_config, tmp_path, monkeypatch):
    class Bomb(FuseFL):
        def loss(self, model, batch, received):
            value = super().loss(model, batch, received)
            return value * torch.nan if received.samples == 13 and received.phase.name == "level2" else value

    monkeypatch.setitem(METHODS, "fusefl", Bomb)
    config = config_of(make_config, {"blocks": 3, "width": "2"}, on_nan="skip")
    summary = run(config, out=tmp_path, data=make_data())
    model, _ = read_model(tmp_path)
    assert [level.count for level in model.levels] == [3, 2, 3]
    assert "diverging-client" in summary["diagnostics"]


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"local_epochs": 1}, {}, "--local-epochs 1 cannot be divided over 2 levels"),
        ({}, {"blocks": 5, "width": "2"}, "3 layers and a pooling and can be cut into 1 to 4 blocks, not 5"),
        ({}, {"width": "half"}, '"width" must be auto or a number from 1, not "half"'),
        ({}, {"models": "cnn,resnet8", "width": "2"}, r"Block 1 of client 1 gives .* and that of client 0"),
        # As wide as each other (16 channels over the root of 3 clients), but not cut at the same places.
        ({}, {"models": "resnet8,resnet10"}, r"gives \[18, .* of client 0 \[9, .* take networks of one kind"),
        ({}, {"models": "cnn,renset8"}, '"models": there is no model "renset8".*Did you mean'),
    ],
)
def test_mistakes_are_named_first(settings, options, said, make_data, make_config, refuses, tmp_path):
    with refuses(said, "new"):
        run(config_of(make_config, options, **settings), out=tmp_path / "new", data=make_data())


def test_a_client_with_one_sample(make_data, make_config, tmp_path):
    """Batch norm over many positions can handle one sample.

    Over one position (an MLP's) it cannot, and one sentence says so.
    """
    data, options = make_data(sizes=(1, 9, 8)), {"blocks": 2, "width": "2"}
    summary = run(config_of(make_config, options, local_epochs=2), out=tmp_path / "cnn", data=data)
    assert 0 <= summary["metrics"]["id_accuracy"] <= 1
    assert [level.count for level in read_model(tmp_path / "cnn")[0].levels] == [3, 3]
    with pytest.raises(UserError, match="Client 0 has a single training sample, and batch norm cannot normalise"):
        run(config_of(make_config, options, model="mlp", local_epochs=2), out=tmp_path / "mlp", data=data)
    config = config_of(make_config, options, model="mlp", local_epochs=2, batch_size=1)
    with pytest.raises(UserError, match="Client 0 trains on one sample at a time, and batch norm"):
        run(config, out=tmp_path / "batches", data=make_data())


def test_blocks_of_the_users_own(make_data, make_config, tmp_path, monkeypatch):
    class Own(FuseFL):
        gap = 4

        def network(self, place, client, widths):
            generator = torch.Generator().manual_seed(0)
            front = nn.Conv2d(3, 4, 3, padding=1)
            second = nn.Sequential(nn.Conv2d(self.gap, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            made = BlockNetwork([front, second], nn.Linear(6, 3))
            for p in made.parameters():
                nn.init.normal_(p, std=0.2, generator=generator)
            return made

    monkeypatch.setitem(METHODS, "fusefl", Own)
    run(config_of(make_config), out=tmp_path / "good", data=make_data())
    assert [level.count for level in read_model(tmp_path / "good")[0].levels] == [3, 3]
    with pytest.raises(UserError, match="network has 2 blocks, but the method option blocks says 3"):
        run(config_of(make_config, {"blocks": 3}), out=tmp_path / "more", data=make_data())
    monkeypatch.setattr(Own, "gap", 5)
    with pytest.raises(UserError, match=r"Block 2 cannot take what block 1 gives, .* its first layer takes 5 channels"):
        run(config_of(make_config), out=tmp_path / "bad", data=make_data())


def test_the_method_alone_is_a_sensible_run():
    config = RunConfig.make("fusefl")
    assert config.data == "digits"
    assert config.local_epochs >= FuseFL.Options().blocks


def test_state_dicts_travel_contiguous():
    block = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    sent = tensors_of(block)
    assert sent["weight"].is_contiguous()
    assert torch.equal(sent["weight"], block.weight)
