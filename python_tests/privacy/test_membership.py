"""The membership attack: against the definitions, and on models that are known to remember or not."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkern import engine, models
from fedkern.cli import commands, flags
from fedkern.data import FederatedData, PartitionStatistics, Split, normalise
from fedkern.engine import RunConfig, attacking, saved
from fedkern.errors import UserError
from fedkern.privacy import membership_attack


def brute(x, y):
    """The area and DeLong's variance from the kernel of every pair, as the paper writes them."""
    psi = [[1.0 if a < b else 0.5 if a == b else 0.0 for b in y] for a in x]
    psi = np.array(psi)
    v10, v01 = psi.mean(1), psi.mean(0)
    return psi.mean(), v10.var(ddof=1) / len(x) + v01.var(ddof=1) / len(y)


@pytest.mark.parametrize("levels", [4, 1000])  # many ties, hardly any
def test_area_and_interval_are_those_of_all_pairs(levels):
    rng = np.random.default_rng(levels)
    x, y = rng.integers(0, levels, 37) * 1.0, rng.integers(0, levels, 23) * 1.2
    found = membership_attack(torch.from_numpy(x), torch.from_numpy(y))
    auc, variance = brute(x, y)
    assert found.auc == pytest.approx(auc, rel=1e-12)
    assert found.high - found.auc == pytest.approx(1.959963985 * math.sqrt(variance), rel=1e-9)
    assert found.auc - found.low == pytest.approx(found.high - found.auc, rel=1e-9)
    assert (found.members, found.others) == (37, 23)
    wider = membership_attack(torch.from_numpy(x), torch.from_numpy(y), confidence=0.99)
    assert wider.low < found.low < found.high < wider.high


def test_the_interval_covers_as_often_as_it_says():
    """Losses of two normal laws one deviation apart: the area is Phi(1 / sqrt(2))."""
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(0.5))
    hits = 0
    for _ in range(300):
        members, others = torch.from_numpy(rng.normal(0, 1, 60)), torch.from_numpy(rng.normal(1, 1, 80))
        found = membership_attack(members, others)
        hits += found.low <= truth <= found.high
    assert 0.91 <= hits / 300 <= 0.985


def test_true_positives_at_one_percent():
    others = torch.arange(100.0) + 10  # one of them may be called a member: the one with a loss of 10
    members = torch.tensor([1.0, 10.5, 10.9, 11.0, 50.0])
    found = membership_attack(members, others)
    assert found.tpr == pytest.approx(3 / 5)  # below 11, the second lowest of the others
    assert membership_attack(members, others[:50]).tpr == pytest.approx(1 / 5)  # of 50 none may be


