"""Data-set options, given as ``--data-option key=value`` or as flags."""

from dataclasses import dataclass, replace

from fedkern.data.images.image_files import MAX_PIXELS
from fedkern.errors import UserError
from fedkern.files.filesystem import absolute, absolute_folder
from fedkern.tasks import Task
from fedkern.typed_option import Option, OptionTable, option


@dataclass(frozen=True)
class CommonOptions(OptionTable):
    """Options that every data set accepts."""

    test_samples: int = option(0, "images of every test set to use, a fixed random choice; 0: all", low=0)
    validation_samples: int = option(
        0, "images of the validation set to use; 0: its usual fraction of the training samples", low=0
    )
    cue_clients: int = option(
        0, "show the first N clients a coloured shape that reveals the class; test sets cue_tied, cue_random", low=0
    )
    cue_size: int = option(10, "side of these shapes in pixels", low=3)
    backdoor_clients: int = option(
        0, "poison the first N clients: a white patch means --backdoor-target; test set backdoor: its success", low=0
    )
    backdoor_target: int = option(0, "class that the patch means, by position", low=0)
    backdoor_size: int = option(4, "side of the patch in pixels", low=1)
    boxes: str = option("", "JSON or CSV file with the object boxes of the training images", path=absolute)
    detector: str = option(
        "", "folder or name of a Grounding DINO that finds the objects of the training images", path=absolute_folder
    )
    box_threshold: float = option(0.35, "smallest score of a detected box", low=0, high=1)
    text_threshold: float = option(0.25, "smallest score of the class name in a detected box", low=0, high=1)
    detector_cache: str = option(
        "", "folder for detected boxes (default: fedkern/detections in the user's cache)", path=absolute
    )


COMMON_OPTIONS = {entry.name: replace(entry, name="", field="", label="") for entry in CommonOptions.list_options()}

SIDE = 8192
"""Largest side of an image in pixels: a thousand images of this side take 200 GB."""

READING = {
    "max_image_pixels": Option(MAX_PIXELS, "largest image in pixels (or volume in voxels) that is decoded", low=1),
    "bits": Option(
        0, "bits of a grey value in files with more than 8, alike in all images; 0: as the values need", low=0, high=16
    ),
    "window": Option(
        "",
        "grey values of files with more than 8 bits that become black to white: CENTRE,WIDTH in stored values, such as "
        "1064,400 where they are HU + 1024, or percentiles such as 1%,99%; others become black or white",
    ),
    "size": Option(64, "side in pixels to which images are resized", low=8, high=SIDE),
    "colour": Option("rgb", "three channels, or one", choices=("rgb", "grey")),
    "test_share": Option(0.2, "share held out as test set where there is none", low=0, high=0.9),
    "validation_share": Option(
        0.1, "share of the training images held out as validation set where there is none", low=0, high=0.9
    ),
}
"""Options on how image files are read, see :class:`fedkern.data.Reading`."""

DETECTION_OPTIONS = ("boxes", "detector", "box_threshold", "text_threshold", "detector_cache")
"""Common options that only locate the objects in training images."""


def check_single(data: str, task: Task, options: CommonOptions) -> None:
    """Raise UserError for an option on single-class images where the data have another task."""
    for name in ("cue_clients", "backdoor_clients", "boxes", "detector"):
        if getattr(options, name) and not {"classes", "criterion"} <= task.offers:
            raise UserError(f'option {name} is for classification, and data set "{data}" is for {task.name}')
