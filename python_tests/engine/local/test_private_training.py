"""Training with DP-SGD: against plain gradients, clipped, noised, booked, the same after a resume."""

import dataclasses
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkern import models, ops
from fedkern.data import IGNORE, Split
from fedkern.data.forms import ImageForm
from fedkern.engine.batches.images import Images
from fedkern.engine.local.private_training import train_privately
from fedkern.engine.local.training import Diverged, Schedule
from fedkern.errors import UserError
from fedkern.methods import METHODS
from fedkern.methods.base import Objective, Phase
from fedkern.privacy import DPSGD, LEDGER
from fedkern.privacy.dpsgd import check_network, generator_of, private_steps
from fedkern.process.interrupts import Terminated, in_order
from fedkern.streams import stream
from python_tests.interrupted import lose

FORM = ImageForm((3, 8, 8), (0.5,) * 3, (0.2,) * 3)

PHASE = Phase(0, "teachers", "teachers")


class Supervised(Objective):
    def loss(self, model, batch, received):
        return F.cross_entropy(model(batch.inputs), batch.targets)


@pytest.fixture
def data(make_data):
    split = make_data((12,)).clients[0]
    return Images(split, FORM, torch.device("cpu"), cache=True)


def client(seed=0):
    return SimpleNamespace(
        id=0, state={}, report={},
        rng=lambda purpose, phase: stream(seed, f"{purpose}/{phase.exchange}", round=phase.round, client=0),
    )  # fmt: skip


def network():
    return models.build("cnn-gn", classes=3, channels=3, image_size=8, width=4, seed=0)


def train(module, data, *, method=None, site=None, noise=0.0, max_norm=1e6, secret="", rows=None, **schedule):
    site = client() if site is None else site
    usual = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.0, "epochs": 1, "batch_size": 12}
    spending = DPSGD(max_norm, lambda rate, steps: noise, "teacher", secret)
    schedule = Schedule(**{**usual, **schedule})
    figures = train_privately(site, method or Supervised(), PHASE, module, data, None, schedule, spending, rows)
    return site, figures


