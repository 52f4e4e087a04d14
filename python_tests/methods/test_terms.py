"""Terms that methods add to the gradient: in place and inside the optimiser's kernel, bit for bit."""

import types

import pytest
import torch

from fedkern import ops
from fedkern.methods import FedDyn, FedProx, GradientSum, Objective, Scaffold, Terms
from fedkern.ops._core import backend


def make_received(size):
    draw = torch.Generator().manual_seed(0)
    start, correction = (torch.randn(size, generator=draw) for _ in range(2))
    extras = {"correction": correction, "path": GradientSum(torch.zeros(size))}
    return types.SimpleNamespace(parameters=start, message={"alpha": 0.2}, extras=extras)


def alike():
    """Return whether torch's kernels fuse products and sums where the CPU core does."""
    return (torch.backends.cpu.get_cpu_capability() == "DEFAULT") == (backend.cpu_core().isa() == "portable")


METHODS = [FedProx(FedProx.Options(mu=0.3)), Scaffold(), FedDyn()]


@pytest.mark.parametrize("method", METHODS, ids=["fedprox", "scaffold", "feddyn"])
def test_a_step_has_the_bits_of_the_gradient_changed_in_place(method):
    if backend.select("optimise", torch.ones(1)) is not None and not alike():
        pytest.skip("torch fuses other products at its own ISA level")
    results = []
    for kernel in (False, True):
        given, theta = make_received(1001), torch.linspace(-1, 1, 1001)
        terms = method.terms(given)
        for k in range(3):
            gradients = torch.randn(1001, generator=torch.Generator().manual_seed(k))
            if kernel:
                ops.sgd_step(theta, gradients, lr=0.1, **terms.arguments())
            else:
                method.adjust_gradient(theta, gradients, given)
                theta.add_(gradients, alpha=-0.1)
        results.append([theta, given.extras["path"].total])
    assert all(x.equal(y) for x, y in zip(*results, strict=True))


def test_fedprox_with_mu_zero_has_no_terms():
    assert FedProx(FedProx.Options(mu=0)).terms(make_received(3)) is None


def test_raw_gradients_are_summed_and_counted():
    total = GradientSum(torch.zeros(2))
    terms = Terms(correction=torch.ones(2), gradient_sum=total)
    for value in (1.0, 3.0):
        gradients = torch.full((2,), value)
        terms.add_to(gradients, torch.zeros(2))
        assert gradients.tolist() == [value + 1] * 2
    assert total.mean().tolist() == [2.0, 2.0]


def test_an_objective_has_no_terms_of_its_own():
    gradients = torch.ones(3)
    Objective().adjust_gradient(torch.zeros(3), gradients, make_received(3))
    assert gradients.equal(torch.ones(3))
