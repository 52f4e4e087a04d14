"""FuseFL: its levels, what travels, and the invariants of section 7 of the method notes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedkern.engine import RunConfig, read_metrics, read_model, run
from fedkern.engine.bench import Bench
from fedkern.engine.ledger import message_bytes
from fedkern.engine.serial import Client, Server
from fedkern.errors import UserError
from fedkern.methods import METHODS, FuseFL, Step, Upload
from fedkern.methods.fusefl_levels import LocalPart, base_width, flat, scaled_width, size, tensors_of
from fedkern.models import Ensemble, build
from fedkern.models.blocks import BlockNetwork, cut

PLAIN = {"model": "cnn", "local_epochs": 3, "grad_cam": 0, "rounds": None}


def config_of(make_config, options=None, **settings):
    return make_config("fusefl", **{**PLAIN, **settings, "options": {"virtual_features": 20, **(options or {})}})


class Play:
    """A run by hand: the method, its server and clients, and what travelled."""

    def __init__(self, config, data, order=None, backwards=False):
        self.bench = Bench(config, data)
        self.method = FuseFL(FuseFL.Options.parse(config.options))
        self.server = Server(self.bench)
        self.clients = {k: Client(self.bench, k, {}) for k in range(config.clients)}
        self.order = list(order or self.clients)
        self.backwards = backwards
        self.down, self.up = [], []
        self.method.start(self.server)

    def round(self, number, name):
        step = Step(number, name, "update")
        sent = self.method.send(self.server, step)
        answers = {k: self.method.client_update(self.clients[k], step, sent[k]) for k in self.order}
        self.down.append(sent)
        self.up.append({k: copy.deepcopy(answers[k]) for k in sorted(answers)})
        order = sorted(answers, reverse=self.backwards)
        uploads = (Upload(k, self.bench.federation.samples[k], answers[k]) for k in order)
        self.method.server_update(self.server, step, uploads)

    def go(self):
        for number, entry in enumerate(self.method.rounds(self.bench.federation)):
            self.round(number, entry.name)
        return self


def equal(a, b) -> bool:
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- invariants ----------------------------------------------------------------------------------------------------


def test_one_block_is_the_ensemble_of_locally_trained_networks(make_data, make_config, tmp_path):
    data = make_data()
    config = config_of(make_config, {"blocks": 1, "calibrate": False, "width": "2"})
    run(config, out=tmp_path / "fused", data=data)
    alone = make_config("local", **{**PLAIN, "rounds": 1}, width=2)
    run(alone, out=tmp_path / "local", data=data)
    fused, members = read_model(tmp_path / "fused")[0], read_model(tmp_path / "local")[0].members
    x = torch.randn(5, 3, 8, 8)
    ensemble = Ensemble(list(members), pool="mean")
    torch.testing.assert_close(fused.features(x), ensemble.features(x), rtol=1e-5, atol=1e-6)
    head = ensemble.joint_head()
    torch.testing.assert_close(fused(x), head(ensemble.features(x)), rtol=1e-5, atol=1e-6)


def test_frozen_levels_keep_their_bits(make_data, make_config):
    for mode in ("owner", "batch"):
        play = Play(config_of(make_config, {"blocks": 3, "frozen_bn": mode, "width": "2"}), make_data())
        kept = {}
        for number, entry in enumerate(play.method.rounds(play.bench.federation)):
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
    one = Play(config, make_data()).go()
    other = Play(config, make_data(), order=(2, 0, 1), backwards=True).go()
    assert equal(one.server.state["levels"], other.server.state["levels"])
    x = torch.randn(4, 3, 8, 8)
    a, b = one.method.model(one.server), other.method.model(other.server)
    assert torch.equal(a.features(x), b.features(x))
    torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-4)  # statistics are summed in order of arrival


def test_what_a_client_trains_is_the_fused_network_before_it_is_fused(make_data, make_config):
    """Level 2's features at a client, from its own part, are its branch of the fused level 2."""
    play = Play(config_of(make_config, {"blocks": 2, "width": "2", "calibrate": False}), make_data()).go()
    model = play.method.model(play.server)
    x = torch.randn(4, 3, 8, 8)
    joined = model.levels[0](x)
    for k, pair in play.server.state["levels"][2].items():
        network = cut(play.clients[k].network(width=2), 2)
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
            assert found[f"{name}_{direction}_bytes"] == sum(size(m) for m in level.values()) / clients
    # A client's uploads are its network and its adaptors; what it gets are the others'.
    network = cut(build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2), 3)
    adaptors = [4 * (3 * c * c + c) for c in (2, 4)]
    assert found["levels_up_bytes"] == size(network.state_dict()) + sum(adaptors)
    ups = [found[f"{name}_up_bytes"] for name in names[:3]]
    head = size(network.head.state_dict())
    assert found["level2_down_bytes"] == 2 * ups[0]
    assert found["level3_down_bytes"] == 2 * ups[1]
    assert found["calibrate_down_bytes"] == 2 * (ups[2] - head)
    fused, _ = read_model(tmp_path)
    fused.plain_head = None  # kept for comparison only
    assert found["parameters"] == sum(p.numel() for p in fused.parameters())
    whole = build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2)
    assert found["memory_ratio"] == found["parameters"] / sum(p.numel() for p in whole.parameters())
    assert found["model_bytes"] == size(whole.state_dict())


