"""Tests of means over pixels on a pretended GPU: PyTorch's means of losses that its kernel does not reduce."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedkern.data import IGNORE
from fedkern.methods import Batch
from fedkern.tasks import SEGMENTATION, cross_entropy
from fedkern.tasks.user_tasks import OwnTask

CLASSES = 5
WEIGHT = torch.tensor([0.1, 2.0, 1.0, 0.0, 7.0])


@pytest.fixture
def fake_gpu(monkeypatch):
    """Pretend that every tensor of pixels is on a GPU."""
    for where in ("cross_entropy", "segmentation"):
        monkeypatch.setattr(f"fedkern.tasks.{where}.added_in_any_order", lambda logits: logits.dim() > 2)


class Reductions(TorchDispatchMode):
    """Mode that records the reductions inside the kernels of losses."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "nll_loss" in func.__name__ and "backward" not in func.__name__:
            self.found.append(args[3])
        return func(*args, **(kwargs or {}))


def pixels(*shape, ignored=IGNORE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], CLASSES, *shape[1:], generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, shape, generator=generator)
    labels.flatten()[::3] = ignored
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("ignored", [IGNORE, 255, 1])
@pytest.mark.parametrize("shape", [(2, 7, 9), (3, 11), (2, 2, 3, 5)])
def test_the_mean_is_pytorchs(shape, ignored, weight, smoothing, fake_gpu):
    logits, labels = pixels(*shape, ignored=ignored)
    how = {"ignore_index": ignored, "label_smoothing": smoothing}
    module = nn.CrossEntropyLoss(weight if weight is None else weight.double(), **how)
    expected = module(logits, labels)
    gradient = torch.autograd.grad(expected, logits)[0]
    task = OwnTask(module)
    with Reductions() as kernels:
        found = task.criterion(logits, Batch(logits, labels, None))
    assert kernels.found == [0]
    assert torch.allclose(found, expected, rtol=1e-13, atol=0)
    assert torch.allclose(torch.autograd.grad(found, logits)[0], gradient, rtol=1e-12, atol=1e-16)


def test_nothing_counted_is_pytorchs_nan_and_segmentations_zero(fake_gpu):
    logits, labels = pixels(2, 4, 4)
    labels.fill_(IGNORE)
    assert F.cross_entropy(logits, labels).isnan()
    assert cross_entropy.cross_entropy(logits, labels).isnan()
    assert SEGMENTATION.criterion(logits, Batch(logits, labels, None)) == 0


def test_segmentations_loss_is_the_mean(fake_gpu):
    logits, labels = pixels(2, 7, 9, ignored=-1)
    with Reductions() as kernels:
        found = SEGMENTATION.criterion(logits, Batch(logits, labels, None))
    assert kernels.found == [0]
    assert torch.allclose(found, F.cross_entropy(logits, labels.clamp_min(IGNORE).where(labels >= 0, IGNORE)))


@pytest.mark.parametrize("loss", [cross_entropy.cross_entropy, nn.CrossEntropyLoss()])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(4,), (2, 8, 8)])
def test_only_pixels_on_a_gpu_are_apart(loss, device, shape):
    task = OwnTask(loss)
    with FakeTensorMode(), Reductions() as kernels:  # tensors without values, of a device that is not there
        logits = torch.empty(shape[0], CLASSES, *shape[1:], device=device)
        task.criterion(logits, Batch(logits, torch.empty(shape, dtype=torch.int64, device=device), None))
    assert kernels.found == [0 if device == "cuda" and len(shape) > 1 else 1]


def test_other_losses_and_probabilities_are_pytorchs(fake_gpu):
    logits, labels = pixels(2, 7, 9)
    summed = nn.CrossEntropyLoss(reduction="sum")
    assert torch.equal(OwnTask(summed).criterion(logits, Batch(logits, labels, None)), summed(logits, labels))
    shares = logits.detach().softmax(1)
    assert torch.equal(cross_entropy.cross_entropy(logits, shares), F.cross_entropy(logits, shares))