def vector(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def take_steps(module, optimizer, batch, count):
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(module(batch.inputs), batch.targets).backward()
        optimizer.step()


def test_without_noise_and_clipping_it_is_plain_gradient_descent(data):
    """Every sample is in every batch here, so the steps are those of gradient descent on all data."""
    module, plain = network(), network()
    train(module, data, epochs=3, momentum=0.9, weight_decay=0.01)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    take_steps(plain, optimizer, data.batch(np.arange(12)), 3)
    assert torch.allclose(vector(module), vector(plain), atol=1e-5)
    assert not any(hasattr(parameter, "grad_sample") for parameter in module.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())


@pytest.mark.parametrize("side", [1, 2, 5])
@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (3, 3), (8, 3), (8, 1)])
def test_gradients_of_samples_are_right_for_every_stride_of_a_map(side, channels, kernel):
    """Maps of one pixel occur in the last stages on small images, where opacus would read wrong values."""
    x = torch.randn(4, side, side, channels).permute(0, 3, 1, 2)
    layer = nn.Conv2d(channels, 2, kernel, padding=kernel // 2)
    expected = [torch.autograd.grad(layer(row[None].clone()).pow(2).sum(), layer.weight)[0] for row in x]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    generator = torch.Generator()
    with private_steps(layer, optimizer, max_norm=1.0, noise=0.0, batch=4, generator=generator):
        (layer(x).pow(2).sum() / len(x)).backward()
        torch.testing.assert_close(layer.weight.grad_sample, torch.stack(expected))


def test_a_segmentation_network_and_adamw():
    """Transposed convolutions, cross-entropy of pixels, and another optimiser have per-sample gradients."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=generator).to(torch.uint8)
    split = Split(images, torch.randint(0, 3, (3, 8, 8), generator=generator))
    data = Images(split, FORM, torch.device("cpu"), cache=True)
    module, plain = (
        models.build("unet-small-gn", classes=3, channels=3, image_size=8, width=4, seed=0) for _ in range(2)
    )
    train(module, data, lr=0.01, weight_decay=0.01, epochs=2, batch_size=3, optimizer="adamw")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.01)
    with ops.use_backend("reference"):  # per-sample gradients are of PyTorch's layers
        take_steps(plain, optimizer, data.batch(np.arange(3)), 2)
    # Adam's first steps are signs: where a gradient is next to nothing, its sign is rounding's.
    close = (vector(module) - vector(plain)).abs() < 1e-4
    assert float(close.float().mean()) > 0.99


def test_a_samples_gradient_is_clipped(data):
    """One sample changes the step by at most lr C / batch size, and by exactly that here."""
    clipped, two = network(), network()
    start = vector(clipped)
    rows = np.arange(4)
    train(clipped, data, max_norm=1e-3, batch_size=4, rows=rows, lr=1.0)
    step = (vector(clipped) - start).norm()
    assert 0 < float(step) <= 1e-3 * (1 + 1e-3)
    train(two, data, max_norm=1e-3, batch_size=1, rows=rows[:1], lr=1.0)
    single = (vector(two) - start).norm()
    assert float(single) == pytest.approx(1e-3, rel=0.02)


def test_the_noise_has_its_scale_and_its_own_stream(data):
    start, before = vector(network()), torch.random.get_rng_state()
    noised, second, reseeded = network(), network(), network()
    site, _ = train(noised, data, noise=500.0, max_norm=0.01, batch_size=4, lr=1.0)  # 3 steps of 4 of 12 samples
    train(second, data, noise=500.0, max_norm=0.01, batch_size=4, lr=1.0)
    train(reseeded, data, noise=500.0, max_norm=0.01, batch_size=4, lr=1.0, site=client(seed=1))
    moved = vector(noised) - start
    deviation = 500 * 0.01 / 4 * math.sqrt(3)
    assert float(moved.std()) == pytest.approx(deviation, rel=0.1)
    assert torch.equal(vector(noised), vector(second))
    assert not torch.equal(vector(noised), vector(reseeded))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert site.state[LEDGER] == {"teacher": [["dp-sgd", 500.0, 4 / 12, 3]]}


def test_sampling_and_noise_follow_from_a_secret_too(data):
    found = {}
    for noise in (0.0, 500.0):  # samples alone; next to nothing but noise
        for name, secret in (("seed", ""), ("one", "a"), ("again", "a"), ("other", "b")):
            module = network()
            train(module, data, noise=noise, max_norm=0.01, batch_size=4, lr=1.0, secret=secret)
            found[noise, name] = vector(module)
        assert torch.equal(found[noise, "one"], found[noise, "again"])
        for pair in (("seed", "one"), ("one", "other")):
            assert not torch.equal(*(found[noise, name] for name in pair))


def test_the_noise_of_a_secret_has_more_than_the_32_bits_of_a_seed():
    """Streams with the same seed differ if the rest of their keys does."""
    draws = []
    for word in (1, 2):
        numbers = iter([7, np.full(624, word, dtype=np.uint64)])
        source = SimpleNamespace(integers=lambda *a, numbers=numbers, **k: next(numbers))
        draws.append(torch.randn(1000, generator=generator_of(source, torch.device("cpu"), full_state=True)))
    assert not torch.equal(*draws)
    drawn = torch.randn(100_000, generator=generator_of(stream(0, "a"), torch.device("cpu"), full_state=True))
    assert float(drawn.std()) == pytest.approx(1.0, rel=0.02)
    seeded = generator_of(stream(0, "a"), torch.device("cpu"), full_state=False)
    assert seeded.initial_seed() == int(stream(0, "a").integers(1 << 63))


def test_the_noise_of_a_step_is_not_cut_at_the_tail_of_fp32():
    """The generator returns the largest numbers there are, where torch's normal numbers of fp32 end at 5.77."""
    word = 0x12DD9BB3  # of the Mersenne twister's state, which tempers it to 32 ones
    tempered = word ^ word >> 11
    tempered ^= tempered << 7 & 0x9D2C5680
    tempered ^= tempered << 15 & 0xEFC60000
    assert tempered ^ tempered >> 18 == 0xFFFFFFFF
    generator = torch.Generator().manual_seed(0)
    torch.rand(1, generator=generator)  # the words are in use from here on
    state = generator.get_state()
    state.numpy()[24 : 24 + 8 * 624].view(np.uint64)[:] = word
    module = nn.Linear(32, 1, bias=False)
    start = module.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with private_steps(
        module, optimizer, max_norm=0.5, noise=2.0, batch=1.0, generator=generator.set_state(state)
    ) as private:
        module(torch.zeros(1, 32)).mean().backward()
        private.step()
    assert float((module.weight.detach() - start).abs().max()) == pytest.approx(
        math.sqrt(2 * 53 * math.log(2)), rel=1e-3
    )


def test_on_a_gpu_all_64_bits_of_the_key_are_the_streams(monkeypatch):
    given = []

    class Generator:
        def __init__(self, device):
            assert device.type == "cuda"

        def manual_seed(self, seed):
            given.append(seed)
            return self

    monkeypatch.setattr(torch, "Generator", Generator)
    for name in "abcdefgh":
        generator_of(stream(0, name), torch.device("cuda"), full_state=True)
    assert len(set(given)) == 8
    assert any(seed >= 1 << 63 for seed in given)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_counts_for_nothing_and_stops_nothing(data, value):
    """An end of the training or NaN parameters would reveal that the sample is in the data."""

    class Broken(Supervised):
        def loss(self, model, batch, received):
            losses = F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
            return (losses * torch.where(torch.from_numpy(batch.indices == 2), value, 1.0)).mean()

    broken, without = network(), network()
    _, figures = train(broken, data, method=Broken(), batch_size=3, rows=np.arange(3))
    assert math.isfinite(figures["loss"])
    batch = data.batch(np.arange(2))
    optimizer = torch.optim.SGD(without.parameters(), lr=0.1)
    (F.cross_entropy(without(batch.inputs), batch.targets) * 2 / 3).backward()
    optimizer.step()
    assert torch.allclose(vector(broken), vector(without), atol=1e-6)


def test_parameters_that_are_not_finite_are_told_at_the_end_and_paid_for(data):
    site = client()
    with pytest.raises(Diverged, match="the parameters are not finite"):
        train(network(), data, noise=1.0, lr=1e38, site=site)
    assert site.state[LEDGER] == {"teacher": [["dp-sgd", 1.0, 1.0, 1]]}


def test_steps_are_paid_for_before_the_first_one(data):
    """The ledger counts them whatever ends the training."""

    class Broken(Supervised):
        def loss(self, model, batch, received):
            raise KeyboardInterrupt

    site = client()
    with pytest.raises(KeyboardInterrupt):
        train(network(), data, method=Broken(), site=site, noise=2.0, max_norm=1.0, epochs=2, batch_size=4)
    assert site.state[LEDGER] == {"teacher": [["dp-sgd", 2.0, 4 / 12, 6]]}


def test_a_batch_without_samples_is_a_step_of_noise(data):
    module, empty = network(), network()

    class Nobody:
        def random(self, count):
            return np.ones(count)

        def integers(self, high):
            return 7

    site = client()
    site.rng = lambda purpose, phase: Nobody()
    train(module, data, noise=1.0, max_norm=0.01, batch_size=4, site=site)
    assert not torch.equal(vector(module), vector(empty))
    assert torch.isfinite(vector(module)).all()


def test_only_the_rows_that_are_given_are_drawn(data):
    seen = []

    class Watching(Supervised):
        def loss(self, model, batch, received):
            seen.extend(batch.indices.tolist())
            return super().loss(model, batch, received)

    rows, drawn = np.array([3, 5, 8]), {"epochs": 20, "batch_size": 2}
    site, _ = train(network(), data, method=Watching(), noise=1.0, max_norm=1.0, rows=rows, **drawn)
    assert set(seen) == {3, 5, 8}
    assert len(seen) == pytest.approx(40 * 2, abs=25)  # 40 steps of 2 of 3 samples in the mean
    assert site.state[LEDGER]["teacher"] == [["dp-sgd", 1.0, 2 / 3, 40]]


def test_a_network_with_batch_norm_is_refused_in_one_sentence(data):
    with pytest.raises(UserError, match="resnet8 has batch norm: choose one with group norm"):
        check_network(models.build("resnet8", classes=3, channels=3, image_size=8, seed=0), "resnet8")
    with pytest.raises(UserError, match="whose layers keep statistics"):
        check_network(Buffered(), "mine")
    check_network(network(), "cnn-gn")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.MultiheadAttention])
