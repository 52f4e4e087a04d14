"""Preprocessing that a pre-trained network's folder describes: as Pillow and the library do it, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.errors import UserError
from fedkern.models.pretrained.preprocessing import Preprocessing
from python_tests.models.pretrained_pictures import PICTURES, SCALE, SIDE, normalise, pictures

transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")


@pytest.mark.parametrize(("settings", "height", "width"), [
    (PICTURES, 12, 12),
    (PICTURES, 40, 25),
    ({**PICTURES, "resample": 3}, 12, 30),
    ({**PICTURES, "resample": 0, "size": {"height": 61, "width": 61}}, 48, 48),
    ({**PICTURES, "resample": 0}, 40, 40),
    ({**PICTURES, "resample": 0}, 12, 12),
    ({**PICTURES, "size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}, 30, 45),
    ({**PICTURES, "size": 20, "do_center_crop": True, "crop_size": {"height": 18, "width": 16}}, 20, 20),
    ({"do_resize": False, "do_normalize": False}, 12, 12),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_is_pillows(settings: dict[str, Any], height: int, width: int, channels: int) -> None:
    images = pictures(2, height, width, channels)
    scale = {name: SCALE[name][:channels] for name in SCALE}
    made = Preprocessing(settings, **scale, side=SIDE)(normalise(images))
    expected = []
    for pixels in images.expand(-1, 3, -1, -1):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        size = settings.get("size")
        if size is not None:
            shortest = size if isinstance(size, int) else size.get("shortest_edge")
            short = min(image.size)
            exact = (size["width"], size["height"]) if shortest is None else ()
            target = exact or [int(shortest * side / short) for side in image.size]
            image = image.resize(tuple(target), Image.Resampling(settings["resample"]))
        if settings.get("do_center_crop"):
            crop = settings["crop_size"]
            tall, wide = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            left, top = (image.width - wide) // 2, (image.height - tall) // 2
            image = image.crop((left, top, left + wide, top + tall))
        expected.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255)
    expected = torch.stack(expected)
    byte = 1 / 255
    if settings.get("do_normalize"):
        expected, byte = (expected - 0.5) / 0.5, 2 * byte
    assert made.shape == expected.shape
    distance = (made - expected).abs()
    assert distance.max() < 2.1 * byte
    # Which direction Pillow resizes first, where the proportions change, depends on its version.
    stretched = settings.get("size") == PICTURES["size"] and height != width
    assert (distance > 0.1 * byte).float().mean() < (0.3 if stretched else 0.03)


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ViT", {"size": {"height": 20, "width": 20}, "do_rescale": False, "do_normalize": False}),
        ("ViT", {"size": {"height": 20, "width": 20}, "rescale_factor": 1 / 127.5, "do_normalize": False}),
        ("ConvNext", {"size": {"shortest_edge": 16}}),
        ("ConvNext", {"size": {"shortest_edge": 20}, "crop_pct": 0.7, "do_center_crop": True,
                      "crop_size": {"height": 12, "width": 14}}),
        ("ConvNext", {"size": {"shortest_edge": 384}}),
        ("EfficientNet", {"size": {"height": 20, "width": 20}, "resample": 2}),
        ("EfficientNet", {"size": {"height": 20, "width": 20}, "rescale_offset": True, "include_top": False}),
        ("MobileViT", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
    ],
)  # fmt: skip
def test_preprocessing_is_that_of_the_library(tmp_path: Path, processor: str, settings: dict[str, Any]) -> None:
    try:
        theirs = getattr(transformers, f"{processor}ImageProcessor")(**settings)
    except ImportError as error:  # some versions have it through torchvision alone
        pytest.skip(str(error).strip())
    theirs.save_pretrained(tmp_path)
    images = pictures(2, 30, 30)
    made = Preprocessing.read(tmp_path, **SCALE, side=SIDE)(normalise(images))
    results = [theirs(Image.fromarray(pixels.permute(1, 2, 0).numpy()))["pixel_values"][0] for pixels in images]
    expected = torch.stack([torch.from_numpy(np.array(result, dtype=np.float32)) for result in results])
    assert made.shape == expected.shape
    distance = (made - expected).abs()
    assert (distance > 1e-5 * expected.abs().max()).float().mean() < 0.01
    assert distance.max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(("settings", "words"), [
    ({"resample": 1}, "resample 1 is not done here: give one of 0, 2, 3"),
    ({"rescale_factor": 0}, "is damaged: rescale_factor is 0"),
    ({"image_processor_type": "LevitImageProcessor"}, "what LevitImageProcessor makes of images is not done here"),
    ({"size": {"longest_edge": 20}}, "sizes by longest_edge are not done here: give height and width"),
    ({"size": {"shortest_edge": 16, "longest_edge": 20}}, "sizes by shortest_edge and longest_edge are not done"),
    ({"size": {"height": 20}}, "sizes by height are not done here"),
    ({"size": {}}, "sizes by nothing are not done here"),
    ({"do_center_crop": True, "crop_size": {"longest_edge": 20}}, "sizes by longest_edge are not done here"),
])  # fmt: skip
def test_preprocessing_that_is_not_done_here_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"preprocessor_config.json:? {words}"):
        Preprocessing.read(tmp_path, **SCALE, side=SIDE)
