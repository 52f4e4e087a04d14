"""TOML writer for the flat tables of a run's settings (the standard library only reads TOML)."""

import json
from collections.abc import Mapping


def dumps(table: Mapping[str, object]) -> str:
    """Return strings, numbers, booleans, lists of them, and one level of sub-tables as TOML text."""
    parts = ["\n".join(format_line(key, value) for key, value in table.items() if not isinstance(value, Mapping))]
    for key, value in table.items():
        if isinstance(value, Mapping):
            parts.append(f"[{_key(key)}]\n" + "\n".join(format_line(name, entry) for name, entry in value.items()))
    return "\n\n".join(parts).rstrip() + "\n"


def format_line(key: str, value: object) -> str:
    return f"{_key(key)} = {_value(value)}"


def _key(key: str) -> str:
    return key if key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key) else quote_text(key)


def quote_text(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):  # Python writes inf and nan as TOML does
        return str(value)
    if isinstance(value, str):
        return quote_text(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    raise TypeError(f"value: expected a string, number, boolean or list, given {type(value).__name__}")
