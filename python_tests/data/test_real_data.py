"""Tests on the real data sets, where FEDKERN_DATA_ROOT names a folder that holds them."""

import os

import pytest
import torch

from fedkern.data import load
from fedkern.errors import UserError
from python_tests.papers_data import REPORTS, open_all

ROOT = os.environ.get("FEDKERN_DATA_ROOT")
pytestmark = [pytest.mark.data, pytest.mark.skipif(not ROOT, reason="FEDKERN_DATA_ROOT names no folder with real data")]

SETS = {
    "mnist": (60_000, 10_000),
    "fashionmnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}


@pytest.mark.parametrize("name", SETS)
def test_official_counts_and_statistics(name: str) -> None:
    try:
        data = load(name, root=ROOT, partition="iid")
    except UserError as error:
        if "no file" in str(error):
            pytest.skip(str(error))
        raise
    train, test = SETS[name]
    assert sum(data.client_sizes) + len(data.validation) == train
    assert len(data.tests[""]) == test
    images = torch.cat([split.images for split in data.clients][:3]).double() / 255
    for channel, (mean, std) in enumerate(zip(data.form.mean, data.form.std, strict=True)):
        assert float(images[:, channel].mean()) == pytest.approx(mean, abs=0.01)
        assert float(images[:, channel].std()) == pytest.approx(std, abs=0.01)


def test_the_radiographs_come_with_their_reports(registries: None) -> None:
    open_all()
    try:
        data = load(REPORTS, root=f"{ROOT}/xray", clients=3, partition="stratified")
    except UserError as error:
        pytest.skip(str(error))
    splits = [*data.clients, data.validation, *data.tests.values()]
    texts = [text for split in splits for text in split.texts]
    assert len(texts) >= 25
    assert all(3 <= len(text.split()) <= 112 for text in texts)
    assert data.form.shape == (1, 64, 64)
    assert "COVID-19" in data.classes


def test_the_membranes_have_two_classes() -> None:
    options = {"size": 64, "colour": "grey", "names": "membrane|cell"}
    try:
        data = load("segmentation", root=f"{ROOT}/membrane", clients=4, options=options)
    except UserError as error:
        pytest.skip(str(error))
    splits = [*data.clients, data.validation, *data.tests.values()]
    assert [len(split) for split in splits[-2:]] == [2, 6]
    assert sum(data.client_sizes) == 22
    assert len({name for split in splits for name in split.ids}) == 30
    share = torch.cat([split.labels for split in splits]).double().mean()
    assert 0.7 < float(share) < 0.85
