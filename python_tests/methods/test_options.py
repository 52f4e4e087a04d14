"""Options of methods, declarations of uploads, flags of hooks, and terms of the gradient."""

import math
import re
import types
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedkern import methods, ops
from fedkern.errors import UserError
from fedkern.methods.base import VOUCHED
from fedkern.methods.options import Options
from fedkern.methods.uploads import Maybe, Number, Values, all_finite, why_refused
from fedkern.ops._core import backend
from fedkern.typed_option import option


@dataclass(frozen=True)
class Example(Options):
    lam: float = option(1.0, "a weight", low=0, high=10, name="lambda")
    count: int = option(3, "a number", low=1)
    flag: bool = option(True, "a switch")
    kind: str = option("mean", "a word", choices=("mean", "zero"))
    temperature: float = option(1.0, "a temperature", above=0, infinite=True)
    step: float = option(0.5, "a step size", low=0)


def test_defaults():
    assert Example.parse([]) == Example()
    settings = {"lambda": 1.0, "count": 3, "flag": True, "kind": "mean", "temperature": 1.0, "step": 0.5}
    assert Example().to_dict() == settings


@pytest.mark.parametrize(("word", "field", "value"), [
    ("lambda=2", "lam", 2.0), ("lam=0.5", "lam", 0.5), (" lambda = 0.5 ", "lam", 0.5),
    ("count=7", "count", 7),
    ("flag=off", "flag", False),
    ("flag=YES", "flag", True),
    ("flag=0", "flag", False),
    ("kind=zero", "kind", "zero"),
    ("temperature=inf", "temperature", math.inf),
])  # fmt: skip
def test_values_get_their_types_under_published_and_field_names(word, field, value):
    result = getattr(Example.parse([word]), field)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(("word", "message"), [
    ("lambda=-1", r'"lambda" must be in \[0, 10\], not -1'),
    ("lambda=11", r"in \[0, 10\]"),
    ("lambda=nan", r"in \[0, 10\], not nan"),
    ("lambda=much", 'must be a number, not "much"'),
    ("count=0", "at least 1"),
    ("count=1.5", "must be an integer"),
    ("flag=perhaps", "must be true or false"),
    ("kind=zer", r'one of mean, zero, not "zer".*Did you mean "zero"'),
    ("temperature=0", "above 0"),
    ("step=inf", '"step" must be finite, not inf'),
    ("step=1e31", r'"step" must be at most 1e\+30, not 1e\+31'),
    ("temperature=1e300", r'"temperature" must be at most 1e\+30, not 1e\+300'),
    ("lambda=1e300", r"in \[0, 10\], not 1e\+300"),
    ("count=2147483648", '"count" must be at most 2147483647, not 2147483648'),
    ("count=" + "9" * 400, "at most 2147483647, not 999"),
    ("lamda=1", r'Unknown method option "lamda" of this method.*Did you mean "lambda"'),
    ("lambda", "must have the form key=value"),
])  # fmt: skip
def test_mistakes_are_one_sentence(word, message):
    with pytest.raises(UserError, match=message):
        Example.parse([word])


@pytest.mark.parametrize(("key", "value"), [("kind", ["mean"]), ("kind", {"a": 1}), ("step", [1]), ("flag", [True])])
def test_lists_and_tables_of_a_config_file_are_no_values(key, value):
    with pytest.raises(UserError, match=rf'"{key}" must be '):
        Example.parse({key: value})


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [("count", kind(2), 2) for kind in (np.int8, np.uint64, np.float32, np.float64, Fraction, torch.tensor)]
    + [("step", kind(2), 2.0) for kind in (np.int8, np.uint64, np.float16, np.float64, Fraction, torch.tensor)]
    + [("flag", np.True_, True)],
)
def test_numbers_of_every_kind_become_pythons(key, value, plain):
    for made in (Example.parse({key: value}), Example(**{key: value})):
        assert type(getattr(made, key)) is type(plain)
        assert getattr(made, key) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [("count", kind(2.5)) for kind in (float, np.float32, np.float64, Fraction, torch.tensor)]
    + [(key, value) for key in ("count", "step") for value in (True, np.True_, np.ones(2), 1j)],
)
def test_what_is_no_such_number_is_refused(key, value):
    with pytest.raises(UserError, match=rf'"{key}" must be an? (integer|number), not '):
        Example.parse({key: value})


