"""Options of the data sets, given as ``--data-option key=value`` or as flags of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedkern.errors import UserError, nearest
from fedkern.files import absolute, absolute_folder
from fedkern.tasks import Task

MOST = 2**31 - 1
"""Largest count: larger sizes overflow in torch and NumPy."""


@dataclass(frozen=True)
class DataOption:
    """One option of a data set, given as ``key=value``.

    Attributes:
        default: value when the option is not given; its type is the option's type.
        help: one line on the option's effect.
        choices: the only values allowed, if limited.
        low, high: inclusive range of a number; a whole number without ``high`` is at most `MOST`.
        path: function that makes a path absolute; the stored run holds the value that the function returns.
    """

    default: str | int | float
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    path: Callable[[str], str] | None = None

    def read(self, data: str, key: str, value: object) -> str | int | float:
        """Converts and checks a value, given as text or already typed.

        Raises:
            UserError: a value of the wrong type, out of range or not among the choices.
        """
        where = f'option {key} of data set "{data}"'
        kind = type(self.default)
        try:
            if isinstance(value, bool):
                raise ValueError
            read: str | int | float = kind(str(value)) if kind is not str else str(value)
        except ValueError:
            raise UserError(f"{where}: expected {_KINDS[kind]}, got {value!r}") from None
        if isinstance(read, str):
            match = {choice.lower(): choice for choice in self.choices}
            if self.choices and read.lower() not in match:
                expected = ", ".join(self.choices)
                raise UserError(f"{where}: expected one of {expected}, got {value!r}.{nearest(read, self.choices)}")
            return match.get(read.lower(), read)
        high = MOST if self.high is None and kind is int else self.high
        if (self.low is not None and not read >= self.low) or (high is not None and not read <= high):
            limits = f"at least {self.low:g}" if self.high is None else f"from {self.low:g} to {self.high:g}"
            limits += f" and at most {MOST}" if self.high is None and read > MOST else ""
            raise UserError(f"{where}: expected {_KINDS[kind]} {limits}, got {value!r}")
        return read


_KINDS: dict[type, str] = {str: "a text", int: "a whole number", float: "a number"}


COMMON_OPTIONS: dict[str, DataOption] = {
    "test_samples": DataOption(0, "images kept of every test set, 0 for all (a fixed random choice)", low=0),
    "validation_samples": DataOption(
        0, "images kept of the validation set, 0 for its usual share of the training samples", low=0
    ),
    "cue_clients": DataOption(
        0, "the first so many clients see a coloured shape that tells the class; tests cue_tied, cue_random", low=0
    ),
    "cue_size": DataOption(10, "side of those shapes in pixels", low=3),
    "backdoor_clients": DataOption(
        0, "on the first so many clients a white patch says backdoor_target; test backdoor: its success", low=0
    ),
    "backdoor_target": DataOption(0, "the class, by position, that the patch says", low=0),
    "backdoor_size": DataOption(4, "side of that patch in pixels", low=1),
    "boxes": DataOption("", "JSON or CSV file with the object boxes of the training images", path=absolute),
    "detector": DataOption(
        "", "folder or name of a Grounding DINO that finds the objects of the training images", path=absolute_folder
    ),
    "box_threshold": DataOption(0.35, "smallest score of a detected box", low=0, high=1),
    "text_threshold": DataOption(0.25, "smallest score of the class name in a detected box", low=0, high=1),
    "detector_cache": DataOption(
        "", "folder for detected boxes (default: fedkern/detections in the user's cache)", path=absolute
    ),
}

DETECTION_OPTIONS = ("boxes", "detector", "box_threshold", "text_threshold", "detector_cache")
"""The common options that only locate the objects in the training images."""


def check_single(data: str, task: Task, **options: Any) -> None:
    """Raises UserError for an option that is only for images of single classes, where the data have another task."""
    for option in ("cue_clients", "backdoor_clients", "boxes", "detector"):
        if options.get(option) and not {"classes", "criterion"} <= task.offers:
            raise UserError(f'option {option} is for classification, and data set "{data}" is for {task.name}')
