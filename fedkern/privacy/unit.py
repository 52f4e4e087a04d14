"""What two neighbouring data sets differ in: an image, or a patient with all of their images."""

from __future__ import annotations

from dataclasses import dataclass

UNITS = ("image", "patient")


@dataclass(frozen=True)
class Unit:
    """The unit of privacy: one of them is replaced, and how many a client has is public.

    Attributes:
        name: one of `UNITS`.
        images: the largest number of images of one; a patient may have fewer, which is not public.
    """

    name: str = "image"
    images: int = 1

    def __str__(self) -> str:
        """What is replaced, after "one of its"."""
        if self.name == "image":
            return "images"
        return f"patients (each with at most {self.images} image{'s' * (self.images != 1)})"


IMAGE = Unit()
