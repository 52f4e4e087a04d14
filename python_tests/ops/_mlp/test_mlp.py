"""Tests of mlp: loss and gradients of linear layers, beside autograd's."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fedkern.ops import FlatParameters, sgd_step
from fedkern.ops._core import backend
from fedkern.ops._mlp.mlp import Layer, MlpPass, mlp_reference
from fedkern.ops._optimise.kernels import Call

pytestmark = pytest.mark.skipif(backend.active_isa() == "none", reason="the compiled core is missing")


def make(sizes, *, bias=True, seed=0, scale=1.0):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(sizes):
        weight, biases = scale * torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs) if bias else None
        layers.append(Layer(weight, biases, torch.full_like(weight, 7), torch.full((outputs,), 7.0) if bias else None))
    return layers


def batch(sizes, rows):
    return torch.randn(rows, sizes[0]), torch.randint(0, sizes[-1], (rows,))


def gradients(layers):
    return [tensor.clone() for layer in layers for tensor in layer[2:] if tensor is not None]


def check(layers, x, targets):
    loss = MlpPass(layers)(x, targets)
    found = gradients(layers)
    expected = mlp_reference(layers, x, targets)
    assert isinstance(loss, Tensor)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    size = max(float(tensor.nan_to_num().abs().max()) for tensor in gradients(layers))  # sums may cancel
    for mine, wanted in zip(found, gradients(layers), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=4e-6 * size + 1e-9, equal_nan=True)


@pytest.mark.parametrize("isa", backend.ISAS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [((5, 3), 1), ((60, 10), 10), ((7, 9, 11, 3), 5), ((64, 128, 10), 32), ((300, 33, 2), 70), ((784, 20, 20, 10), 17),
     ((1, 1, 2), 3), ((600, 13, 10), 129)],
)  # fmt: skip
def test_numbers_are_those_of_autograd(sizes, rows, bias, isa):
    if isa not in backend.cpu_core().available_isas():
        pytest.skip(f"this processor lacks {isa}")
    layers = make(sizes, bias=bias)
    x, targets = batch(sizes, rows)
    with backend.use_isa(isa):
        check(layers, x, targets)
        targets[::3] = -100
        if (targets >= 0).any():
            check(layers, x, targets)


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_far_logits_do_not_overflow(scale):
    layers = make((20, 16, 5), scale=scale)
    check(layers, *batch((20, 16, 5), 9))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_shows_in_the_loss(value):
    layers = make((20, 16, 5))
    x, targets = batch((20, 16, 5), 9)
    x[3, 4] = value
    assert not torch.isfinite(MlpPass(layers)(x, targets))


def test_bits_depend_neither_on_threads_nor_on_the_level():
    sizes = (900, 301, 10)
    layers, (x, targets) = make(sizes), batch(sizes, 75)
    found, threads = [], torch.get_num_threads()
    for isa in {"avx2", "avx512"}.intersection(backend.cpu_core().available_isas()):
        for count in (1, 3):
            torch.set_num_threads(count)
            with backend.use_isa(isa):
                found.append((MlpPass(layers)(x, targets), *gradients(layers)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for tensors in found for a, b in zip(found[0], tensors, strict=True))


def test_the_loss_is_fp32_whatever_torchs_default_is():
    layers, (x, targets) = make((4, 3)), batch((4, 3), 5)
    torch.set_default_dtype(torch.float64)
    try:
        assert MlpPass(layers)(x, targets).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_images_count_as_flattened():
    layers, (x, targets) = make((48, 8, 3)), batch((48, 8, 3), 6)
    loss = MlpPass(layers)(x, targets)
    images = x.view(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(MlpPass(layers)(images, targets), loss)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x, torch.full_like(y, -100)),
        lambda x, y: (x, torch.tensor([0, 1, 3])),
        lambda x, y: (x, torch.tensor([0, 1, -1])),
        lambda x, y: (x.double(), y),
        lambda x, y: (x, y.int()),
        lambda x, y: (x[:2], y),
        lambda x, y: (x[:0], y[:0]),
        lambda x, y: (x, y[:, None]),
    ],
)
def test_what_the_kernel_does_not_take_leaves_the_gradients_alone(change):
    layers = make((4, 3))
    assert MlpPass(layers)(*change(*batch((4, 3), 3))) is None
    assert all((tensor == 7).all() for tensor in gradients(layers))


def one_vector(sizes):
    """Layers whose parameters, and gradients, lie in one vector."""
    torch.manual_seed(1)
    network = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))
    flat = FlatParameters(network)
    gradients = flat.gradients()
    layers = [Layer(part.weight, part.bias, part.weight.grad, part.bias.grad) for part in network]
    return layers, flat.parameters.detach(), gradients


@pytest.mark.parametrize("terms", [(), ("first",), ("anchor", "correction", "gradient_sum"), ("max_norm",)])
def test_training_on_joined_batches_has_the_bits_of_single_steps(terms):
    parts, found = [12, 7, 1, 12], []
    x, targets = batch((20, 16, 5), sum(parts))
    targets[3] = -100
    for joined in (True, False):
        layers, theta, gradients = one_vector((20, 16, 5))
        given = {name: 0.1 if name == "max_norm" else 0.01 + torch.zeros_like(theta) for name in terms}
        given |= {"momentum": 0.9 * ("first" in given), "proximal": 0.1 * ("anchor" in given), "weight_decay": 1e-3}
        call, passing = Call(theta, gradients, lr=0.1, zero=True, **given), MlpPass(layers)
        given["velocity"] = given.pop("first", None)
        if joined:
            losses, squares = passing.train(x, targets, torch.tensor(parts), call)
        else:
            losses, squares = torch.zeros(2, 4, dtype=torch.float64)
            for i, pair in enumerate(zip(x.split(parts), targets.split(parts), strict=True)):
                losses[i] = passing(*pair)
                squares[i] = sgd_step(theta, gradients, lr=0.1, zero=True, **given).squared_norm
        found.append((losses, squares, theta, *(value for value in call[2:7] if value is not None)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("parts", "wrong"), [([4, 4], 5), ([4, 4], -100), ([4, 5], 0), ([4, 0, 4], 0)])
def test_batches_that_do_not_fit_are_not_trained_on(parts, wrong):
    layers, theta, gradients = one_vector((20, 5))
    x, targets = batch((20, 5), 8)
    targets[4:] = wrong
    before = theta.clone()
    assert MlpPass(layers).train(x, targets, torch.tensor(parts), Call(theta, gradients, lr=0.1)) is None
    assert torch.equal(theta, before)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([*make((4, 3)), *make((4, 3))], "do not follow each other"),
        ([make((4, 3))[0]._replace(weight_gradient=torch.zeros(3, 5))], "of its layers' sizes"),
        ([make((4, 3))[0]._replace(bias=torch.zeros(3).double())], "float32"),
        ([make((4, 3))[0]._replace(weight=torch.zeros(4, 3).t())], "contiguous"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(layers, words):
    with pytest.raises(ValueError, match=words):
        MlpPass(layers)(*batch((4, 3), 3))
