"""Patients as the unit of privacy: their effect, their sampling, public counts, and reports."""

import dataclasses
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from fedkern.data import Split
from fedkern.data.forms import ImageForm
from fedkern.data.sharing.holdout import limit_patients
from fedkern.engine.batches.images import Images
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.local.private_training import train_privately
from fedkern.engine.local.training import Schedule
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods.base import Objective, Phase
from fedkern.methods.common.figures import class_counts
from fedkern.methods.fediod import private_messages as privacy
from fedkern.methods.fediod.iod_options import IODOptions
from fedkern.methods.fediod.method import split_holdout as held_out
from fedkern.privacy import DPSGD, LEDGER
from fedkern.report.live.progress_bar import Lines
from fedkern.settings.config import load_settings
from fedkern.settings.run_data import kept_data
from fedkern.streams import stream

FORM = ImageForm((3, 8, 8), (0.5,) * 3, (0.2,) * 3)

PHASE = Phase(0, "teachers", "teachers")
NORM = 0.01
COUNTS = (1, 4, 2, 6, 3, 5, 4, 2, 1, 4)


def patients(counts, offset=0, extreme=(), seed=0):
    """Return ``counts`` images of each patient.

    Images of patients in ``extreme`` are white and of the last class.
    """
    owner = np.repeat(np.arange(len(counts)) + offset, counts)
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (len(owner), 3, 8, 8)).astype(np.uint8)
    labels = rng.integers(0, 2, len(owner))
    white = np.isin(owner, extreme)
    images[white], labels[white] = 255, 2
    order = rng.permutation(len(owner))  # rows of a patient stand anywhere
    rows = [torch.from_numpy(np.ascontiguousarray(x[order])) for x in (images, labels.astype(np.int64), owner)]
    return Split(rows[0], rows[1], patients=rows[2])


@pytest.fixture
def federation(make_data):
    data = make_data(two_tests=False)
    return dataclasses.replace(data, clients=tuple(patients(COUNTS, 100 * k, seed=k) for k in range(3)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 3))


class Supervised(Objective):
    seen: list

    def loss(self, model, batch, received):
        self.seen.append(batch.indices.copy())
        return F.cross_entropy(model(batch.inputs), batch.targets)


def train(split, *, by_patient, batch_size=1000, epochs=1, noise=0.0, norm=NORM, images=6):
    """Train privately and return the step over the clipping norm, the batches, and the ledger's entry."""
    data = Images(split, FORM, torch.device("cpu"), cache=True)
    module = network()
    method = Supervised()
    method.seen = []
    trainee = SimpleNamespace(id=0, state={}, report={}, rng=lambda name, phase: stream(0, name, client=0))
    schedule = Schedule(lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.0, epochs=epochs, batch_size=batch_size)
    owner = np.unique(split.patients.numpy(), return_inverse=True)[1]
    unit = {"patients": owner, "images": images} if by_patient else {}
    before = torch.cat([p.detach().flatten().double() for p in module.parameters()])
    spending = DPSGD(norm, lambda rate, steps: noise, "teacher", **unit)
    train_privately(trainee, method, PHASE, module, data, None, schedule, spending, None)
    after = torch.cat([p.detach().flatten().double() for p in module.parameters()])
    count = int(owner.max()) + 1 if by_patient else len(split)
    return (before - after) * count / norm, method.seen, trainee.state[LEDGER]["teacher"]


@pytest.mark.parametrize("replacement", [6, 1])
def test_a_patient_replaced_moves_the_sum_by_twice_the_norm_and_without_the_unit_by_more(replacement):
    """All images of patient 3 are replaced, possibly by fewer.

    Every patient is in the batch, without noise.
    """
    original = patients(COUNTS)
    altered = patients([n if k != 3 else replacement for k, n in enumerate(COUNTS)], extreme=(3,))
    keep, untouched = (split.patients != 3 for split in (original, altered))
    new = altered.subset((~untouched).nonzero().flatten())
    common = original.subset(keep.nonzero().flatten())
    two = Split(*(torch.cat([getattr(common, name), getattr(new, name)]) for name in ("images", "labels")),
                patients=torch.cat([common.patients, new.patients]))  # fmt: skip
    moved = {by: (train(original, by_patient=by)[0] - train(two, by_patient=by)[0]).norm() for by in (True, False)}
    assert 0 < float(moved[True]) <= 2 * (1 + 1e-3)
    assert float(moved[False]) > 2.5


