"""The membership attack: against the definitions, and on models that are known to memorise or not."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from fedkern import models
from fedkern.cli.command_parser import parse_words, play_request
from fedkern.data import FederatedData, PartitionStatistics, Split, normalise
from fedkern.data.forms import ImageForm
from fedkern.downstream import membership_attack as attacking
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.store import run_folder
from fedkern.errors import UserError
from fedkern.methods.fediod import method
from fedkern.privacy import membership, membership_attack
from fedkern.settings.config import RunConfig, load_settings
from fedkern.tasks import SEGMENTATION

FORM = ImageForm((1, 8, 8), (0.5,), (0.3,))


def by_groups(x, y, of_x, of_y):
    """Return the area and Obuchowski's variance, group by group, as in Biometrics 1997, section 2.

    With a group for every record the variance is DeLong's.
    """
    psi = np.array([[1.0 if a < b else 0.5 if a == b else 0.0 for b in y] for a in x])
    area, v10, v01 = psi.mean(), psi.mean(1), psi.mean(0)
    groups = sorted({*of_x, *of_y})
    a = np.array([sum(v - area for v, g in zip(v10, of_x, strict=True) if g == group) for group in groups])
    b = np.array([sum(v - area for v, g in zip(v01, of_y, strict=True) if g == group) for group in groups])
    m, n, all_ = len(set(of_x)), len(set(of_y)), len(groups)
    s10, s01 = m / ((m - 1) * len(x)) * (a**2).sum(), n / ((n - 1) * len(y)) * (b**2).sum()
    s11 = all_ / (all_ - 1) * (a * b).sum()
    return area, s10 / len(x) + s01 / len(y) + 2 * s11 / (len(x) * len(y))


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize("levels", [4, 1000])  # many ties, hardly any
def test_area_and_interval_are_those_of_all_pairs(levels, monkeypatch):
    rng = np.random.default_rng(levels)
    x, y = rng.integers(0, levels, 37) * 1.0, rng.integers(0, levels, 23) * 1.2
    found = membership_attack(torch.from_numpy(x), torch.from_numpy(y))
    auc, variance = by_groups(x, y, range(37), range(37, 60))
    assert found.auc == pytest.approx(auc, rel=1e-12)
    assert (found.members, found.others, found.member_groups, found.other_groups) == (37, 23, 37, 23)
    monkeypatch.setattr(membership, "_score_limit", lambda auc, *_: auc)  # DeLong's alone
    ungrouped = membership_attack(torch.from_numpy(x), torch.from_numpy(y))
    assert found.low <= ungrouped.low < ungrouped.high <= found.high
    half = 1.959963985 * math.sqrt(variance) / (auc * (1 - auc))
    assert logit(ungrouped.high) - logit(auc) == pytest.approx(half, rel=1e-9)
    assert logit(auc) - logit(ungrouped.low) == pytest.approx(half, rel=1e-9)


def test_with_groups_the_variance_is_that_of_clusters(monkeypatch):
    """Some groups have records of both kinds."""
    monkeypatch.setattr(membership, "_score_limit", lambda auc, *_: auc)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=40), rng.normal(0.5, size=30)
    of_x, of_y = rng.integers(0, 12, 40), rng.integers(8, 20, 30)
    found = membership_attack(*map(torch.from_numpy, (x, y)), groups=(torch.from_numpy(of_x), torch.from_numpy(of_y)))
    auc, variance = by_groups(x, y, of_x.tolist(), of_y.tolist())
    assert found.auc == pytest.approx(auc, rel=1e-12)
    half = 1.959963985 * math.sqrt(variance) / (auc * (1 - auc))
    assert logit(found.high) - logit(auc) == pytest.approx(half, rel=1e-9)
    assert (found.member_groups, found.other_groups) == (len(set(of_x.tolist())), len(set(of_y.tolist())))
    own = (torch.arange(40) + 7, torch.arange(30) + 50)
    ungrouped = membership_attack(*map(torch.from_numpy, (x, y)), groups=own)
    assert ungrouped == membership_attack(*map(torch.from_numpy, (x, y)))


def test_copies_of_a_record_say_nothing_more():
    """With groups, four copies of every record hardly narrow the interval.

    Without groups, the interval is that of four times as many records.
    """
    rng = np.random.default_rng(2)
    x, y = (torch.from_numpy(rng.normal(at, 1, n)) for at, n in ((0, 30), (1, 20)))
    once = membership_attack(x, y)
    copies = [values.repeat_interleave(4) for values in (x, y)]
    groups = (torch.arange(30).repeat_interleave(4), torch.arange(20).repeat_interleave(4) + 30)
    told, untold = membership_attack(*copies, groups=groups), membership_attack(*copies)
    for name in ("auc", "low", "high", "tpr_low", "tpr_high", "member_groups", "other_groups"):
        assert getattr(told, name) == pytest.approx(getattr(once, name), rel=1e-9)
    assert untold.high - untold.low < 0.6 * (told.high - told.low)
    assert untold.tpr_high - untold.tpr_low < 0.7 * (told.tpr_high - told.tpr_low)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("members", "strangers"), [(60, 80), (6, 5), (100, 10)])
@pytest.mark.parametrize("distance", [0.0, 1.0, 3.0])
def test_the_interval_covers_as_often_as_it_says(members, strangers, distance):
    """Losses are normal with means some deviations apart: the area is Phi(distance / sqrt(2)), 0.98 for 3."""
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(distance / 2))
    hits = 0
    for _ in range(300):
        x, y = torch.from_numpy(rng.normal(0, 1, members)), torch.from_numpy(rng.normal(distance, 1, strangers))
        found = membership_attack(x, y)
        hits += found.low <= truth <= found.high
    assert hits / 300 >= 0.92


def test_the_interval_covers_with_groups_too():
    """There are four images of each of 15 and 12 patients, who differ twice as much as their images do."""
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(0.5 / math.sqrt(1 + 4)))
    groups = torch.arange(15).repeat_interleave(4), torch.arange(12).repeat_interleave(4) + 15
    told = untold = 0
    for _ in range(200):
        x, y = (
            torch.from_numpy(np.repeat(rng.normal(at, 2, n), 4) + rng.normal(0, 1, 4 * n))
            for at, n in ((0, 15), (1, 12))
        )
        found, ungrouped = membership_attack(x, y, groups=groups), membership_attack(x, y)
        told, untold = told + (found.low <= truth <= found.high), untold + (ungrouped.low <= truth <= ungrouped.high)
    assert untold / 200 < 0.85  # why they are told
    assert told / 200 >= 0.91


def test_true_positives_at_one_percent():
    strangers = torch.arange(100.0) + 10  # one of them may be called a member: the one with a loss of 10
    members = torch.tensor([1.0, 10.5, 10.9, 11.0, 50.0])
    found = membership_attack(members, strangers)
    assert found.tpr == pytest.approx(3 / 5)  # below 11, the second lowest of the others
    assert found.fpr == 1 / 100
    halved = membership_attack(members, strangers[:50])  # of 50 none may be
    assert (halved.tpr, halved.fpr) == (pytest.approx(1 / 5), 0.0)
    # Clopper-Pearson's limits of 3 and 1 of 5, from the binomial law itself.
    for result, hits in ((found, 3), (halved, 1)):
        law = scipy.stats.binomtest(hits, 5).proportion_ci(0.95, "exact")
        assert (result.tpr_low, result.tpr_high) == pytest.approx((law.low, law.high), rel=1e-9)
    null = membership_attack(strangers, strangers)
    assert (null.tpr_low, membership_attack(members[:3], strangers + 90).tpr_high) == (pytest.approx(0, abs=1e-3), 1.0)


def test_the_ends():
    low, high = torch.arange(5.0), torch.arange(5.0) + 10
    assert (membership_attack(low, high).auc, membership_attack(high, low).auc) == (1.0, 0.0)
    # Newcombe's limits where DeLong's variance is 0: the quadratic's own roots, and never a point.
    sure, never = membership_attack(low, high), membership_attack(high, low)
    assert (sure.high, never.low) == (1.0, 0.0)
    assert sure.low == pytest.approx(1 - never.high, abs=1e-12)
    z, t = 1.959963985, sure.low
    variance = t * (1 - t) * (1 + 4 * (1 - t) / (2 - t) + 4 * t / (1 + t)) / 25
    assert 1 - t == pytest.approx(z * math.sqrt(variance), rel=1e-6)
    assert t < 0.75
    equal = membership_attack(torch.ones(10), torch.ones(20))
    assert (equal.auc, equal.tpr, equal.tpr_low) == (0.5, 0.0, 0.0)
    assert equal.low < 0.35
    assert equal.high == pytest.approx(1 - equal.low, abs=1e-12)
    # Too few of a kind: nothing is said.
    owners = (torch.tensor([0, 0, 1, 2, 3]), torch.arange(5) + 4)
    separated = [membership_attack(low[:m], high[:n]) for m, n in ((2, 2), (4, 5), (5, 4))]
    for result in (*separated, membership_attack(low, high, groups=owners)):
        assert (result.auc, result.low, result.high) == (1.0, None, None)
    infinite = membership_attack(torch.tensor([0.0, 1.0]), torch.tensor([2.0, math.inf]))
    assert infinite.auc == 1.0
    for members, strangers in (
        (torch.ones(1), torch.ones(3)),
        (torch.ones(3), torch.ones(3, 1)),
        (torch.tensor([0.0, math.nan]), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"members|others"):
            membership_attack(members, strangers)
    for groups in ((torch.arange(4), torch.arange(5)), (torch.arange(5), torch.rand(5))):
        with pytest.raises(ValueError, match="groups must be integers"):
            membership_attack(low, high, groups=groups)


def noise(samples, seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (samples, 1, 8, 8), generator=g).to(torch.uint8)
    return Split(images, torch.randint(0, 4, (samples,), generator=g))


@pytest.fixture(scope="module")
def data():
    """Return images with random labels, so that learning is memorising."""
    clients = (noise(40, 1), noise(60, 2))
    statistics = PartitionStatistics.of([c.labels.numpy() for c in clients], tuple("abcd"), "iid")
    return FederatedData("noise", tuple("abcd"), clients, noise(10, 3), {"": noise(300, 4)}, FORM, statistics)


def release(folder, data, steps):
    """Return the folder of a run whose model was trained on both clients' images for ``steps`` steps."""
    model = models.build("mlp", classes=4, channels=1, image_size=8, seed=0, width=64)
    images = normalise(torch.cat([c.images for c in data.clients]), data.form.mean, data.form.std)
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
    about = {"model": "mlp", "width": 64, "task": "classification", "classes": list("abcd"), "channels": 1,
             "image_size": [8, 8], "mean": [0.5], "std": [0.3], "grey_bits": 8, "window": None, "method": "fedavg",
             "rounds": 1}  # fmt: skip
    run_folder.write_model(folder / run_folder.MODEL, model, about)
    return folder