def test_a_layer_that_opacus_has_in_its_own_form_is_named(kind):
    with pytest.raises(UserError, match=rf"mine, which has nn\.{kind.__name__}: use opacus\.layers\.DP"):
        check_network(nn.Sequential(kind(4, 4), nn.Linear(4, 3)), "mine")


class Patches(nn.Module):
    """A network that classifies the quarters of an image as rows of the batch, and averages their logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(48, 3)

    def forward(self, images):
        quarters = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        return self.fc(quarters.reshape(-1, 48)).view(len(images), 4, 3).mean(1)


class Positions(nn.Module):
    """A network that adds a position's embedding, one row for the whole batch."""

    def __init__(self):
        super().__init__()
        self.position = nn.Embedding(64, 3)
        self.fc = nn.Linear(3, 3)

    def forward(self, images):
        return self.fc((images.flatten(2).transpose(1, 2) + self.position(torch.arange(64)[None])).mean(1))


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.idle = nn.Linear(192, 3), nn.Linear(2, 2)

    def forward(self, images):
        return self.fc(images.flatten(1))


@pytest.mark.parametrize(
    ("kind", "parameter"), [(Patches, "fc.weight"), (Positions, "position.weight"), (Idle, "idle.weight")]
)
def test_a_parameter_without_one_gradient_per_sample_ends_the_training_before_a_step(data, kind, parameter):
    """Each patch would be clipped by itself, so that a sample counts for several times the norm."""
    module = kind()
    start = vector(module)
    with pytest.raises(UserError, match=f"the parameter {parameter} of the network does not have one per sample"):
        train(module, data, noise=1.0)
    assert torch.equal(vector(module), start)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.zeros(1))


