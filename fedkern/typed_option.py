"""Options: values of a run, a method or a data set, each with its type, range and line of help.

A word is converted once, on entry. What is stored, copied or handed on already has the option's type.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, cast

from fedkern.errors import UserError, quote_value, suggest_name

Value = bool | int | float | str
T = TypeVar("T")

LARGEST = 1e30
"""Largest value of a float option, which has to fit fp32, also after a division by a bias correction."""
MOST = 2**31 - 1
"""Largest count. Larger sizes overflow in torch and NumPy."""

_TYPES = {"int": int, "float": float, "str": str}
"""Types of options that may be left open, by their annotation, such as ``int | None``."""
_WORDS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


@dataclass(frozen=True)
class Option:
    """One option, for ``list``, the command line, the range checks and the documentation.

    Attributes:
        default: the value of an option that is not given: ``bool``, ``int``, ``float`` or ``str``.
        text: one line for the user, or a function that returns the line if it names what is registered then.
        low, high: inclusive range of a number. Without ``high``, a float is at most 1e30, and an integer with a lower
            bound is at most 2^31 - 1.
        above: exclusive lower bound of a number.
        choices: the only values allowed, texts in any case. ``:N`` at the end of one stands for a number.
        type: the type, by default that of ``default``, or of the annotation where the default is ``None`` (left open).
        infinite: whether a float may be infinite.
        path: function that makes a path in the value absolute. A stored run keeps the function's result.
        code: function that returns the parts of a value that name code to import and run, as written. A stored run
            executes that code only if the option is given again.
        name: as users write it.
        field: the attribute that holds the value.
        label: name in error messages.
    """

    default: Value | None
    text: str | Callable[[], str]
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: Sequence[Value] | None = None
    type: Any = None
    infinite: bool = False
    path: Callable[[str], str] | None = None
    code: Callable[[str], Sequence[str]] | None = None
    name: str = ""
    field: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        if self.type is None:
            object.__setattr__(self, "type", builtins.type(self.default))

    def named(self, field: str, label: str) -> Self:
        """Return the option of a field. ``{}`` in ``label`` stands for the option's name, with hyphens in a flag."""
        name = self.name or field
        label = label.format(name.replace("_", "-") if label.startswith("--") else name)
        return dataclasses.replace(self, name=name, field=field, label=label)

    @property
    def help(self) -> str:
        """The line of help for the user."""
        return self.text if isinstance(self.text, str) else self.text()

    @property
    def range(self) -> str:
        """The allowed values in words, such as ``in [0, 1]`` or ``one of mean, zero``.

        Empty without a restriction.
        """
        if self.choices is not None:
            return "one of " + ", ".join(map(str, self.choices))
        if self.low is not None and self.high is not None:
            return f"in [{self.low:g}, {self.high:g}]"
        if self.low is not None:
            return f"at least {self.low:g}"
        if self.above is not None:
            return f"above {self.above:g}" + (f" and at most {self.high:g}" if self.high is not None else "")
        return f"at most {self.high:g}" if self.high is not None else ""

    def convert(self, value: Any) -> Value:
        """Return ``value`` (a word of the command line, or a value of Python or TOML) in the option's type.

        Raises:
            UserError: the value has another type or is outside the allowed range.
        """
        if value is None and self.default is None:
            return cast(Value, None)
        if type(value) is self.type and not isinstance(value, str):
            self.check(value)
            return cast(Value, value)
        from fedkern.ops._core.checks import python_number  # here, since help and wrong flags need no torch

        try:
            result = _convert(python_number(value), self.type)
        except (KeyError, TypeError, ValueError, OverflowError):
            kind = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}[self.type]
            raise UserError(f"{self.label} must be {kind}, not {quote_value(value)}.{self._several(value)}") from None
        if isinstance(result, str):
            return self._find_choice(result)
        self.check(result)
        return result

    def read(self, value: object) -> Value:
        """Convert user input and make its paths absolute.

        Raises:
            UserError: as :meth:`convert`, or a path begins with the home folder of an unknown user.
        """
        return self.absolute(self.convert(value))

    def absolute(self, value: T) -> T | str:
        """Return a value with an absolute path, so that a run can be resumed and compared from any folder."""
        return self.path(value) if self.path is not None and isinstance(value, str) and value else value

    def check(self, value: Value) -> None:
        """Raise UserError if ``value`` is outside the allowed range."""
        if isinstance(value, (str, bool)):
            if isinstance(value, str):
                self._find_choice(value)
            return
        if isinstance(value, float) and math.isinf(value) and not self.infinite:
            raise UserError(f"{self.label} must be finite, not {value:g}.")
        text = f"{value:g}" if isinstance(value, float) else str(value)  # :g fails for integers that overflow a float
        if self.choices is not None:
            if value not in self.choices:
                raise UserError(f"{self.label} must be {self.range}, not {quote_value(value)}.")
            return
        if self.high is None and (largest := self._most(value)) is not None and value > largest:
            raise UserError(f"{self.label} must be at most {largest}, not {text}.")
        bad = (
            value != value
            or (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
        )
        if bad:
            raise UserError(f"{self.label} must be {self.range or 'a number'}, not {text}.")

    def _find_choice(self, value: str) -> str:
        if self.choices is None:
            return value
        head, _, number = value.partition(":")
        if number.isdecimal() and f"{head}:N" in self.choices:
            return value
        names = {str(choice).lower(): str(choice) for choice in self.choices if number != "N"}
        if value.lower() not in names:
            hint = self._several(value) or suggest_name(value, list(names.values()))
            raise UserError(f"{self.label} must be {self.range}, not {quote_value(value)}.{hint}")
        return names[value.lower()]

    def _several(self, value: object) -> str:
        """Return a hint for several values in place of one: words with commas between them, or a list."""
        words = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else ()
        listed = ",".join(map(str, words)) if self.field else ""
        if not listed or not 1 < len(words) <= 20:
            return ""
        return f" For several values: compare METHOD --sweep {self.name}={listed}."

    def _most(self, value: int | float) -> int | float | None:
        """Return the upper bound of a number whose option declares none, None if unbounded."""
        if isinstance(value, float):
            return LARGEST if math.isfinite(value) else None
        return MOST if self.low is not None else None  # an integer without a lower bound, such as a seed, is no count


def option(default: Value | None, text: str | Callable[[], str], **limits: Any) -> Any:
    """Declare an :class:`Option` as a field of a dataclass.

    Example::

        @fedkern.register("fedhalf")
        class FedHalf(FedAvg):
            @dataclass(frozen=True)
            class Options(FedAvg.Options):
                share: float = fedkern.option(0.5, "share of the update that counts", low=0, high=1)

    Args:
        default: the value of an option that is not given.
        text: the line of help.
        **limits: further attributes of the :class:`Option`. ``name`` is the published name where Python forbids it as a
            field name (``lambda`` for the field ``lam``).
    """
    return dataclasses.field(default=default, metadata={"option": Option(default, text, **limits)})


class OptionTable:
    """Base of dataclasses that have options among their fields.

    ``label`` is an option's name in error messages, with ``{}`` for its published name.
    """

    label: ClassVar[str] = "--{}"

    @classmethod
    def list_options(cls) -> tuple[Option, ...]:
        """Return the options in the order of their declaration.

        Raises:
            UserError: a default is not a value of its option, or the class is not decorated as a dataclass.
        """
        table: Any = cls
        return _list_options(table)


@functools.cache
def _list_options(cls: Any) -> tuple[Option, ...]:
    if any(isinstance(value, dataclasses.Field) for value in vars(cls).values()):
        raise UserError(f"{cls.__qualname__} declares options: write @dataclass(frozen=True) above the class.")
    fields = [field for field in dataclasses.fields(cls) if "option" in field.metadata]
    options = [field.metadata["option"].named(field.name, cls.label) for field in fields]
    for i, (field, entry) in enumerate(zip(fields, options, strict=True)):
        if entry.default is not None:
            entry.check(entry.default)
        elif (kind := str(field.type).partition(" ")[0]) in _TYPES:
            options[i] = dataclasses.replace(entry, type=_TYPES[kind])
    return tuple(options)


def with_options(flag: str, text: str, entries: Mapping[str, Sequence[Option]]) -> tuple[str, dict[str, Value | None]]:
    """Read ``NAME`` or ``NAME:key=value,...``, and return the name and the values of all its options.

    ``entries`` are the options of every name.
    """
    name, colon, words = text.strip().partition(":")
    if name not in entries:
        raise UserError(f'{flag} must be one of {", ".join(entries)}, not "{name}".{suggest_name(name, entries)}')
    options = {field.name: field for field in entries[name]}
    values: dict[str, Value | None] = {key: entry.default for key, entry in options.items()}
    seen = set()
    for word in words.split(",") if colon else ():
        key, equals, value = (part.strip() for part in word.partition("="))
        if key not in options or not equals:
            has = f"It has {', '.join(options)}." if options else "It has no options."
            raise UserError(f'{flag} {name} has no option "{word}".{suggest_name(key, options)} {has}')
        if key in seen:
            raise UserError(f"{flag} {name} has the option {key} twice.")
        seen.add(key)
        values[key] = options[key].convert(value)
    return name, values


def spell_options(name: str, options: Mapping[str, object]) -> str:
    """Return a text for :func:`with_options` with all options, the same for equal values."""
    text = ",".join(f"{key}={as_typed(value)}" for key, value in options.items())
    return f"{name}:{text}" if text else name


def named_options(flag: str, **options: Option) -> tuple[Option, ...]:
    """Return the options of a value of ``flag``, such as ``--aggregator trimmed_mean``, which errors then name."""
    return tuple(
        dataclasses.replace(entry, name=key, label=f'Option "{key}" of {flag}') for key, entry in options.items()
    )


def flag(name: str) -> str:
    """Return the flag of a setting: ``train_samples`` -> ``--train-samples``."""
    return "--" + name.replace("_", "-")


def as_typed(value: object) -> str:
    """Return a setting's value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    return os.fsdecode(value) if isinstance(value, os.PathLike) else str(value).strip()