def test_an_overfitted_model_tells_and_an_untrained_one_does_not(tmp_path, data):
    told = attacking.attack(release(tmp_path / "trained", data, 40), data=data)
    assert told["low"] > 0.7
    assert told["member_loss"] < told["other_loss"]
    assert all(area > 0.7 for area in told["clients"])
    assert (told["members"], told["others"]) == (100, 300)
    assert json.loads((tmp_path / "trained" / "attack.json").read_text()) == told
    silent = attacking.attack(release(tmp_path / "untrained", data, 0), data=data)
    assert silent["low"] <= 0.5 <= silent["high"]
    assert silent["tpr"] < 0.1


def test_pixels_count_as_one_record(data):
    found = attacking.losses(Sure(2.0), segment(data, 4, 300), data)
    right, wrong = -math.log(math.exp(2) / (math.exp(2) + 3)), math.log(math.exp(2) + 3)
    assert found.shape == (300,)
    assert torch.allclose(found, torch.full((300,), (right + wrong) / 2, dtype=torch.float64))


class Sure(torch.nn.Module):
    """A network that answers class 0 everywhere, with a given confidence."""

    def __init__(self, confidence):
        super().__init__()
        self.confidence = confidence

    def forward(self, x):
        logits = torch.zeros(len(x), 4, 8, 8)
        logits[:, 0] = self.confidence
        return logits


