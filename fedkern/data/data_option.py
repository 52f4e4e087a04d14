"""Options of the data sets, given as ``--data-option key=value`` or as flags of their own."""

from __future__ import annotations

from typing import Any

from fedkern.errors import UserError
from fedkern.files.filesystem import absolute, absolute_folder
from fedkern.tasks import Task
from fedkern.typed_option import Option

COMMON_OPTIONS: dict[str, Option] = {
    "test_samples": Option(0, "images kept of every test set, 0 for all (a fixed random choice)", low=0),
    "validation_samples": Option(
        0, "images kept of the validation set, 0 for its usual share of the training samples", low=0
    ),
    "cue_clients": Option(
        0, "the first so many clients see a coloured shape that tells the class; tests cue_tied, cue_random", low=0
    ),
    "cue_size": Option(10, "side of those shapes in pixels", low=3),
    "backdoor_clients": Option(
        0, "on the first so many clients a white patch says backdoor_target; test backdoor: its success", low=0
    ),
    "backdoor_target": Option(0, "the class, by position, that the patch says", low=0),
    "backdoor_size": Option(4, "side of that patch in pixels", low=1),
    "boxes": Option("", "JSON or CSV file with the object boxes of the training images", path=absolute),
    "detector": Option(
        "", "folder or name of a Grounding DINO that finds the objects of the training images", path=absolute_folder
    ),
    "box_threshold": Option(0.35, "smallest score of a detected box", low=0, high=1),
    "text_threshold": Option(0.25, "smallest score of the class name in a detected box", low=0, high=1),
    "detector_cache": Option(
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