def test_the_record_of_every_level_and_both_accuracies(make_data, make_config, tmp_path):
    run(config_of(make_config, {"blocks": 2, "width": "2"}), out=tmp_path, data=make_data())
    first, second, third = read_metrics(tmp_path)
    assert not any("accuracy" in name for name in first)
    assert second["id_accuracy"] == third["id_uncalibrated_accuracy"]
    assert third["id_loss"] != second["id_loss"]


@pytest.mark.parametrize(
    ("option", "model", "clients", "width"),
    [("auto", "resnet18", 5, 29), ("auto", "resnet18", 10, 20), ("auto", "resnet18", 50, 9), ("7", "resnet18", 5, 7)],
)
def test_widths(option, model, clients, width):
    network = build(model, classes=10, channels=3, image_size=32, seed=0)
    assert scaled_width(option, network, clients) == width


@pytest.mark.parametrize("name", ["cnn", "resnet8", "vgg16", "mlp", "vit-tiny", "mobilenetv2", "efficientnet-b0"])
def test_the_base_width_is_read_from_the_network(name):
    assert base_width(build(name, classes=2, channels=3, image_size=16, seed=0, width=8)) == 8


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"model": "resnet8"}, {"blocks": 5, "adaptor": "avg", "final_fuse": "sum"}),
        ({"model": "resnet8"}, {"cuts": "0,2", "adaptor": "sum", "covariance": "diagonal"}),
        ({"model": "vit-tiny", "width": 4, "local_epochs": 2}, {"blocks": 2, "adaptor_init": "random"}),
        ({"model": "mlp", "width": 6}, {"blocks": 3, "ccvr_compat": True}),
        ({"model": "cnn"}, {"models": "resnet18,resnet10", "blocks": 2, "width": "1", "frozen_bn": "batch"}),
    ],
)
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
    """Batch statistics leave no trace; as in the released code, those of the last client to train stay."""
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
    sent = play.method.send(play.server, Step(1, "level2", "update"))
    seen = []
    inputs = LocalPart.inputs

    def spy(part, batch):
        found = inputs(part, batch)
        (frozen,) = part._frozen
        with torch.no_grad():
            torch.testing.assert_close(found, frozen.joined(batch.images), rtol=1e-4, atol=1e-5)
        seen.append((part._rows is not None, bool(part._known.all())))
        return found

    monkeypatch.setattr(LocalPart, "inputs", spy)
    message = {**sent[0], "epochs": 2}
    play.method.client_update(play.clients[0], Step(1, "level2", "update"), message)
    assert seen[-1] == (True, True)
    monkeypatch.setattr("fedkern.methods.fusefl_levels.CACHE_BYTES", 0)
    play.method.client_update(play.clients[0], Step(1, "level2", "update"), message)
    assert seen[-1] == (False, False)


def test_fifty_clients(make_data, make_config, tmp_path):
    config = config_of(make_config, {"blocks": 2}, clients=50, local_epochs=2, width=16)
    summary = run(config, out=tmp_path, data=make_data(sizes=(3,) * 50))
    model, _ = read_model(tmp_path)
    assert [level.count for level in model.levels] == [50, 50]
    # 50 networks of width 2, and an adaptor from 50 x 4 to 4 channels at each.
    network = cut(build("cnn", classes=3, channels=3, image_size=8, seed=0, width=2), 2)
    own = sum(p.numel() for block in network.blocks for p in block.parameters())
    head = sum(p.numel() for p in network.head.parameters())
    assert summary["metrics"]["parameters"] == 50 * (own + 50 * 4 * 4 + 4) + head


