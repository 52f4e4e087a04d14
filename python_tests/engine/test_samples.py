"""Batches of an epoch, picked one by one and several at once."""

import numpy as np
import pytest
import torch

from fedkern.data.pixels import Pixels
from fedkern.engine import samples
from fedkern.engine.samples import Samples


def batches(plan, *, cache=True, rng=None, segmented=False):
    images = torch.arange(13 * 3 * 4 * 4, dtype=torch.float32).remainder(251).to(torch.uint8).view(13, 3, 4, 4)
    labels = torch.arange(13).remainder(3)
    if segmented:
        labels = labels[:, None, None] + torch.zeros(1, 4, 4, dtype=torch.int64)
    augment = "none" if rng is None else "crop-flip"
    pixels = Pixels(images, (0.5,) * 3, (0.2,) * 3, torch.device("cpu"), cache=cache, augment=augment)
    return list(Samples(pixels, labels, torch.device("cpu")).planned(plan, rng=rng))


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_batches_picked_at_once_are_those_picked_one_by_one(count, augmented, cache, segmented, monkeypatch):
    order = np.random.default_rng(0).permutation(13)
    plan = [order[:4], order[4:8], order[8:]]  # the last one has another size
    rngs = [np.random.default_rng(1) if augmented else None for _ in range(2)]
    one = batches(plan, cache=cache, rng=rngs[0], segmented=segmented)
    monkeypatch.setitem(samples.PICKED_BYTES, "cpu", count * 5 * 3 * 4 * 4 * 4)
    several = batches(plan, cache=cache, rng=rngs[1], segmented=segmented)
    assert len(one) == len(several) == len(plan)
    for a, b, indices in zip(one, several, plan, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.images.stride() == b.images.stride()
        assert a.indices is b.indices is indices
        assert a.augmented is b.augmented is augmented
    shared = one[0].images.untyped_storage().data_ptr() == one[1].images.untyped_storage().data_ptr()
    assert not shared
    shared = several[0].images.untyped_storage().data_ptr() == several[1].images.untyped_storage().data_ptr()
    assert shared is (count > 1 and not augmented)
