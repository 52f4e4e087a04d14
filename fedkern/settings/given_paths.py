"""Paths among the settings that a user gives: text or ``Path``, absolute from there on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fedkern.data import COMMON_OPTIONS
from fedkern.methods import registry
from fedkern.settings.config import RunConfig

PATHS = {
    **{knob.field: knob.path for knob in RunConfig.knobs() if knob.path is not None},
    **{name: option.path for name, option in COMMON_OPTIONS.items() if option.path is not None},
}
"""Functions that make a path absolute, by the name of the setting or data option that holds the path."""


def absolute(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with absolute paths as texts, so that a run can be resumed and compared from any folder.

    Raises:
        UserError: a path begins with the home folder of an unknown user.
    """
    texts = as_texts(settings)
    return {
        name: PATHS[name](value) if name in PATHS and isinstance(value, str) and value else value
        for name, value in texts.items()
    }


def as_texts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with every ``Path`` as a text."""
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}


def named_options(method: str, given: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The given method options (without defaults) by published name, checked and with absolute paths.

    Raises:
        UserError: an unknown option, a value out of range, or a path in the home folder of an unknown user.
    """
    kind = registry.get(method).Options
    values = kind.parse(as_texts(given) if isinstance(given, Mapping) else given, method=method).given()
    paths = {knob.name: knob.path for knob in kind.knobs() if knob.path is not None and values.get(knob.name)}
    return {**values, **{name: make(str(values[name])) for name, make in paths.items()}}