def test_every_number_of_every_method_fits_the_networks():
    for name, kind in methods.METHODS.items():
        for spec in kind.Options.list_options():
            if spec.type is float:
                with pytest.raises(UserError, match=rf'"{spec.name}" must be '):
                    kind.Options.parse({spec.name: 1e300}, method=name)


def test_given_twice():
    with pytest.raises(UserError, match='"lambda" is given twice'):
        Example.parse(["lambda=1", "lam=2"])


def test_checked_when_constructed_directly():
    with pytest.raises(UserError, match="at least 1"):
        Example(count=0)


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_is_described_and_its_options_round_trip(name):
    method = methods.METHODS[name]
    assert method.description
    assert "\n" not in method.description
    options = method.Options()
    assert method.Options.parse(options.to_dict()) == options
    given = {k: v for k, v in options.to_dict().items() if v is not None}  # an option left open has no text
    assert method.Options.parse([f"{k}={v}" for k, v in given.items()]) == options
    for spec in method.Options.list_options():
        assert spec.help


def test_every_published_option_of_fedgid_can_be_set():
    names = {spec.name for spec in methods.METHODS["fedgid"].Options.list_options()}
    assert {
        "alpha", "lambda", "temperature", "mix_stage", "kl_direction", "distill_on",
        "intervention", "distillation",
    } <= names  # fmt: skip


def test_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match=r'Unknown method "fedgdi".*Did you mean "fedgid"'):
        methods.get("fedgdi")


def test_registering_a_name_twice_or_without_description():
    with pytest.raises(ValueError, match="already registered"):

        @methods.register("fedavg")
        class Other(methods.FedAvg):
            """Another."""

    with pytest.raises(TypeError, match="docstring"):

        @methods.register("nameless")
        class Nameless(methods.FedAvg):
            pass

    assert "nameless" not in methods.METHODS


def test_a_class_without_the_decorator_is_told() -> None:
    class Undecorated(Options):
        mu: float = option(0.1, "weight")

    said = r"Undecorated declares options: write @dataclass\(frozen=True\) above the class"
    with pytest.raises(UserError, match=said):
        Undecorated.parse(["mu=1"])


# -- base --------------------------------------------------------------------------------------------------------------


FLAGS = tuple(VOUCHED)


def overriding(hook, base=methods.FedAvg, **declared):
    def call(self, *arguments):
        return getattr(base, hook)(self, *arguments)

    return type("Derived", (base,), {hook: call, **declared})


@pytest.mark.parametrize(
    ("hook", "lost"),
    [
        ("server_update", {"averages", "reduce", "asynchronous"}), ("average", {"averages", "reduce", "asynchronous"}),
        ("weight", {"reduce", "asynchronous"}), ("client_update", {"asynchronous"}), ("terms", {"asynchronous"}),
        ("loss", {"replayable"}), ("evaluate", set()), ("expects", set()),
    ],
)  # fmt: skip
def test_a_class_that_overrides_a_hook_loses_the_flags_that_vouch_for_it(hook, lost):
    kind = overriding(hook)
    assert {name for name in FLAGS if not getattr(kind, name)} == lost
    again = overriding(hook, **{name: getattr(methods.FedAvg, name) for name in lost})
    for derived in (again, type("Further", (again,), {})):
        assert all(getattr(derived, name) == getattr(methods.FedAvg, name) for name in FLAGS)
    assert {name for name in FLAGS if not getattr(type("Further", (kind,), {}), name)} == lost


