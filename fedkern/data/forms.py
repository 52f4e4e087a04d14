"""Forms: how the samples of a federation reach a network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageForm:
    """Images.

    Attributes:
        shape: channels, height and width of the images that a network sees.
        mean, std: per channel, of images in [0, 1].
        augment: augmentation of training batches: a name in `fedkern.data.transforms.AUGMENTATIONS`.
        grey_bits: bits of a grey value in image files with more than eight, in all images alike; 0 where no file has.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"
    grey_bits: int = 16
