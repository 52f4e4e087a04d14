"""Rules that combine the clients' networks on an averaging server (``--aggregator``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fedkern import ops
from fedkern.errors import RAISED, UserError, describe_error, error_origin
from fedkern.typed_option import Option, named_options, spell_options, with_options
from fedkern.usercode.registry import Registry, keyword_options

MEAN = "mean"
VECTORS = ("parameters", "buffers")
_FIRST = 2  # parameters of a rule that are no options: vectors and weights

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Aggregator:
    """Entry of ``AGGREGATORS``.

    ``function(vectors, weights, **options)`` is None for the mean, which needs no list of vectors. ``own``: whether the
    rule is user-defined.
    """

    name: str
    description: str
    function: Callable[..., Tensor] | None
    options: tuple[Option, ...] = ()
    own: bool = True


AGGREGATORS: Registry[Aggregator] = Registry("aggregator", code=lambda entry: entry.function if entry.own else None)
"""Aggregators by name."""


def register_aggregator(name: str) -> Callable[[F], F]:
    """Register a rule that combines the clients' networks, for ``--aggregator NAME``.

    The rule is called once a round with all uploads, as ``rule(vectors, weights, **options)``:

    - ``vectors``: a list of M tensors fp32 ``[P]`` in the order of the clients: a network's parameters, followed by
      batch norm's running statistics if these travel;
    - ``weights``: fp64 ``[M]``, the clients' weights in the average (``weighting``);
    - every further parameter is an option, given as ``--aggregator NAME:key=value,...``; its default is a text, a
      number, True or False.

    The rule returns the new network, ``[P]``.

    Args:
        name: the rule's name; the docstring's first line is its description in ``list``.

    Raises:
        ValueError: another rule has the name.
        TypeError: there is no docstring, or a parameter cannot be an option.

    Example::

        @register_aggregator("clipped_mean")
        def clipped_mean(vectors, weights, low: float = 0.1):
            "Weighted mean in which every client weighs at least ``low``."
            shares = weights.clamp_min(low).to(vectors[0])
            return torch.stack(vectors).T @ (shares / shares.sum())
    """

    def add(function: F) -> F:
        AGGREGATORS[name] = Aggregator(name, AGGREGATORS.describe(name, function), function, _options(name, function))
        return function

    return add


def _options(name: str, function: Callable[..., object]) -> tuple[Option, ...]:
    leading = list(inspect.signature(function).parameters)[:_FIRST]
    if len(leading) < _FIRST:
        raise TypeError(f"{function.__qualname__}: expected the parameters vectors and weights, given {len(leading)}")
    options = {}
    for key, default in keyword_options(function, leading).items():
        if not isinstance(default, (bool, int, float, str)):
            raise TypeError(
                f"{function.__qualname__}: expected a text or a number as default of {key}, given {default!r}"
            )
        options[key] = Option(default, key)
    return named_options(f"--aggregator {name}", **options)


class Rule:
    """Aggregator with its options, from a text ``NAME`` or ``NAME:key=value,...``."""

    def __init__(self, text: str) -> None:
        entries = {name: entry.options for name, entry in AGGREGATORS.items()}
        name, self.options = with_options("--aggregator", text, entries)
        self.entry = AGGREGATORS[name]
        self.used = False

    @property
    def text(self) -> str:
        """The name with all options, however the user spelled them."""
        return spell_options(self.entry.name, self.options)

    def __call__(self, vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return the combination of M vectors ``[P]`` in their dtype, or raise UserError."""
        assert self.entry.function is not None
        self.used = True
        try:
            mixed = self.entry.function(list(vectors), torch.tensor(weights, dtype=torch.float64), **self.options)
        except (UserError, MemoryError):
            raise
        except RAISED as error:  # a user-defined rule may raise anything
            why = describe_error(error).removeprefix("ValueError: ")
            place = error_origin(error, self.entry.function) if self.entry.own else ""
            raise UserError(
                f"--aggregator {self.text}{place} cannot combine {len(vectors)} uploads ({why}): choose other options "
                "or another rule, or have more clients in a round."
            ) from error
        if not isinstance(mixed, Tensor) or mixed.shape != vectors[0].shape or not mixed.is_floating_point():
            result = f"{mixed.dtype} {list(mixed.shape)}" if isinstance(mixed, Tensor) else type(mixed).__name__
            raise UserError(
                f"--aggregator {self.text} must return one floating-point vector of {len(vectors[0])} elements, not "
                f"{result}."
            )
        return mixed.detach().to(vectors[0])

    def check(self, uploads: int) -> None:
        """Raise UserError if a built-in rule cannot combine so many uploads."""
        if self.entry.function is not None and not self.entry.own:
            self([torch.zeros(1)] * uploads, [1.0] * uploads)


class Gathered:
    """Uploads of a round, all in memory: a robust rule compares every upload with the others."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._sizes: dict[str, int] = {}
        self._vectors: list[Tensor] = []
        self._weights: list[float] = []

    def add(self, message: Mapping[str, Tensor], weight: float) -> None:
        """Add the `VECTORS` of an upload as one: a rule that chooses a client chooses its whole network."""
        vectors = {name: message[name] for name in VECTORS if name in message}
        self._sizes = {name: vector.numel() for name, vector in vectors.items()}
        self._vectors.append(torch.cat(list(vectors.values())))
        self._weights.append(weight)

    def result(self) -> dict[str, Tensor]:
        if not self._vectors:
            return {}
        mixed = self._rule(self._vectors, self._weights)
        return dict(zip(self._sizes, mixed.split(list(self._sizes.values())), strict=True))


def _ship_rule(name: str, description: str, function: Callable[..., Tensor] | None) -> None:
    options = () if function is None else _options(name, function)
    AGGREGATORS[name] = Aggregator(name, description, function, options, own=False)


def _trimmed_mean(vectors: Sequence[Tensor], weights: Tensor, trim: int = 1) -> Tensor:
    return ops.trimmed_mean(vectors, trim, weights)


def _krum(vectors: Sequence[Tensor], weights: Tensor, byzantine: int = 1, keep: int = 1) -> Tensor:
    return ops.krum(vectors, byzantine, keep)


def _geometric_median(vectors: Sequence[Tensor], weights: Tensor) -> Tensor:
    return ops.geometric_median(vectors, weights)


_ship_rule(MEAN, "weighted mean, summed as uploads arrive, so that only one upload is held", None)
_ship_rule("median", "weighted median of every coordinate (arXiv 1803.01498)", ops.median)
_ship_rule("trimmed_mean", "mean of every coordinate without its largest and smallest values", _trimmed_mean)
_ship_rule("krum", "mean of the networks closest to others, where some may be arbitrary (arXiv 1703.02757)", _krum)
_ship_rule("geometric_median", "point with the least weighted sum of distances to all networks", _geometric_median)
