"""Registry of methods by name, and of unregistered classes from scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from fedkern.errors import UserError, unknown_method
from fedkern.models.users.user_models import LEVELS, find_level
from fedkern.typed_option import Value
from fedkern.usercode.registry import Registry, check_hooks

if TYPE_CHECKING:
    from fedkern.methods.base import Method
    from fedkern.methods.roles import Offering

METHODS: Registry[type[Method]] = Registry("method")
"""Method classes by name; ``METHODS[name].description`` is the line that ``list`` shows."""

CLASS = "class:"
"""Prefix of the name of an unregistered class from a script: ``class:MODULE:NAME``."""

GIVEN: dict[str, type[Method]] = {}
"""Classes that scripts gave to this process, by such a name (`fedkern.methods.script_methods`)."""

M = TypeVar("M", bound="type[Method]")


def register(name: str) -> Callable[[M], M]:
    """Register a class as the method ``name``.

    The first line of the class's docstring becomes its description.

    Example::

        @register("mine")
        class Mine(LocalTraining):
            "FedAvg with my loss."
    """

    def add(cls: M) -> M:
        check_hooks(cls)
        cls.name, cls.description = name, METHODS.describe(name, cls)
        METHODS[name] = cls
        return cls

    return add


def get(name: str) -> type[Method]:
    """Return the class registered as ``name``, or given by a script.

    Raises:
        UserError: no method has this name; the message suggests the nearest one.
    """
    if name in GIVEN:
        return GIVEN[name]
    if name.startswith(CLASS):
        raise UserError(
            f"The method {name} is a class of a script, which only Python can give: fedkern.simulate("
            f"{short_name(name)}, ...), or fedkern.load(DIR, method={short_name(name)}) to go on."
        )
    if name not in METHODS:
        raise unknown_method(name, METHODS)
    return METHODS[name]


def option_names(method: str) -> set[str]:
    return {name for entry in get(method).Options.list_options() for name in (entry.name, entry.field)}


def given_options(method: str, texts: Iterable[str] | Mapping[str, object]) -> dict[str, Value]:
    """Return the given method options by published name, converted, with absolute paths, without defaults."""
    kind = get(method).Options
    options = {entry.name: entry for entry in kind.list_options()}
    return {key: options[key].absolute(value) for key, value in kind.parse(texts, method=method).given_values().items()}


def option_owners() -> dict[str, list[str]]:
    """Return the methods that have an option, by the option's name."""
    owners: dict[str, list[str]] = {}
    for method in METHODS:
        for name in option_names(method):
            owners.setdefault(name, []).append(method)
    return owners


def short_name(name: str) -> str:
    """Return a method's name, of a class without its module."""
    return name.rpartition(":")[2].rpartition(".")[2] if name.startswith(CLASS) else name


def check_network(method: str, needs: str, network: nn.Module, data: Offering, text: str) -> None:
    """Raise UserError if a method needs more of a network than the network has (`LEVELS`)."""
    has = find_level(network)
    if LEVELS.index(needs) <= LEVELS.index(has):
        return
    fitting = sorted(
        name for name, kind in METHODS.items() if kind.serves(data) and LEVELS.index(kind().needs) <= LEVELS.index(has)
    )
    lacks = {
        "features": "a linear layer with a bias as its last step, or --features NAME",
        "maps": "modules that run one after another and end in a linear layer, or --stages NAME,NAME",
        "stages": "modules that run one after another and end in a linear layer (its attribute stages names them)",
    }
    raise UserError(
        f"{method} needs {lacks[needs]}, which the network {text} has not: methods that can use it are "
        f"{', '.join(fitting)}."
    )
