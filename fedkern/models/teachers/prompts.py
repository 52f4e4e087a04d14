"""Text prompts of a zero-shot teacher: templates for all classes, or prompts for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkern.errors import UserError, first_of, suggest_name
from fedkern.files import filesystem
from fedkern.files.inputs import parse_json, read_text

DEFAULT = "a photo of a {class}."
PLACES = ("{class}", "{}")


def read_prompts(prompts: str, classes: Sequence[str]) -> list[list[str]]:
    """Return the prompts of every class, at least one each, for a mean of their features.

    Args:
        prompts: a template with ``{class}`` or ``{}`` in place of the class name (underscores become spaces); a text
            file with a template on every line (``#`` for comments); or a JSON file that maps every class to a prompt or
            a list of prompts.
    """
    if any(place in prompts for place in PLACES):
        return _fill([prompts], classes)
    path = filesystem.expand(prompts)
    try:
        text = read_text(path, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f'the prompts file {path} cannot be read ({reason}): give a file, or a template like "{DEFAULT}".'
        ) from None
    if path.suffix == ".json":
        return _by_class(path, text, classes)
    templates = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not templates:
        raise UserError(f'the prompts file {path} is empty: write one template like "{DEFAULT}" on every line.')
    for template in templates:
        if not any(place in template for place in PLACES):
            raise UserError(f'the template "{template}" in {path} has no {{class}} where the class name goes.')
    return _fill(templates, classes)


def absolute(prompts: str) -> str:
    return prompts if any(place in prompts for place in PLACES) else filesystem.absolute(prompts)


def _fill(templates: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    names = [name.replace("_", " ").strip() for name in classes]
    return [[template.replace("{class}", name).replace("{}", name) for template in templates] for name in names]


def _by_class(path: Path, text: str, classes: Sequence[str]) -> list[list[str]]:
    try:
        table = parse_json(text)
    except ValueError as error:
        raise UserError(f"the prompts file {path} is not JSON: {error}.") from None
    if not isinstance(table, dict):
        raise UserError(f"the prompts file {path} must map every class to its prompts, but holds {_kind(table)}.")
    missing = [name for name in classes if name not in table]
    if missing:
        hint = suggest_name(missing[0], [name for name in table if name not in classes])
        raise UserError(f"the prompts file {path} has no prompts for the class{_names(missing)}: add them.{hint}")
    extra = [name for name in table if name not in classes]
    if extra:
        raise UserError(
            f"the prompts file {path} has prompts for the class{_names(extra)}, which the data do not have: take them "
            "out."
        )
    result = []
    for name in classes:
        value = table[name]
        prompts = [value] if isinstance(value, str) else value
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) and text for text in prompts):
            raise UserError(f'the prompts of "{name}" in {path} must be a text or a list of texts.')
        result.append(list(prompts))
    return result


def _names(names: Sequence[str]) -> str:
    listed = first_of([f'"{name}"' for name in names], 3)
    return f"{'es' if len(names) > 1 else ''} {listed}"


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
