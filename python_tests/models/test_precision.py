"""Networks in bf16: dtypes of answers, distance to fp32, and cast weights, optimisers against torch.optim."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkern import models
from fedkern.models import Ensemble
from fedkern.models.blocks import cut_network
from fedkern.models.fused import Branch, FusedLevel, FusedNetwork
from fedkern.models.networks.generator import Generator
from fedkern.models.networks.unet import UNet
from fedkern.models.optimisers import SGD, Adam
from fedkern.models.precision import autocasts, cast_frozen, compute_in, reduced_dtype
from fedkern.models.teachers.teacher import trained_teacher
from fedkern.models.teachers.teacher_cache import LogitsCache
from fedkern.models.teachers.teacher_stack import TeacherStack, fold_norms

BF16 = torch.bfloat16


def images(count=6, side=16, seed=0):
    made = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last)


def build(name, width=16, seed=0, side=16):
    return models.build(name, classes=4, channels=3, image_size=side, width=width, seed=seed)


def near(given, exact, bound=0.05):
    """Return whether the norm of the difference is small beside the exact one's."""
    return float((given - exact).detach().norm()) < bound * float(exact.detach().norm())


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_networks_answers_are_fp32_and_near(name):
    side = 32 if name == "efficientnet-b0" else 16
    own, x = build(name, 24 if name == "vit-tiny" else 16, side=side).eval(), images(side=side)
    with torch.no_grad():
        exact = own(x)
        with compute_in("bf16"):
            given = own(x)
            features = own.features(x)
            maps = None if isinstance(own, UNet) else own.stages(x, upto="layer2")
    assert given.dtype == features.dtype == torch.float32
    assert maps is None or name == "vit-tiny" or maps.dtype == BF16
    assert not torch.equal(given, exact)  # it was computed in bf16
    assert near(given, exact)
    assert torch.equal(own(x).detach(), exact)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet8-gn", "vit-tiny", "unet-small"])
def test_one_steps_gradient_is_near(name):
    own, x = build(name, 24).train(), images(8)
    labels = torch.arange(8) % 4
    labels = labels[:, None, None].expand(8, 16, 16) if name == "unet-small" else labels
    found = []
    for precision in ("fp32", "bf16"):
        own.zero_grad()
        with compute_in(precision):
            loss = F.cross_entropy(own(x), labels)
        assert loss.dtype == torch.float32
        loss.backward()
        assert {p.grad.dtype for p in own.parameters()} == {torch.float32}
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in own.parameters()])))
    (loss, exact), (rounded, given) = found
    assert float(rounded) == pytest.approx(float(loss), rel=0.02)
    assert near(given, exact, 0.3)  # batch norm of few positions makes much of little


def test_stages_and_tail_are_the_features():
    own, x = build("resnet8").eval(), images()
    with torch.no_grad(), compute_in("bf16"):
        for stage in own.stage_names:
            assert torch.equal(own.tail(own.stages(x, upto=stage), after=stage), own.features(x))


@pytest.mark.parametrize("name", ["cnn", "resnet8-gn", "vit-tiny", "unet-small"])
def test_a_frozen_copy_answers_with_the_same_bits(name):
    own, x = build(name, 24).eval(), images()
    before = {key: value.clone() for key, value in own.state_dict().items()}
    assert cast_frozen(own) is own
    with torch.no_grad(), compute_in("bf16"):
        copy = cast_frozen(own)
        assert torch.equal(copy(x), own(x))
    kinds = {p.dtype for p in copy.parameters()}
    assert kinds == {torch.float32, BF16}
    assert copy.head.weight.dtype == torch.float32
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())


def test_generated_images_are_fp32_and_near():
    made = Generator(nz=8, ngf=8, image_size=16, generator=torch.Generator().manual_seed(0)).eval()
    z = torch.randn(4, 8)
    with torch.no_grad():
        exact = made(z)
        with compute_in("bf16"):
            given = made(z)
    assert given.dtype == torch.float32
    assert not torch.equal(given, exact)
    assert near(given, exact, 0.02)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kinds", [["resnet8"] * 3, ["cnn"] * 2, ["vit-tiny"], ["cnn", "resnet8"], ["unet-small"] * 2])
@pytest.mark.parametrize("width", [8, 24])
def test_teachers_together(kinds, width, grad):
    networks = [build(name, width, seed=k).eval().requires_grad_(False) for k, name in enumerate(kinds)]
    x = images(80 if not grad else 6).requires_grad_(grad)
    exact = torch.stack([network(x) for network in networks])
    before = [p.clone() for network in networks for p in network.parameters()]
    with compute_in("bf16"):
        bank = TeacherStack(networks)
        given = bank.logits(x)
    assert given.dtype == torch.float32
    assert not torch.equal(given, exact)
    assert near(given, exact)
    assert all(torch.equal(a, p) for a, p in zip(before, (p for n in networks for p in n.parameters()), strict=True))
    if grad:
        (own,), (wanted,) = torch.autograd.grad(given.sum(), x), torch.autograd.grad(exact.sum(), x)
        assert own.dtype == torch.float32
        assert near(own, wanted, 0.2)


