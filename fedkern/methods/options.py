"""Options of a method: one dataclass that the command line, the config file, ``list`` and the range checks read."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

from fedkern.data.data_option import MOST
from fedkern.errors import UserError, nearest, quoted
from fedkern.ops._core.checks import python_number

Value = bool | int | float | str

LARGEST = 1e30
"""Largest value of a float option: it has to fit fp32, also after a division by a bias correction."""

_WORDS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def option(
    default: Value | None,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Value, ...] | None = None,
    name: str | None = None,
    type: type | None = None,
    infinite: bool = False,
    path: Callable[[str], str] | None = None,
    code: Callable[[str], Sequence[str]] | None = None,
) -> Any:
    """Declares one option as a dataclass field; the option has the type of its default.

    Args:
        default: the value of an option that is not given; ``bool``, ``int``, ``float`` or ``str``.
        help: one line for the user.
        low, high: inclusive range of a number.  Without ``high``, a float is at most `LARGEST`, and an integer with a
            lower bound is at most `MOST`.
        above: exclusive lower bound of a number.
        choices: the only values allowed; ``:N`` at the end of one stands for a number.
        name: the published name where Python forbids it as a field name (``lambda`` for the field ``lam``).
        type: the type of an option whose default is ``None`` (left open, and ``None`` stays allowed).
        infinite: whether a float may be infinite.
        path: function that makes a path in the value absolute; a stored run keeps the function's result.
        code: function that returns the parts of a value that name code to import and run, each as written.  A stored
            run executes that code only if the option is given again.
    """
    kind = builtins.type(default) if type is None else type
    metadata = {
        "help": help, "low": low, "high": high, "above": above, "choices": choices, "name": name, "type": kind,
        "infinite": infinite, "path": path, "code": code,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Knob:
    """Description of one option, read by ``list``, the command line and the documentation."""

    name: str
    field: str
    type: type
    default: Value | None
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[Value, ...] | None = None
    infinite: bool = False
    path: Callable[[str], str] | None = None
    code: Callable[[str], Sequence[str]] | None = None
    label: str = ""

    @property
    def range(self) -> str:
        """The allowed values in words, such as ``in [0, 1]`` or ``one of mean, zero``; empty without a restriction."""
        if self.choices is not None:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        if self.low is not None and self.high is not None:
            return f"in [{self.low:g}, {self.high:g}]"
        if self.low is not None:
            return f"at least {self.low:g}"
        if self.above is not None:
            return f"above {self.above:g}" + (f" and at most {self.high:g}" if self.high is not None else "")
        return f"at most {self.high:g}" if self.high is not None else ""

    def convert(self, value: Any) -> Value:
        """Returns ``value`` (a string from the command line, or a value from TOML) in the option's type.

        Raises:
            UserError: the value has another type or is outside the allowed range.
        """
        if value is None and self.default is None:
            return cast(Value, None)
        try:
            result = _convert(python_number(value), self.type)
        except (KeyError, TypeError, ValueError, OverflowError):
            kind = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}[self.type]
            raise UserError(f"{self.label} must be {kind}, not {quoted(value)}.{self._several(value)}") from None
        self.check(result)
        return result

    def check(self, value: Value) -> None:
        """Raises UserError when ``value`` is outside the allowed range."""
        if self.choices is not None:
            head, _, number = str(value).partition(":")
            if number.isdecimal() and f"{head}:N" in self.choices:
                return
            if value not in self.choices or number == "N":
                hint = self._several(value) or nearest(str(value), [str(choice) for choice in self.choices])
                raise UserError(f"{self.label} must be {self.range}, not {quoted(value)}.{hint}")
            return
        if isinstance(value, (str, bool)):
            return
        if isinstance(value, float) and math.isinf(value) and not self.infinite:
            raise UserError(f"{self.label} must be finite, not {value:g}.")
        shown = f"{value:g}" if isinstance(value, float) else str(value)  # :g fails for integers that overflow a float
        if self.high is None and (most := self._most(value)) is not None and value > most:
            raise UserError(f"{self.label} must be at most {most}, not {shown}.")
        bad = (
            value != value
            or (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
        )
        if bad:
            raise UserError(f"{self.label} must be {self.range or 'a number'}, not {shown}.")

    def _several(self, value: Any) -> str:
        """A hint where several values are given for one: words with commas between them, or a list."""
        words = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ()
        listed = ",".join(map(str, words))
        return f" For several values: compare METHOD --sweep {self.name}={listed}." if 1 < len(words) <= 20 else ""

    def _most(self, value: int | float) -> int | float | None:
        """Upper bound of a number whose option declares none; None: unbounded."""
        if isinstance(value, float):
            return LARGEST if math.isfinite(value) else None
        return MOST if self.low is not None else None  # an integer without a lower bound, such as a seed, is no count


def knobs(cls: Any, label: str) -> tuple[Knob, ...]:
    """Options of a dataclass: its fields declared with :func:`option`.

    Args:
        label: how error messages name an option; ``{}`` stands for the option's name.
    """
    return _knobs(cls, label)


@functools.cache
def _knobs(cls: Any, label: str) -> tuple[Knob, ...]:
    result = []
    for field in dataclasses.fields(cls):
        meta = dict(field.metadata)
        if "help" in meta:
            name = meta.pop("name") or field.name
            shown = label.format(name.replace("_", "-") if label.startswith("--") else name)
            result.append(Knob(name=name, field=field.name, default=cast(Any, field.default), label=shown, **meta))
    return tuple(result)


def with_options(flag: str, text: str, entries: Mapping[str, Sequence[Knob]]) -> tuple[str, dict[str, Value | None]]:
    """Reads a value of the form ``NAME`` or ``NAME:key=value,...``.

    Args:
        entries: the options of every name.

    Returns:
        The name, and the values of all its options.

    Raises:
        UserError: an unknown name or option, an option given twice, or a value of another type or out of range.
    """
    name, colon, rest = text.strip().partition(":")
    if name not in entries:
        raise UserError(f'{flag} must be one of {", ".join(entries)}, not "{name}".{nearest(name, entries)}')
    known = {knob.name: knob for knob in entries[name]}
    values: dict[str, Value | None] = {key: knob.default for key, knob in known.items()}
    seen = set()
    for word in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in word.partition("="))
        if key not in known or not equals:
            has = f"It has {', '.join(known)}." if known else "It has no options."
            raise UserError(f'{flag} {name} has no option "{word}".{nearest(key, known)} {has}')
        if key in seen:
            raise UserError(f"{flag} {name} has the option {key} twice.")
        seen.add(key)
        values[key] = known[key].convert(value)
    return name, values


def _convert(value: Any, kind: type) -> Value:
    if kind is bool:
        return value if isinstance(value, bool) else _WORDS[str(value).strip().lower()]
    if isinstance(value, bool):
        raise TypeError
    if kind is int:
        if not isinstance(value, str) and int(value) != value:  # a float of any kind
            raise ValueError
        return int(value)
    if kind is float:
        return float(value)
    if isinstance(value, (list, tuple, Mapping)):
        raise TypeError
    return str(value).strip()


def as_typed(value: Any) -> str:
    """A setting's value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Options:
    """Base of every method's ``Options``: frozen, checked on construction, parsed from ``key=value``."""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        made = super().__new__(cls)
        # Only the call says which options the user gave; the others follow the data set's defaults.
        positional = [field.name for field in dataclasses.fields(cls)][: len(args)]
        object.__setattr__(made, "_given", frozenset((*positional, *values)))
        return made

    def __post_init__(self) -> None:
        for knob in self.knobs():
            object.__setattr__(self, knob.field, knob.convert(getattr(self, knob.field)))

    @classmethod
    def knobs(cls) -> tuple[Knob, ...]:
        """The options in the order of their declaration."""
        return knobs(cls, 'Method option "{}"')

    @classmethod
    def parse(cls, given: Iterable[str] | Mapping[str, Any], *, method: str = "this method") -> Self:
        """Makes the options from ``["alpha=0.6", "lambda=1"]`` or from a mapping of published or field names.

        Raises:
            UserError: an unknown name (the message suggests the nearest one), a value of the wrong type or out of
                range, a word without ``=``, or the same option twice.
        """
        pairs: list[tuple[str, Any]] = []
        if isinstance(given, Mapping):
            pairs = list(given.items())
        else:
            for word in given:
                key, equals, value = word.partition("=")
                if not equals:
                    raise UserError(f'Method option "{word}" must have the form key=value.')
                pairs.append((key.strip(), value.strip()))
        known = {knob.name: knob for knob in cls.knobs()}
        fields = {knob.field: knob for knob in cls.knobs()}
        values: dict[str, Value] = {}
        for key, value in pairs:
            plain = key.replace("-", "_")
            knob = known.get(plain) or fields.get(plain)
            if knob is None:
                raise UserError(
                    f'Unknown method option "{key}" of {method}.{nearest(key, known)} '
                    f"It has {', '.join(known) if known else 'none'}."
                )
            if knob.field in values:
                raise UserError(f'Method option "{knob.name}" is given twice.')
            values[knob.field] = knob.convert(value)
        return cls(**values)

    @classmethod
    def settled(cls, values: Mapping[str, Value], given: Collection[str]) -> dict[str, Value]:
        """The options that a run uses, by published name; by default ``values`` unchanged.

        Args:
            values: every option: the user's value, or else the data set's default.
            given: names of the options that the user gave.  An option that sets others (a preset) overrides the data
                set's defaults of those options, not the user's values.
        """
        return dict(values)

    @classmethod
    def code(cls, values: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Code that these values name and a run imports: pairs of the option's published name and the code's name."""
        parsed = cls.parse(values)
        named = [knob for knob in cls.knobs() if knob.code is not None and {knob.name, knob.field} & set(values)]
        return [(knob.name, part) for knob in named if knob.code for part in knob.code(getattr(parsed, knob.field))]

    def given(self) -> dict[str, Value]:
        """The values that this object was constructed with, without defaults, by published name."""
        named: frozenset[str] = getattr(self, "_given", frozenset())
        return {knob.name: getattr(self, knob.field) for knob in self.knobs() if knob.field in named}

    def to_dict(self) -> dict[str, Value]:
        """All option values by published name."""
        return {knob.name: getattr(self, knob.field) for knob in self.knobs()}
