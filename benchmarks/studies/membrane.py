"""Cut electron-microscopy slices into the tiles of fediod_membrane.toml.

    python -m benchmarks.studies.membrane DIR FOLDER

``DIR`` holds ``image/0.png`` to ``image/29.png``, 512 x 512, and ``label`` with masks of the same names, black where
the membranes are.  ``FOLDER`` gets the tiles and their list, ``tiles.csv``.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SLICES, CLIENTS, SIDE = 30, 5, 128
VALIDATION, TEST = range(20, 24), range(24, 30)


def cut_tiles(source: Path, folder: Path, side: int = SIDE) -> Path:
    """Cut the slices into square tiles, list these in ``tiles.csv`` and return its path.

    A mask is 255 on the membranes.  A client holds four neighbouring slices, and the test slices belong to no client.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,mask,split,client"]
    for number in range(SLICES):
        image, label = (
            np.asarray(Image.open(source / kind / f"{number}.png", formats=["PNG"])) for kind in ("image", "label")
        )
        split = "test" if number in TEST else "val" if number in VALIDATION else "train"
        client = str(number * CLIENTS // VALIDATION[0]) if split == "train" else ""
        for top in range(0, image.shape[0], side):
            for left in range(0, image.shape[1], side):
                names = [f"{kind}-{number}-{top}-{left}.png" for kind in ("image", "mask")]
                for name, pixels in zip(names, (image, np.where(label > 127, 0, 255).astype(np.uint8)), strict=True):
                    Image.fromarray(pixels[top : top + side, left : left + side]).save(folder / name)
                lines.append(",".join([*names, split, client]))
    listing = folder / "tiles.csv"
    listing.write_text("\n".join(lines) + "\n")
    return listing


if __name__ == "__main__":
    print(cut_tiles(*map(Path, sys.argv[1:3])))
