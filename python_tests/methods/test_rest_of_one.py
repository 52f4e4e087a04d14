"""Batches that could end in a single sample, with networks whose last maps have a single position."""

import dataclasses

import pytest
import torch

from fedkern.data import Split
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.methods import FedIOD
from fedkern.methods.fediod.discriminators import Discriminators

TINY = {"ngf": 2, "ndf": 2, "batch": 4, "student_steps": 2, "iterations": 2, "disc_weight": True}
PUBLIC = {"mode": "public", "batch": 4, "student_steps": 2, "iterations": 2}


@pytest.mark.parametrize(
    ("method", "settings"), [("scaffold", {"options": {"control": "I"}}), ("fedproto", {"buffers": "drop"})]
)
def test_a_client_looks_at_all_its_samples(method, settings, make_data, make_config, tmp_path):
    """501 samples are evaluated in train mode, in batches of 500."""
    config = make_config(method, model="mlp", batch_size=64, rounds=1, grad_cam=0, **settings)
    summary = run(config, out=tmp_path, data=make_data((501, 13, 9), two_tests=False))
    assert 0 <= summary["metrics"]["accuracy"] <= 1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("count", [2, 5, 7])
def test_a_student_learns_on_as_many_public_images_as_there_are(count, make_data, make_public, make_config, tmp_path):
    config = make_config("fediod", model="mlp", rounds=1, grad_cam=0, options=PUBLIC)
    told = run(config, out=tmp_path, data=make_public(make_data(), samples=count))["metrics"]
    assert 0 <= told["id_accuracy"] <= 1
    assert told["student_loss"] > 0


@pytest.mark.parametrize(("method", "options"), [("feddf", {}), ("fediod", PUBLIC)])
def test_one_public_image_is_too_few(method, options, make_data, make_public, make_config, refuses, tmp_path):
    rounds = {"rounds": None} if method == "feddf" else {}
    config = make_config(method, model="mlp", options=options, **rounds)
    with refuses("at least 2 public images and this run sets 1 aside: give --public-samples N"):
        run(config, out=tmp_path / "run", data=make_public(make_data(), samples=1))


@pytest.fixture
def critics(make_data, make_config):
    def make(**options):
        given = {**TINY, "critic_layers": 3, **options}  # 8 pixels a side: a last map of one position
        context = RunContext(make_config("fediod", options=given), make_data())
        return Discriminators([Client(context, k, {}) for k in range(3)], FedIOD.Options.parse(given))

    return make


def images(count):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_whole_batches_are_judged_each_by_its_own_statistics(batch, steps, critics):
    made, x = critics(batch=batch), images(batch * steps)
    assert torch.equal(made.judge(x), torch.cat([made.look(part)[1] for part in x.split(batch)], 1))


@pytest.mark.parametrize(
    ("batch", "count", "parts"), [(4, 2, [2]), (4, 5, [5]), (4, 6, [4, 2]), (4, 9, [4, 5]), (2, 3, [3])]
)
def test_other_numbers_are_judged_without_a_rest_of_one(batch, count, parts, critics):
    made, x = critics(batch=batch), images(count)
    assert torch.equal(made.judge(x), torch.cat([made.look(part)[1] for part in x.split(parts)], 1))


def test_a_single_image_is_judged_where_it_has_several_positions(critics):
    assert critics().judge(images(1)) is None
    assert critics(critic_layers=2).judge(images(1)).shape == (3, 1)


@pytest.mark.parametrize("count", [1, 5])
def test_teachers_are_compared_on_any_number_of_images(count, make_data, make_config, tmp_path):
    data = make_data(two_tests=False)
    test = data.tests[""]
    data = dataclasses.replace(data, tests={"": Split(test.images[:count], test.labels[:count])})
    config = make_config(
        "fediod", model="cnn", rounds=1, grad_cam=0, options={**TINY, "iterations": 1, "critic_layers": 3}
    )
    assert 0 <= run(config, out=tmp_path, data=data)["metrics"]["ensemble_weighted"] <= 1