# -- uploads that cannot be used -----------------------------------------------------------------------------------


def tampering(level, change, client=1):
    class Tampering(FuseFL):
        def client_update(self, place, step, message):
            upload = super().client_update(place, step, message)
            if step.name == level and place.id == client:
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


@pytest.mark.parametrize(
    ("level", "change", "said"),
    [
        ("level1", nan, r"Client 1's upload of level 1 holds NaN or infinite values in block\.0\.0\.weight"),
        ("level2", shape, r"Client 1's upload of level 2 has block\..* of shape \[1, .* are expected"),
        ("level2", missing, r"Client 1's upload of level 2 lacks adaptor\.bias"),
        ("calibrate", statistics, "Client 1's calibration upload is unusable: means .* finite"),
    ],
)
def test_bad_uploads_are_named_or_left_out(level, change, said, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "fusefl", tampering(level, change))
    options = {"blocks": 2, "width": "2"}
    with pytest.raises(UserError, match=said + r".*--on-nan skip"):
        run(config_of(make_config, options), out=tmp_path / "stop", data=make_data())
    summary = run(config_of(make_config, options, on_nan="skip"), out=tmp_path / "skip", data=make_data())
    assert list(summary["diagnostics"]).count("refused-upload-1") == 1
    model, _ = read_model(tmp_path / "skip")
    counts = {"level1": [2, 3], "level2": [3, 2], "calibrate": [3, 3]}[level]
    assert [own.count for own in model.levels] == counts
    assert torch.isfinite(model(torch.randn(2, 3, 8, 8))).all()


def test_nobody_left_is_an_error(make_data, make_config, tmp_path, monkeypatch):
    class Everybody(FuseFL):
        def client_update(self, place, step, message):
            upload = super().client_update(place, step, message)
            nan(upload)
            return upload

    monkeypatch.setitem(METHODS, "fusefl", Everybody)
    with pytest.raises(UserError, match="No client's block of level 1 could be used"):
        run(config_of(make_config, on_nan="skip"), out=tmp_path / "blocks", data=make_data())


def test_no_statistics_left_is_an_error(make_data, make_config):
    play = Play(config_of(make_config, {"width": "2"}, on_nan="skip"), make_data())
    play.round(0, "level1")
    play.round(1, "level2")
    with pytest.raises(UserError, match="No client's class statistics could be used"):
        play.method.server_update(play.server, Step(2, "calibrate", "update"), iter([Upload(0, 20, {})]))


def test_a_backdoored_block_is_one_branch_and_touches_no_other(make_data, make_config):
    """Right shape and finite: it cannot be told, but other clients' blocks of that level are what they were."""
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
            return value * torch.nan if received.samples == 13 and received.step.name == "level2" else value

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
        ({"local_epochs": 1}, {}, "1 local epochs cannot be divided over 2 levels"),
        ({}, {"blocks": 5, "width": "2"}, "3 layers and a pooling and can be cut into 1 to 4 blocks, not 5"),
        ({}, {"cuts": "1,x"}, '"cuts" must be numbers with commas between, not "1,x"'),
        ({}, {"cuts": "1,1"}, "not behind 1, 1"),
        ({}, {"width": "half"}, '"width" must be auto or a number from 1, not "half"'),
        ({}, {"models": "cnn,resnet8", "width": "2"}, r"Block 1 of client 1 gives .* and that of client 0"),
        # As wide as each other (16 channels over the root of 3 clients), but not cut at the same places.
        ({}, {"models": "resnet8,resnet10"}, r"gives \[18, .* of client 0 \[9, .* take networks of one kind"),
        ({}, {"models": "cnn,renset8"}, 'no model "renset8".*Did you mean'),
    ],
)
def test_mistakes_are_named_before_anything_is_written(settings, options, said, make_data, make_config, tmp_path):
    with pytest.raises(UserError, match=said):
        run(config_of(make_config, options, **settings), out=tmp_path / "new", data=make_data())
    assert not (tmp_path / "new").exists()


def test_blocks_of_the_users_own(make_data, make_config, tmp_path, monkeypatch):
    class Own(FuseFL):
        gap = 4

        def network(self, place, client, widths):
            generator = torch.Generator().manual_seed(0)
            first = nn.Conv2d(3, 4, 3, padding=1)
            second = nn.Sequential(nn.Conv2d(self.gap, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            made = BlockNetwork([first, second], nn.Linear(6, 3), out_channels=[4, 6])
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
