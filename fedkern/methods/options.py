"""Options of a method, for the command line, the config file, ``list`` and the range checks."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from fedkern.errors import UserError, suggest_name
from fedkern.typed_option import OptionTable, Value


@dataclass(frozen=True)
class Options(OptionTable):
    """Base of every method's ``Options``: frozen, checked on construction, parsed from ``key=value``."""

    label = 'Method option "{}"'
    _given = frozenset[str]()

    def __new__(cls, *args: Any, **values: Any) -> Self:
        options = super().__new__(cls)
        # Only the call says which options the user gave; the others follow the data set's defaults.
        positional = [field.name for field in dataclasses.fields(cls)][: len(args)]
        object.__setattr__(options, "_given", frozenset((*positional, *values)))
        return options

    def __post_init__(self) -> None:
        for entry in self.list_options():
            value = getattr(self, entry.field)
            if entry.field in self._given or not isinstance(value, entry.type):  # other defaults are checked already
                object.__setattr__(self, entry.field, entry.convert(value))

    @classmethod
    def parse(cls, options: Iterable[str] | Mapping[str, object], *, method: str = "this method") -> Self:
        """Make the options from ``["alpha=0.6", "lambda=1"]`` or from a mapping of published or field names."""
        pairs: list[tuple[str, object]] = []
        if isinstance(options, Mapping):
            pairs = list(options.items())
        else:
            for word in options:
                key, equals, text = word.partition("=")
                if not equals:
                    raise UserError(f'Method option "{word}" must have the form key=value.')
                pairs.append((key.strip(), text.strip()))
        names = {entry.name: entry for entry in cls.list_options()}
        fields = {entry.field: entry for entry in cls.list_options()}
        values: dict[str, object] = {}
        for key, value in pairs:
            plain = key.replace("-", "_")
            named = names.get(plain) or fields.get(plain)
            if named is None:
                raise UserError(
                    f'Unknown method option "{key}" of {method}.{suggest_name(key, names)} '
                    f"It has {', '.join(names) if names else 'none'}."
                )
            if named.field in values:
                raise UserError(f'Method option "{named.name}" is given twice.')
            values[named.field] = value
        return cls(**values)

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """Make the options from converted values by published name."""
        fields = {entry.name: entry.field for entry in cls.list_options()}
        options = cls()
        for name, value in values.items():
            object.__setattr__(options, fields[name], value)
        options.__post_init__()  # the checks of values that do not fit together
        object.__setattr__(options, "_given", frozenset(map(fields.__getitem__, values)))
        return options

    def code(self) -> list[tuple[str, str]]:
        """Return the code that given values import: pairs of an option's published name and the code's name."""
        given = [(entry, entry.code) for entry in self.list_options() if entry.field in self._given]
        return [(entry.name, part) for entry, code in given if code for part in code(getattr(self, entry.field))]

    def given_values(self) -> dict[str, Value]:
        """Return the given values by published name, without defaults."""
        return {entry.name: getattr(self, entry.field) for entry in self.list_options() if entry.field in self._given}

    def to_dict(self) -> dict[str, Value]:
        return {entry.name: getattr(self, entry.field) for entry in self.list_options()}
