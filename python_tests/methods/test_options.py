"""A method's options: types, ranges, published names, messages."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedkern.errors import UserError
from fedkern.methods import METHODS, get, register
from fedkern.methods.options import Options
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


@pytest.mark.parametrize("word", ["lambda=0.5", "lam=0.5", " lambda = 0.5 "])
def test_published_and_field_names(word):
    assert Example.parse([word]).lam == 0.5


@pytest.mark.parametrize(("word", "field", "value"), [
    ("lambda=2", "lam", 2.0),
    ("count=7", "count", 7),
    ("flag=off", "flag", False),
    ("flag=YES", "flag", True),
    ("flag=0", "flag", False),
    ("kind=zero", "kind", "zero"),
    ("temperature=inf", "temperature", math.inf),
])  # fmt: skip
def test_values_get_their_types(word, field, value):
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
    for name, kind in METHODS.items():
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


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_described_and_its_options_round_trip(name):
    method = METHODS[name]
    assert method.description
    assert "\n" not in method.description
    options = method.Options()
    assert method.Options.parse(options.to_dict()) == options
    given = {k: v for k, v in options.to_dict().items() if v is not None}  # an option left open has no text
    assert method.Options.parse([f"{k}={v}" for k, v in given.items()]) == options
    for spec in method.Options.list_options():
        assert spec.help


def test_every_published_option_of_fedgid_can_be_set():
    names = {spec.name for spec in METHODS["fedgid"].Options.list_options()}
    assert {
        "alpha", "lambda", "temperature", "mix_stage", "kl_direction", "distill_on",
        "intervention", "distillation",
    } <= names  # fmt: skip


def test_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match=r'Unknown method "fedgdi".*Did you mean "fedgid"'):
        get("fedgdi")


def test_registering_a_name_twice_or_without_description():
    from fedkern.methods import FedAvg

    with pytest.raises(ValueError, match="already registered"):

        @register("fedavg")
        class Other(FedAvg):
            """Another."""

    with pytest.raises(TypeError, match="docstring"):

        @register("nameless")
        class Nameless(FedAvg):
            pass

    assert "nameless" not in METHODS


def test_a_class_without_the_decorator_is_told() -> None:
    class Undecorated(Options):
        mu: float = option(0.1, "weight")

    said = r"Undecorated declares options: write @dataclass\(frozen=True\) above the class"
    with pytest.raises(UserError, match=said):
        Undecorated.parse(["mu=1"])
