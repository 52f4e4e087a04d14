"""Check of a data set's image shape against a trained network's."""

from __future__ import annotations

from pathlib import Path

from fedkern.data import DATASETS, FederatedData
from fedkern.errors import UserError
from fedkern.tasks.protocols import Description


def check_shape(data: FederatedData, about: Description, out: Path) -> None:
    """Raise UserError unless the images have the channels, height, width and dtype in ``about``."""
    expected, dtype = (about["channels"], *about["image_size"]), about.get("dtype", "uint8")
    if data.form.dtype != dtype:
        raise UserError(f'Images of "{data.name}" are {data.form.dtype}, and the run in {out} saw {dtype}: give these.')
    if tuple(data.form.shape) != expected:
        sizes = ["x".join(str(side) for side in shape) for shape in (data.form.shape, expected)]
        raise UserError(
            f'The images of "{data.name}" are {sizes[0]} (channels, height, width), but the run in {out} saw '
            f"{sizes[1]}: {_way_out(data.name, tuple(data.form.shape), expected)}."
        )


def _way_out(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return advice for images that are not ``expected``: matching data options, or another data set."""
    options = DATASETS[name].options if name in DATASETS else {}
    values = {}
    if shape[1:] != expected[1:]:
        values["size"] = str(expected[1]) if expected[1] == expected[2] else None
    if shape[0] != expected[0]:
        values["colour"] = {1: "grey", 3: "rgb"}.get(expected[0])
    if any(option not in options or value is None for option, value in values.items()):
        return "it has no option for such images; name a data set that has with --data"
    return "match them with " + " ".join(f"--data-option {option}={value}" for option, value in values.items())