def test_the_ends():
    low, high = torch.arange(5.0), torch.arange(5.0) + 10
    assert (membership_attack(low, high).auc, membership_attack(high, low).auc) == (1.0, 0.0)
    same = membership_attack(torch.ones(10), torch.ones(20))
    assert (same.auc, same.low, same.high, same.tpr) == (0.5, 0.5, 0.5, 0.0)
    infinite = membership_attack(torch.tensor([0.0, 1.0]), torch.tensor([2.0, math.inf]))
    assert infinite.auc == 1.0
    for members, others in (
        (torch.ones(1), torch.ones(3)),
        (torch.ones(3), torch.ones(3, 1)),
        (torch.tensor([0.0, math.nan]), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"members|others"):
            membership_attack(members, others)


def noise(samples, seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (samples, 1, 8, 8), generator=g).to(torch.uint8)
    return Split(images, torch.randint(0, 4, (samples,), generator=g))


@pytest.fixture(scope="module")
def data():
    """Images and labels that have nothing to do with each other: what is learnt is remembered."""
    clients = (noise(40, 1), noise(60, 2))
    statistics = PartitionStatistics.of([c.labels.numpy() for c in clients], tuple("abcd"), "iid")
    return FederatedData(
        "noise", tuple("abcd"), clients, noise(10, 3), {"": noise(300, 4)}, (0.5,), (0.3,), "none", statistics
    )


def release(folder, data, steps):
    """A run folder whose model was trained on both clients' images for so many steps."""
    model = models.build("mlp", classes=4, channels=1, image_size=8, seed=0, width=64)
    images = normalise(torch.cat([c.images for c in data.clients]), data.mean, data.std)
    labels = torch.cat([c.labels for c in data.clients])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    folder.mkdir()
    config = RunConfig.make("fedavg", data="digits", model="mlp", width=64, clients=2)
    (folder / "config.toml").write_text(config.to_toml())
    about = {"model": "mlp", "width": 64, "classes": list("abcd"), "channels": 1, "image_size": [8, 8]}
    saved.write_model(folder, model, about)
    return folder


def test_an_overfitted_model_tells_and_an_untrained_one_does_not(tmp_path, data):
    told = engine.attack(release(tmp_path / "trained", data, 40), data=data)
    assert told["low"] > 0.7
    assert told["member_loss"] < told["other_loss"]
    assert all(area > 0.7 for area in told["clients"])
    assert (told["members"], told["others"]) == (100, 300)
    assert json.loads((tmp_path / "trained" / "attack.json").read_text()) == told
    silent = engine.attack(release(tmp_path / "untrained", data, 0), data=data)
    assert silent["low"] <= 0.5 <= silent["high"]
    assert silent["tpr"] < 0.1


def test_pixels_count_as_one_record(data):
    class Constant(torch.nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 4, 8, 8)
            logits[:, 0] = 2.0
            return logits

    split = data.tests[""]
    labels = torch.zeros(300, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    half = dataclasses.replace(split, labels=labels)
    found = attacking.losses(Constant(), half, data)
    right, wrong = -math.log(math.exp(2) / (math.exp(2) + 3)), math.log(math.exp(2) + 3)
    assert found.shape == (300,)
    assert torch.allclose(found, torch.full((300,), (right + wrong) / 2, dtype=torch.float64))


class Sure(torch.nn.Module):
    """Answers class 0 everywhere, with so much confidence."""

    def __init__(self, confidence):
        super().__init__()
        self.confidence = confidence

    def forward(self, x):
        logits = torch.zeros(len(x), 4, 8, 8)
        logits[:, 0] = self.confidence
        return logits


def segmented(data, seed, n):
    """A split with labels of pixels: half an image of class 1, the rest of class 0."""
    labels = torch.zeros(n, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    return dataclasses.replace(noise(n, seed), labels=labels)


def test_unknown_pixels_count_nowhere(data):
    half = segmented(data, 4, 6)
    half.labels[:3, 4:] = -100  # what is wrong is unknown here
    half.labels[5] = -100
    found = attacking.losses(Sure(2.0), half, data)
    right, wrong = -math.log(math.exp(2) / (math.exp(2) + 3)), math.log(math.exp(2) + 3)
    expected = torch.tensor([right] * 3 + [(right + wrong) / 2] * 2, dtype=torch.float64)
    assert torch.allclose(found, expected)


def test_images_without_a_known_pixel_are_left_out_and_told(tmp_path, data, monkeypatch, capsys):
    clients = tuple(segmented(data, k, 5) for k in range(2))
    clients[1].labels[:2] = -100
    whole = dataclasses.replace(
        data, clients=clients, validation=segmented(data, 2, 3), tests={"": segmented(data, 3, 6)}
    )
    folder = release(tmp_path / "run", data, 0)
    monkeypatch.setattr(attacking, "read_model", lambda *_: (Sure(1.0), {}))
    found = engine.attack(folder, data=whole)
    assert (found["members"], found["others"], found["left_out"]) == (8, 6, 2)
    assert json.loads((folder / "attack.json").read_text()) == found
    monkeypatch.setattr(attacking, "load_data", lambda config, masks: whole)
    assert commands.COMMANDS["attack"](flags.parse(["attack", str(folder)])) == 0
    assert "images left out, without a known pixel" in capsys.readouterr().out
    complete = dataclasses.replace(whole, clients=(clients[0],))
    assert "left_out" not in engine.attack(folder, data=complete)


def test_an_infinite_loss_is_null_in_the_file_and_one_that_is_no_number_a_sentence(tmp_path, data, monkeypatch, capsys):
    folder = release(tmp_path / "run", data, 0)

    class Certain(torch.nn.Module):
        said = math.inf

        def forward(self, x):
            logits = torch.zeros(len(x), 4)
            logits[:, 1:] = -self.said
            return logits

    monkeypatch.setattr(attacking, "read_model", lambda *_: (Certain(), {}))
    monkeypatch.setattr(attacking, "load_data", lambda config, masks: data)
    found = engine.attack(folder, data=data)
    assert found["member_loss"] == math.inf
    stored = json.loads((folder / "attack.json").read_text())
    assert stored["member_loss"] is None
    assert stored["auc"] == found["auc"]
    assert commands.COMMANDS["attack"](flags.parse(["attack", str(folder), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["other_loss"] is None
    assert commands.COMMANDS["attack"](flags.parse(["attack", str(folder)])) == 0
    monkeypatch.setattr(Certain, "said", math.nan)
    with pytest.raises(UserError, match=r"The model of .*run has losses that are not numbers .*lower learning rate"):
        engine.attack(folder, data=data)


def test_a_single_image_is_too_few_to_compare(tmp_path, data):
    folder = release(tmp_path / "run", data, 0)
    one = dataclasses.replace(data, tests={"": noise(1, 9)})
    with pytest.raises(UserError, match=r"run has 1 test images with known answers: attack a run on more data"):
        engine.attack(folder, data=one)
    with pytest.raises(UserError, match=r"run has 1 training samples with known answers"):
        engine.attack(folder, data=dataclasses.replace(data, clients=(noise(1, 9),)))


def test_the_command(tmp_path, data, monkeypatch, capsys):
    folder = release(tmp_path / "run", data, 40)
    monkeypatch.setattr(attacking, "load_data", lambda config, masks: data)
    assert commands.COMMANDS["attack"](flags.parse(["attack", str(folder), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["auc"] > 0.7
    assert commands.COMMANDS["attack"](flags.parse(["attack", str(folder)])) == 0
    assert "area under the ROC curve" in capsys.readouterr().out
    for words, sentence in (
        (["attack"], "needs the folder of a finished run"),
        (["attack", str(folder), "--lr", "1"], "takes no other flags than --json, --data-root"),
        (["attack", str(folder), "again"], 'Unexpected word "again"'),
        (["list", str(folder)], "Unexpected word"),
    ):
        with pytest.raises(UserError, match=sentence):
            flags.parse(words)
    with pytest.raises(UserError, match="is not a run folder"):
        commands.COMMANDS["attack"](flags.parse(["attack", str(tmp_path)]))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its run is not finished"):
        commands.COMMANDS["attack"](flags.parse(["attack", str(folder)]))


def test_what_a_run_set_aside_was_never_trained_on(tmp_path, data):
    folder = release(tmp_path / "run", data, 3)
    whole = engine.attack(folder, data=data)
    assert whole["members"] == 100
    config = RunConfig.load(folder)
    (folder / "config.toml").write_text(config.replace(client_test=0.25).to_toml())
    assert engine.attack(folder, data=data)["members"] == 75
    (folder / "config.toml").write_text(config.replace(held_out_client=0).to_toml())
    found = engine.attack(folder, data=data)
    assert (found["members"], len(found["clients"])) == (60, 1)
    assert found["clients"][0] == pytest.approx(whole["clients"][1])