def partly_known():
    """Return three images of 8 x 8 pixels: all known, a quarter known, nothing known."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 3, (3, 8, 8), generator=generator)
    labels[1, 2:] = IGNORE
    labels[2] = IGNORE
    return Images(Split(images, labels), FORM, torch.device("cpu"), cache=True)


class Methods(Objective):
    """An objective with the methods' own loss."""

    def loss(self, model, batch, received):
        return METHODS["fediod"].loss(None, model, batch, received)


def test_a_samples_gradient_does_not_depend_on_what_is_known_of_the_others():
    """Unknown pixels of other samples, which are private, would raise a sample's weight above its clipping."""
    data, found = partly_known(), {}
    for rows in ((0, 1, 2), (0, 2), (0,), (1,), (2,)):
        torch.manual_seed(0)
        module = nn.Conv2d(3, 3, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with private_steps(module, optimizer, max_norm=1.0, noise=0.0, batch=3.0, generator=torch.Generator()):
            batch = dataclasses.replace(data.batch(np.array(rows)), per_sample=True)
            Methods().loss(module, batch, None).backward()
            for row, gradient in zip(rows, module.weight.grad_sample, strict=True):
                found.setdefault(row, []).append(gradient.clone())
    for gradients in found.values():
        assert len(gradients) > 1
        assert all(torch.allclose(gradient, gradients[0], atol=1e-6) for gradient in gradients)
    assert float(found[1][0].norm()) > 0
    assert not found[2][0].any()


def test_private_training_takes_every_images_own_mean():
    data = partly_known()
    module, plain = (
        models.build("unet-small-gn", classes=3, channels=3, image_size=8, width=4, seed=0) for _ in range(2)
    )
    train(module, data, method=Methods(), epochs=2, batch_size=3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    batch = data.batch(np.arange(3))
    for _ in range(2):
        optimizer.zero_grad()
        losses = [F.cross_entropy(plain(batch.inputs[k : k + 1]), batch.targets[k : k + 1]) for k in (0, 1)]
        (sum(losses) / 3).backward()
        optimizer.step()
    assert torch.allclose(vector(module), vector(plain), atol=1e-5)


def test_a_signal_that_got_lost_ends_the_steps_that_are_booked(data, monkeypatch):
    """The signal comes in the second of six steps, where Python loses its exception.

    No third step is made.
    """
    steps = []

    def loss(self, model, batch, received):
        steps.append(len(batch.inputs))
        if len(steps) == 2:
            lose(signal.SIGTERM)
        return F.cross_entropy(model(batch.inputs), batch.targets)

    monkeypatch.setattr(Supervised, "loss", loss)
    module, site = network(), client()
    with pytest.raises(Terminated), in_order():
        train(module, data, noise=2.0, max_norm=1.0, batch_size=12, epochs=6, site=site)
    assert len(steps) == 2
    assert site.state[LEDGER] == {"teacher": [["dp-sgd", 2.0, 1.0, 6]]}  # an upper bound, and there already
    assert not any(hasattr(parameter, "grad_sample") for parameter in module.parameters())