class Doubled(type(build("cnn"))):
    """A user-defined network that doubles its logits."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_teachers_of_another_kind_keep_what_they_make_of_their_logits():
    own = Doubled(classes=4, width=8).eval().requires_grad_(False)
    with torch.no_grad():
        exact = own(images())
        with compute_in("bf16"):
            assert near(TeacherStack([own]).logits(images())[0], exact)


def test_an_ensemble_in_either_precision():
    members = [build("cnn", 8, seed=k) for k in range(3)]
    ensemble, x = Ensemble(members), images()
    with torch.no_grad():
        exact = ensemble(x)
        with compute_in("bf16"):
            given = ensemble(x)
        assert torch.equal(ensemble(x), exact)  # what was made for bf16 does not serve fp32
    assert given.dtype == torch.float32
    assert not torch.equal(given, exact)
    assert near(given, exact)
    assert {p.dtype for p in ensemble.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["cnn", "vit-tiny"])
def test_fused_levels_in_either_precision(name):
    networks = [cut_network(build(name, 24, seed=k).eval(), 1) for k in range(2)]
    branches = [Branch(n.blocks[0], None, {"block": n.blocks[0].state_dict()}) for n in networks]
    fused, x = FusedNetwork([FusedLevel(branches)], networks[0].head), images()
    with torch.no_grad():
        exact = fused(x)
        with compute_in("bf16"):
            given = fused(x)
        assert torch.equal(fused(x), exact)
    assert given.dtype == torch.float32
    assert not torch.equal(given, exact)
    assert near(given, exact)
    kept = {key: value.clone() for key, value in fused.state_dict().items()}
    assert BF16 not in {value.dtype for value in kept.values()}
    with torch.no_grad(), compute_in("bf16"):
        fused.load_state_dict({key: value * 2 if key.endswith("weight") else value for key, value in kept.items()})
        assert not torch.equal(fused(x), given)


def test_batch_norms_statistics_stay_fp32():
    own = fold_norms(build("cnn").train())
    with compute_in("bf16"):
        trained = build("cnn").train()
        trained(images())
    assert trained.layer1[1].running_mean.dtype == torch.float32
    assert own.layer1[0].weight.dtype == torch.float32


def test_a_teachers_kept_answers_are_those_of_fp32(tmp_path):
    teacher = trained_teacher(build("cnn").eval(), "mine", 4)
    cache = LogitsCache(str(tmp_path), (0.5,) * 3, (0.2,) * 3)
    x = images()
    exact = teacher.logits(x)
    with compute_in("bf16"):
        assert torch.equal(cache.logits(teacher, [x]), exact)
        live = teacher.logits(x)
    assert live.dtype == torch.float32
    assert not torch.equal(live, exact)
    assert near(live, exact)
    assert torch.equal(teacher.logits(x), exact)


def test_the_precision_ends_with_its_block():
    class Sum(torch.nn.Module):
        @autocasts
        def forward(self, x):
            return reduced_dtype(), torch.is_autocast_enabled("cpu")

    with compute_in("bf16"):
        assert Sum()(torch.zeros(1)) == (BF16, True)
        with compute_in("fp32"):
            assert Sum()(x=torch.zeros(1)) == (None, False)
        assert not torch.is_autocast_enabled("cpu")
    assert Sum()(torch.zeros(1)) == (None, False)


# -- optimisers --------------------------------------------------------------------------------------------------------


SHAPES = ((3, 4), (17,), (), (2, 3, 5, 5))
PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "plain": (lambda p: SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (
        lambda p: SGD(p, 0.1, 0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    ),
    "nesterov": (
        lambda p: SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True),
    ),
    "adam": (lambda p: Adam(p, 0.1, (0.5, 0.999)), lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.999), fused=True)),
    "adam with decay": (
        lambda p: Adam(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, fused=True),
    ),
    "adamw": (
        lambda p: Adam(p, 0.1, weight_decay=0.1, decoupled=True),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    ),
}


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("name", PAIRS)
def test_to_the_last_bit(name: str) -> None:
    mine, theirs = draw(0), draw(0)
    ours, torchs = (make(tensors) for make, tensors in zip(PAIRS[name], (mine, theirs), strict=True))
    for step in range(5):
        gradients = draw(step + 1)
        for copies in (mine, theirs):
            for i, (tensor, gradient) in enumerate(zip(copies, gradients, strict=True)):
                tensor.grad = None if i == step else gradient.clone()  # another one has none in every step
        rate = 0.1 / (step + 1)
        ours.lr = torchs.param_groups[0]["lr"] = rate
        ours.step()
        torchs.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        kept = [tensor.grad for i, tensor in enumerate(mine) if i != step]
        assert all(torch.equal(a, b) for a, b in zip(kept, gradients[:step] + gradients[step + 1 :], strict=True))
    for a, b in zip(mine, theirs, strict=True):
        remembered = {key: value for key, value in torchs.state[b].items() if value is not None}
        assert ours.state.get(a, {}).keys() == remembered.keys()
        assert all(torch.equal(ours.state[a][key], value) for key, value in remembered.items())
    ours.zero_grad()
    assert all(tensor.grad is None for tensor in mine)