def segment(data, seed, n):
    """Return a split with pixel labels: half an image of class 1, the rest of class 0."""
    labels = torch.zeros(n, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    return dataclasses.replace(noise(n, seed), labels=labels, task=SEGMENTATION)


def test_unknown_pixels_count_nowhere(data):
    half = segment(data, 4, 6)
    half.labels[:3, 4:] = -100  # what is wrong is unknown here
    half.labels[5] = -100
    found = attacking.losses(Sure(2.0), half, data)
    right, wrong = -math.log(math.exp(2) / (math.exp(2) + 3)), math.log(math.exp(2) + 3)
    expected = torch.tensor([right] * 3 + [(right + wrong) / 2] * 2, dtype=torch.float64)
    assert torch.allclose(found, expected)


def test_images_without_a_known_pixel_are_left_out_and_told(tmp_path, data, monkeypatch, capsys):
    clients = tuple(segment(data, k, 5) for k in range(2))
    clients[1].labels[:2] = -100
    untrimmed = dataclasses.replace(
        data, clients=clients, validation=segment(data, 2, 3), tests={"": segment(data, 3, 6)}
    )
    folder = release(tmp_path / "run", data, 0)
    monkeypatch.setattr(attacking, "read_model", lambda *_, **__: (Sure(1.0), {}))
    found = attacking.attack(folder, data=untrimmed)
    assert (found["members"], found["others"], found["left_out"]) == (8, 6, 2)
    assert json.loads((folder / "attack.json").read_text()) == found
    monkeypatch.setattr(attacking, "load_data", lambda config, masks: untrimmed)
    assert play_request(parse_words(["attack", str(folder)])) == 0
    assert "images left out, without a known pixel" in capsys.readouterr().out
    complete = dataclasses.replace(untrimmed, clients=(clients[0],))
    assert "left_out" not in attacking.attack(folder, data=complete)


def test_an_infinite_loss_is_null_in_the_file_and_one_that_is_no_number_a_sentence(tmp_path, data, monkeypatch, capsys):
    folder = release(tmp_path / "run", data, 0)

    class Certain(torch.nn.Module):
        said = math.inf

        def forward(self, x):
            logits = torch.zeros(len(x), 4)
            logits[:, 1:] = -self.said
            return logits

    monkeypatch.setattr(attacking, "read_model", lambda *_, **__: (Certain(), {}))
    monkeypatch.setattr(attacking, "load_data", lambda config, masks: data)
    found = attacking.attack(folder, data=data)
    assert found["member_loss"] == math.inf
    stored = json.loads((folder / "attack.json").read_text())
    assert stored["member_loss"] is None
    assert stored["auc"] == found["auc"]
    assert play_request(parse_words(["attack", str(folder), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["other_loss"] is None
    assert play_request(parse_words(["attack", str(folder)])) == 0
    monkeypatch.setattr(Certain, "said", math.nan)
    with pytest.raises(UserError, match=r"The model of .*run has losses that are not numbers .*lower learning rate"):
        attacking.attack(folder, data=data)


def test_a_single_image_is_too_few_to_compare(tmp_path, data):
    folder = release(tmp_path / "run", data, 0)
    single = dataclasses.replace(data, tests={"": noise(1, 9)})
    with pytest.raises(UserError, match=r"run has 1 test images with known answers: attack a run on more data"):
        attacking.attack(folder, data=single)
    with pytest.raises(UserError, match=r"run has 1 training samples with known answers"):
        attacking.attack(folder, data=dataclasses.replace(data, clients=(noise(1, 9),)))


def test_the_command(tmp_path, data, monkeypatch, capsys):
    folder = release(tmp_path / "run", data, 40)
    monkeypatch.setattr(attacking, "load_data", lambda config, masks: data)
    assert play_request(parse_words(["attack", str(folder), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["auc"] > 0.7
    assert play_request(parse_words(["attack", str(folder)])) == 0
    said = capsys.readouterr().out
    assert "area under the ROC curve" in said
    assert "members found, 1 % of the others taken for members" in said
    assert "taken as independent: images of members, of others 100, 300" in re.sub(r"\s+", " ", said)
    for words, sentence in (
        (["attack"], "needs the folder of a finished run"),
        (["attack", str(folder), "--lr", "1"], 'attack does not take "--lr"'),
        (["attack", str(folder), "again"], 'attack does not take "again"'),
    ):
        with pytest.raises(UserError, match=sentence):
            parse_words(words)
    with pytest.raises(UserError, match="is not a run folder"):
        play_request(parse_words(["attack", str(tmp_path)]))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its run is not finished"):
        play_request(parse_words(["attack", str(folder)]))


def test_what_a_run_set_aside_was_never_trained_on(tmp_path, data):
    folder = release(tmp_path / "run", data, 3)
    unreduced = attacking.attack(folder, data=data)
    assert unreduced["members"] == 100
    config = load_settings(folder)
    (folder / "config.toml").write_text(config.replace(client_test=0.25).to_toml())
    assert attacking.attack(folder, data=data)["members"] == 75
    (folder / "config.toml").write_text(config.replace(held_out_client=0).to_toml())
    found = attacking.attack(folder, data=data)
    assert (found["members"], len(found["clients"])) == (60, 1)
    assert found["clients"][0] == pytest.approx(unreduced["clients"][1])


def test_images_of_a_patient_are_one_group(tmp_path, data, monkeypatch, capsys):
    """The groups are named patients, or else cases.

    If the test images name none, all count as independent.
    """
    folder = release(tmp_path / "run", data, 3)

    def name_groups(name):
        clients = tuple(
            dataclasses.replace(split, **{name: torch.arange(len(split)) // 4 + 100 * k})
            for k, split in enumerate(data.clients)
        )
        test = dataclasses.replace(data.tests[""], **{name: torch.arange(300) // 4 + (0 if name == "cases" else 500)})
        return dataclasses.replace(data, clients=clients, tests={"": test})

    plain, found = attacking.attack(folder, data=data), attacking.attack(folder, data=name_groups("patients"))
    assert (plain["independent"], plain["member_groups"], plain["other_groups"]) == ("image", 100, 300)
    assert (found["independent"], found["member_groups"], found["other_groups"]) == ("patient", 25, 75)
    assert found["auc"] == plain["auc"]
    assert found["high"] - found["low"] > plain["high"] - plain["low"]
    cases = attacking.attack(folder, data=name_groups("cases"))  # their numbers are those of each pool
    assert (cases["independent"], cases["low"], cases["high"]) == ("case", found["low"], found["high"])
    monkeypatch.setattr(attacking, "load_data", lambda config, masks: name_groups("patients"))
    assert play_request(parse_words(["attack", str(folder)])) == 0
    assert "taken as independent: patients of members, of others 25, 75" in re.sub(r"\s+", " ", capsys.readouterr().out)
    half = dataclasses.replace(name_groups("patients"), tests=data.tests)
    assert attacking.attack(folder, data=half)["independent"] == "image"


def test_too_few_patients_have_no_interval(tmp_path, data, monkeypatch, capsys):
    folder = release(tmp_path / "run", data, 3)
    clients = tuple(dataclasses.replace(s, patients=torch.full((len(s),), k)) for k, s in enumerate(data.clients))
    test = dataclasses.replace(data.tests[""], patients=torch.arange(300) + 2)
    monkeypatch.setattr(
        attacking, "load_data", lambda config, masks: dataclasses.replace(data, clients=clients, tests={"": test})
    )
    assert play_request(parse_words(["attack", str(folder)])) == 0
    assert "none: too few patients" in capsys.readouterr().out
    assert json.loads((folder / "attack.json").read_text())["low"] is None


def test_what_a_method_keeps_from_the_training_is_no_member(tmp_path, data, monkeypatch, capsys):
    """FedIOD's hold-out and the samples for client weights are set aside.

    No training uses them.
    """
    folder = release(tmp_path / "run", data, 3)
    unreduced = attacking.attack(folder, data=data)
    assert "untrained" not in unreduced

    def store(method, **settings):
        config = RunConfig.make(method, data="digits", model="mlp", width=64, clients=2, **settings)
        (folder / "config.toml").write_text(config.to_toml())
        return config

    config = store("fediod", options={"holdout": 0.2})
    found = attacking.attack(folder, data=data)
    assert (found["members"], found["untrained"]) == (80, 20)
    splits, _ = attacking.find_trained(config, data)
    for k, split in enumerate(splits):  # those that the teacher is trained on
        rows, _ = method.split_holdout(Client(RunContext(config, data), k, {}), 0.2)
        assert torch.equal(split.images, data.clients[k].images[torch.from_numpy(rows)])
    monkeypatch.setattr(attacking, "load_data", lambda config, masks: data)
    assert play_request(parse_words(["attack", str(folder)])) == 0
    assert "images left out, which the method kept from the training" in capsys.readouterr().out
    assert attacking.find_trained(config.replace(teachers="anywhere"), data)[1] == 0  # may have been trained on any
    store("fediod", options={"holdout": 0.0})
    assert attacking.attack(folder, data=data) == unreduced
    assert attacking.find_trained(store("afl", options={"loss_share": 0.3}), data)[1] == 30
    assert attacking.find_trained(store("afl", options={"loss_split": "train"}), data)[1] == 0
