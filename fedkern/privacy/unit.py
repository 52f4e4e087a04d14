"""Unit of privacy, in which neighbouring data sets differ: an image, or a patient with all of their images."""

from __future__ import annotations

from dataclasses import dataclass

UNITS = ("image", "patient")


@dataclass(frozen=True)
class Unit:
    """The unit of privacy: neighbouring data sets differ in one replaced unit.  A client's number of units is public.

    Attributes:
        name: one of `UNITS`.
        images: the largest number of images of a unit; a patient may have fewer, and their number is not public.
    """

    name: str = "image"
    images: int = 1

    def __str__(self) -> str:
        """The units in words, after "one of its"."""
        if self.name == "image":
            return "images"
        return f"patients (each with at most {self.images} image{'s' * (self.images != 1)})"


IMAGE = Unit()
