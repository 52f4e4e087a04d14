"""Unit of privacy, in which neighbouring data sets differ: an image, a patient with all images, or a client."""

from __future__ import annotations

from dataclasses import dataclass

UNITS = ("image", "patient")
"""The units that ``--privacy-unit`` names."""


@dataclass(frozen=True)
class Unit:
    """Unit of privacy: neighbouring data sets differ in one replaced unit.

    A client's number of units is public.

    Attributes:
        name: one of `UNITS`, or ``"client"``.
        images: the largest number of images of a unit. A patient may have fewer, and that number is not public.
    """

    name: str = "image"
    images: int = 1

    def __str__(self) -> str:
        """Return the units in words that continue "one of its"."""
        if self.name == "image":
            return "images"
        return f"patients (each with at most {self.images} image{'s' * (self.images != 1)})"

    @property
    def change(self) -> str:
        """The difference between neighbouring data sets, as a clause."""
        by_client = self.name == "client"
        return "the whole data set of one is replaced" if by_client else f"one of a client's {self} is replaced"


IMAGE = Unit()
CLIENT = Unit("client")
