"""Batches of samples: their order, and no batch of a single sample, which batch norm cannot normalise."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fedkern.data import Split
from fedkern.data.forms import ImageForm
from fedkern.engine.batches.images import Images
from fedkern.engine.batches.reader import batch_plan
from fedkern.engine.run import run
from fedkern.errors import UserError

FORM = ImageForm((3, 8, 8), (0.5,) * 3, (0.2,) * 3)

EDGES = list(itertools.product([1, 2, 5, 6, 7, 8, 9, 13], [1, 2, 4, 40]))


def some(count, seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, 8, 8)).astype(np.uint8))
    return Split(images, torch.from_numpy(rng.integers(0, 3, count)))


@pytest.mark.parametrize(("samples", "size"), list(itertools.product([1, 2, 3, 4, 5, 7, 8, 9, 33], [1, 2, 4, 8, 40])))
def test_batches_cover_the_client_and_never_hold_one_sample_by_accident(samples, size):
    plan = batch_plan(samples, size, np.random.default_rng(0))
    assert sorted(np.concatenate(plan).tolist()) == list(range(samples))
    assert all(len(batch) <= size + 1 for batch in plan)
    if size > 1 and samples > 1:
        assert min(map(len, plan)) > 1
    if samples <= size:
        assert len(plan) == 1


def test_an_epoch_is_the_streams_permutation_in_batches():
    plan = batch_plan(13, 4, np.random.default_rng(7))
    assert [len(rows) for rows in plan] == [4, 4, 5]
    assert np.concatenate(plan).tolist() == np.random.default_rng(7).permutation(13).tolist()


@pytest.mark.parametrize(("count", "size"), EDGES)
def test_a_rest_of_one_joins_the_batch_before_it(count, size):
    data = Images(some(count), FORM, torch.device("cpu"), size=size)
    found = list(data.batches())
    plain = [min(size, count - start) for start in range(0, count, size)]
    if len(plain) > 1 and plain[-1] == 1 and size > 1:
        plain[-2:] = [size + 1]
    assert [len(batch.inputs) for batch in found] == plain
    assert np.concatenate([batch.indices for batch in found]).tolist() == list(range(count))
    assert torch.equal(torch.cat([batch.targets for batch in found]), data.labels)
    assert torch.equal(torch.cat([batch.inputs for batch in found]), data.pixels.take(None))


def test_an_evaluation_without_running_statistics_leaves_no_image_alone(make_data, make_config, tmp_path):
    data = dataclasses.replace(make_data(two_tests=False), tests={"": some(501)}, validation=some(501, 1))
    config = make_config(model="mlp", buffers="drop", rounds=1, grad_cam=0)
    assert 0 <= run(config, out=tmp_path, data=data)["metrics"]["accuracy"] <= 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("The test set has", {"tests": {"": some(1)}}),
        ("The out-of-distribution test set has", {"tests": {"id": some(4), "ood": some(1)}}),
        ("The validation set has", {"validation": some(1)}),
        ("The test set of client 1 has", {"client_tests": (some(4), some(1), some(4))}),
    ],
)
def test_a_single_image_without_statistics_is_said_in_one_sentence(name, changes, make_data, make_config, tmp_path):
    data = dataclasses.replace(make_data(), **changes)
    with pytest.raises(UserError, match=f"^{name} a single image, .* --buffers average"):
        run(make_config(model="mlp", buffers="drop", rounds=1), out=tmp_path / "none", data=data)
    # With running statistics, and where a map has several positions, one image is enough.
    for changed in ({"model": "mlp"}, {"model": "cnn", "buffers": "drop"}):
        run(make_config(rounds=1, grad_cam=0, **changed), out=tmp_path / changed["model"], data=data)
