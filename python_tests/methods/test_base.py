"""Flags that vouch for a method's hooks hold only for the class that declares them."""

import pytest

from fedkern.methods import METHODS, FedAvg, LocalTraining
from fedkern.methods.base import VOUCHED

FLAGS = tuple(VOUCHED)


def overriding(hook, base=FedAvg, **declared):
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
    again = overriding(hook, **{name: getattr(FedAvg, name) for name in lost})
    for derived in (again, type("Further", (again,), {})):
        assert all(getattr(derived, name) == getattr(FedAvg, name) for name in FLAGS)
    assert {name for name in FLAGS if not getattr(type("Further", (kind,), {}), name)} == lost


def test_hooks_of_a_mixin_count_and_no_flag_comes_from_a_hook():
    class Mixin:
        def server_update(self, server, phase, uploads):
            pass

    assert type("Mixed", (Mixin, FedAvg), {}).averages is None
    assert type("Mixed", (FedAvg, Mixin), {}).averages
    assert overriding("server_update", METHODS["fedcgs"]).averages is False
    assert LocalTraining.asynchronous is False
    with pytest.raises(TypeError, match=r"Derived.reduce: expected a tuple of names, given <function"):
        overriding("weight", reduce=lambda self, phase: ())
