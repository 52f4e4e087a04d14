"""FedIOD with a class for every pixel (docs/methods/fediod.md, section 10)."""

import dataclasses

import torch

from fedkern.data import IGNORE
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.methods.common.class_counts import class_counts
from fedkern.methods.fediod.local_teachers import split_holdout
from fedkern.methods.fediod.losses import distillation, importance, mixture, normalise_weights, teacher_terms
from python_tests.tasks import test_segmentation as segmented

K, B, C, H, W = 3, 2, 4, 3, 5


def logits(seed=0):
    return torch.randn(K, B, C, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_pixel(tensor, classes):
    """Return ``[..., B, C, H, W]`` with every pixel as its own sample."""
    return tensor.movedim(classes, -1).flatten(classes - 1, -2)


class Place:
    classes = ("background", "a", "b")

    def __init__(self, labels):
        self.labels = labels


def test_weights_count_pixels():
    labels = torch.tensor([[[0, 0, 1], [0, 1, IGNORE]], [[2, 2, 2], [0, 0, IGNORE]]])
    counts = class_counts(Place(labels))
    assert counts.tolist() == [5, 2, 3]
    weights = normalise_weights(importance(torch.stack([counts, torch.tensor([5.0, 0, 1])]), None))[:, 0]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1, 0.75], [0.5, 0, 0.25]]))
    torch.testing.assert_close(weights.sum(0), torch.ones(3))


def test_one_confidence_for_all_pixels_of_an_image():
    """r_k(x) is averaged over the image, so every pixel has the weights w_kc r_k(x), which sum to one."""
    counts = torch.tensor([[5.0, 2, 0, 1], [5, 0, 0, 1], [5, 1, 0, 2]], dtype=torch.float64)
    scores = torch.rand(K, B, dtype=torch.float64) + 0.1
    weights = importance(counts, scores)  # normalised over the clients below, as the operator does
    assert weights.shape == (K, B, C)
    share = normalise_weights(weights)
    torch.testing.assert_close(share.sum(0), torch.ones(B, C, dtype=torch.float64))
    assert torch.allclose(share[:, :, 2], torch.full((K, B), 1 / 3, dtype=torch.float64))  # nobody has class 2
    mixed = mixture(logits(), weights, None)
    for b in range(B):
        for c in range(C):
            expected = (share[:, b, c, None, None] * logits()[:, b, c]).sum(0)
            torch.testing.assert_close(mixed[b, c], expected)


def test_every_term_is_the_mean_over_pixels():
    """Losses with positions are those of the pixels as samples, also their gradients.

    The balance is over all pixels.
    """
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    weights = torch.rand(K, 1, C, dtype=torch.float64) + 0.1
    student = torch.randn(B, C, H, W, dtype=torch.float64)
    found = []
    for given, said in ((logits(), student), (by_pixel(logits(), 2), by_pixel(student, 1))):
        leaf = logits().requires_grad_()
        shaped = leaf if given.dim() == 5 else by_pixel(leaf, 2)
        total, terms = teacher_terms(shaped, pi, 2.0)
        (gradient,) = torch.autograd.grad(total, leaf)
        kd = distillation(said, shaped.detach(), weights, None)
        found.append((total.detach(), gradient, kd, {name: value.detach() for name, value in terms.items()}))
    (total, gradient, kd, terms), (flat, flat_gradient, flat_kd, flat_terms) = found
    torch.testing.assert_close(total, flat)
    torch.testing.assert_close(gradient, flat_gradient)
    torch.testing.assert_close(kd, flat_kd)
    assert terms.keys() == flat_terms.keys()
    for name in terms:
        torch.testing.assert_close(terms[name], flat_terms[name])


def test_the_diversity_of_equal_teachers_is_zero():
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    equal = logits()[:1].expand(K, -1, -1, -1, -1)
    assert abs(float(teacher_terms(equal, pi, 0.0)[1]["diversity"])) < 1e-12
    value = float(teacher_terms(10 * logits(), pi, 0.0)[1]["diversity"])
    assert 0 < value < float(torch.special.entr(pi).sum()) + 1e-12


OPTIONS = {"ngf": 2, "ndf": 2, "batch": 4, "iterations": 2, "student_steps": 1}


def test_a_run_with_three_architectures(tmp_path):
    models = "unet-small:2,unet:2,unet-small:3"
    config = segmented.settings("fediod", options={**OPTIONS, "models": models}, rounds=1)
    data = segmented.federation()
    labels = data.clients[0].labels.clone()
    labels[:, :2] = IGNORE  # what a client has not labelled is no part of its weights
    data = dataclasses.replace(data, clients=(dataclasses.replace(data.clients[0], labels=labels), *data.clients[1:]))
    metrics = run(config, out=tmp_path, data=data)["metrics"]
    figures = ("dice", "best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted")
    assert all(0 <= metrics[name] <= 1 for name in figures)
    assert metrics["best_teacher"] >= metrics["mean_teacher"]
    assert "accuracy" not in metrics
    assert {"hd95", "iou"} & set(metrics)


def test_one_client_alone_is_its_own_ensemble(tmp_path):
    config = segmented.settings("fediod", options=OPTIONS, rounds=1, clients=1)
    metrics = run(config, out=tmp_path, data=segmented.federation((12,)))["metrics"]
    figures = {metrics[name] for name in ("best_teacher", "mean_teacher", "ensemble_uniform", "ensemble_weighted")}
    assert len(figures) == 1


def test_a_hold_out_of_which_nothing_is_known_has_no_figure(tmp_path):
    """A tenth of nine images is one image, which may have no known pixel."""
    config = segmented.settings("fediod", options={**OPTIONS, "holdout": 0.1}, rounds=1)
    data = segmented.federation((12, 9, 7))
    held = split_holdout(Client(RunContext(config, data), 1, {}), 0.1)[1]
    assert len(held) == 1
    data.clients[1].labels[held] = IGNORE
    metrics = run(config, out=tmp_path, data=data)["metrics"]
    assert 0 <= metrics["holdout"] <= 1  # the mean over those that have one
    told = [k for record in read_metrics(tmp_path) for k, c in record["clients"].items() if "holdout" in c]
    assert set(told) == {"0", "2"}