def test_without_noise_and_clipping_a_patient_counts_with_the_sum_of_the_images():
    split = patients(COUNTS)
    found, _, _ = train(split, by_patient=True, norm=1e6)
    plain = network()
    data = Images(split, FORM, torch.device("cpu"), cache=True)
    batch = data.batch(np.arange(len(split)))
    F.cross_entropy(plain(batch.inputs), batch.targets, reduction="sum").backward()
    gradient = torch.cat([p.grad.flatten().double() for p in plain.parameters()])
    assert torch.allclose(found * 1e6, gradient, rtol=1e-3, atol=1e-4)


def test_patients_are_drawn_by_themselves_and_bring_all_their_images():
    split = patients(COUNTS)
    _, seen, ledger = train(split, by_patient=True, batch_size=12, epochs=8, noise=1.0)
    owner = split.patients.numpy()
    # Ten patients of at most six images: 60 samples as everybody may know it, whatever their number is.
    assert ledger == [["dp-sgd", 1.0, 12 / 60, 5 * 8]]
    drawn = np.zeros(len(COUNTS))
    for rows in seen:
        for patient in np.unique(owner[rows]):
            assert set(np.flatnonzero(owner == patient)) <= set(rows)
            drawn[patient] += 1
        assert len(set(rows.tolist())) == len(rows)
    assert drawn.sum() == pytest.approx(40 * 10 * 0.2, abs=5 * math.sqrt(400 * 0.2 * 0.8))
    assert drawn.min() > 0
    # Of fewer images the same: neither the probability nor the number of steps tells.
    _, _, fewer = train(patients([1] * 10), by_patient=True, batch_size=12, epochs=8, noise=1.0)
    assert fewer == ledger


def test_at_most_so_many_images_of_a_patient_stay(federation):
    kept = limit_patients(federation, 3, seed=0)
    for before, after in zip(federation.clients, kept.clients, strict=True):
        counts = np.unique(after.patients.numpy(), return_counts=True)[1]
        assert counts.tolist() == [min(n, 3) for n in COUNTS]
        images = {image.numpy().tobytes() for image in before.images}
        assert all(image.numpy().tobytes() in images for image in after.images)
    assert not torch.equal(limit_patients(federation, 3, seed=1).clients[0].images, kept.clients[0].images)
    # What is drawn differs between patients: not always the first rows.
    unlimited = limit_patients(federation, 6, seed=0).clients[0]
    assert torch.equal(unlimited.images, federation.clients[0].images)


def test_a_patients_draw_depends_on_no_other_patient(federation):
    """When one patient's images are replaced by fewer, the same images of the others stay."""
    client = federation.clients[0]
    owner = client.patients.numpy()
    patient = int(owner[np.argmax(np.bincount(owner)[owner])])
    rows = np.concatenate([np.flatnonzero(owner != patient), np.flatnonzero(owner == patient)[:1]])
    fewer = dataclasses.replace(federation, clients=(client.subset(torch.from_numpy(np.sort(rows))),))

    def others(data):
        kept = limit_patients(data, 3, seed=0).clients[0]
        return kept.images[kept.patients != patient]

    assert torch.equal(others(federation), others(fewer))


def test_data_without_patients_or_with_a_shared_one_are_refused(federation, make_data, make_config, refuses, tmp_path):
    with pytest.raises(UserError, match="names no patients: give its table a column patient_id"):
        limit_patients(make_data(), 4, seed=0)
    shared = dataclasses.replace(federation, clients=(federation.clients[0], federation.clients[0]))
    with pytest.raises(UserError, match="clients 0 and 1 share a patient"):
        limit_patients(shared, 4, seed=0)
    with pytest.raises(UserError, match="--patient-images is for --privacy-unit patient"):
        make_config("fediod", patient_images=3)
    config = make_config("fediod", privacy_unit="patient")
    with refuses(r"this run of fediod promises none: ask for one with a privacy option"):
        run(config, out=tmp_path / "run", data=federation)


