"""FuseFL's refusals: unusable uploads, and users' mistakes."""

import pytest
import torch
from torch import nn

from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import METHODS, FuseFL, Phase
from fedkern.methods.fusefl.levels import tensors_of
from fedkern.models.blocks import BlockNetwork
from fedkern.settings.config import RunConfig
from python_tests.methods.fusefl_play import Play, config_of, equal

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