def test_hooks_of_a_mixin_count_and_no_flag_comes_from_a_hook():
    class Mixin:
        def server_update(self, server, phase, uploads):
            pass

    assert type("Mixed", (Mixin, methods.FedAvg), {}).averages is None
    assert type("Mixed", (methods.FedAvg, Mixin), {}).averages
    assert overriding("server_update", methods.METHODS["fedcgs"]).averages is False
    assert methods.LocalTraining.asynchronous is False
    with pytest.raises(TypeError, match=r"Derived.reduce: expected a tuple of names, given <function"):
        overriding("weight", reduce=lambda self, phase: ())


# -- uploads -----------------------------------------------------------------------------------------------------------


def test_named_sizes_must_agree():
    declared = {"classes": Values(("n",), torch.int64, low=0, high=4), "means": Values(("n", 3))}
    good = {"classes": torch.tensor([1, 4]), "means": torch.zeros(2, 3)}
    assert why_refused(good, declared) == ""
    assert why_refused({"classes": torch.zeros(0, dtype=torch.int64), "means": torch.zeros(0, 3)}, declared) == ""
    said = why_refused({**good, "means": torch.zeros(1, 3)}, declared)
    assert said == "has means of shape [1, 3] and torch.float32 where shape [2, 3] and torch.float32 are expected"
    assert (
        why_refused({**good, "classes": torch.tensor([-1, 4])}, declared) == "has classes with -1 where 0 is the least"
    )
    assert "where 4 is the largest" in why_refused({**good, "classes": torch.tensor([1, 5])}, declared)


def test_numbers_have_a_range():
    assert why_refused({"n": 3}, {"n": Number(low=1, integer=True)}) == ""
    assert why_refused({"n": 0}, {"n": Number(low=1, integer=True)}).startswith("has n 0 where a number from 1 to any")
    assert why_refused({"n": 2.5}, {"n": Number(integer=True)}) == "has float n where an integer is expected"
    assert why_refused({}, {"n": Maybe(Number())}) == ""


def test_long_names_are_cut():
    said = why_refused({"x" * 200_000: 1}, {})
    assert re.fullmatch(r"should not hold x{76} \.\.\.", said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_all_finite(dtype):
    large = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)  # a sum that overflows
    assert all_finite(large)
    assert all_finite(large[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = large.clone()
        spoiled[1, 2] = bad
        assert not all_finite(spoiled)
    infinite = torch.zeros(4, dtype=dtype)
    infinite[0], infinite[1] = torch.inf, -torch.inf
    assert not all_finite(infinite)
    assert all_finite(torch.zeros(2, dtype=torch.int64))


# -- terms -------------------------------------------------------------------------------------------------------------


def make_received(size):
    draw = torch.Generator().manual_seed(0)
    start, correction = (torch.randn(size, generator=draw) for _ in range(2))
    extras = {"correction": correction, "path": methods.GradientSum(torch.zeros(size))}
    return types.SimpleNamespace(parameters=start, message={"alpha": 0.2}, extras=extras)


def alike():
    """Return whether torch's kernels fuse products and sums where the CPU core does."""
    return (torch.backends.cpu.get_cpu_capability() == "DEFAULT") == (backend.cpu_core().isa() == "portable")


OF_TERMS = [methods.FedProx(methods.FedProx.Options(mu=0.3)), methods.Scaffold(), methods.FedDyn()]


@pytest.mark.parametrize("method", OF_TERMS, ids=["fedprox", "scaffold", "feddyn"])
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
    assert methods.FedProx(methods.FedProx.Options(mu=0)).terms(make_received(3)) is None


def test_raw_gradients_are_summed_and_counted():
    total = methods.GradientSum(torch.zeros(2))
    terms = methods.Terms(correction=torch.ones(2), gradient_sum=total)
    for value in (1.0, 3.0):
        gradients = torch.full((2,), value)
        terms.add_to(gradients, torch.zeros(2))
        assert gradients.tolist() == [value + 1] * 2
    assert total.mean().tolist() == [2.0, 2.0]


def test_an_objective_has_no_terms_of_its_own():
    gradients = torch.ones(3)
    methods.Objective().adjust_gradient(torch.zeros(3), gradients, make_received(3))
    assert gradients.equal(torch.ones(3))