def client(federation, make_config, options, **settings):
    config = make_config("fediod", privacy_unit="patient", patient_images=3, **settings)
    context = RunContext(config, kept_data(config, federation))
    return Client(context, 1, {}), IODOptions(noise="seed", **options)


def test_shards_and_hold_outs_have_whole_patients_and_public_sizes(federation, make_config):
    hospital, options = client(federation, make_config, {"epsilon": 5.0, "shards": 4, "batch": 4, "iterations": 20})
    owner = hospital.patients
    parts = privacy.shards(hospital, options)
    assert sorted(np.concatenate(parts).tolist()) == list(range(hospital.samples))
    sets = [set(owner[part].tolist()) for part in parts]
    assert sorted(len(own) for own in sets) == [2, 2, 3, 3]
    assert sum(len(own) for own in sets) == len(set().union(*sets)) == 10
    kept, out = held_out(hospital, 0.3)
    assert len(set(owner[out].tolist())) == 3
    assert not set(owner[out].tolist()) & set(owner[kept].tolist())
    # Ten patients of at most three images: how many they have shows in no size.
    assert hospital.declared == 30 > hospital.samples == sum(min(n, 3) for n in COUNTS)
    assert privacy.count_trainings(hospital, options) == math.ceil(30 / 4)
    with pytest.raises(UserError, match='"shards" is 11, but client 1 has 10 patients'):
        privacy.shards(hospital, IODOptions(epsilon=5.0, shards=11))


def test_class_counts_change_by_all_images_of_a_patient(federation, make_config):
    hospital, options = client(federation, make_config, {"histogram_noise": 30.0})
    privacy.release_histogram(hospital, class_counts(hospital), options)
    ((kind, noise, rate, steps),) = hospital.state[LEDGER]["histogram"]
    assert (kind, rate, steps) == ("gaussian", 1.0, 1)
    assert noise == pytest.approx(30 / (3 * math.sqrt(2)))


@pytest.mark.exhaustive
def test_a_run_says_its_unit_everywhere_and_pays_for_it(federation, make_config, tmp_path):
    options = {
        "iterations": 2, "batch": 4, "ngf": 2, "ndf": 2, "student_steps": 1, "histogram_noise": 90.0,
        "epsilon": 8.0, "teacher_dp": True, "shards": 2,
    }  # fmt: skip
    config = make_config(
        "fediod", model="cnn-gn", width=4, rounds=2, options=options, grad_cam=0, privacy_unit="patient",
        patient_images=3, records="all",
    )  # fmt: skip
    text = io.StringIO()
    summary = run(config, out=tmp_path / "run", data=federation, listener=Lines(Console(file=text, width=200)))
    private = json.loads((tmp_path / "run" / "summary.json").read_text())["privacy"]
    assert (private["unit"], private["patient_images"]) == ("patient", 3)
    assert "when one of its patients (each with at most 3 images) is replaced" in private["statement"]
    assert "differential privacy of every patient: one of a client's patients (each with at most 3" in text.getvalue()
    assert "training images of 30 patients" in text.getvalue()
    assert summary["privacy"]["epsilon_covered"] > max(private["channels"].values()) > 0
    assert set(private["channels"]) == {"discriminator", "teacher", "histogram"}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {info["samples"] for record in records for info in record["clients"].values()} == {30}
    assert load_settings(tmp_path / "run").unit.images == 3


def test_an_image_is_the_unit_where_nothing_else_is_said(make_data, make_config, tmp_path):
    options = {"iterations": 1, "batch": 4, "ngf": 2, "ndf": 2, "student_steps": 1, "epsilon": 0.5}
    text = io.StringIO()
    config = make_config("fediod", rounds=1, options=options, grad_cam=0)
    summary = run(
        config, out=tmp_path / "run", data=make_data(two_tests=False), listener=Lines(Console(file=text, width=200))
    )
    assert summary["privacy"]["unit"] == "image"
    assert "patient_images" not in summary["privacy"]
    assert "when one of its images is replaced" in summary["privacy"]["statement"]
    assert "differential privacy of every image: one of a client's images is replaced" in text.getvalue()
    assert 0.99 * 0.5 < summary["privacy"]["epsilon_covered"] <= 0.5
