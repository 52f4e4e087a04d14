"""The evidence for FedIOD on segmentation: cell membranes in electron-microscopy slices.

    python -m benchmarks.studies.study_fediod_segment membrane --data-root DIR

``DIR`` holds ``image/0.png`` to ``image/29.png``, 512 x 512, and ``label`` with masks of the same names, black where
the membranes are.  Every client holds the tiles of slices of its own, in the order of the stack; the test slices are
nobody's.  The rest is as in ``study_fediod``, whose runs these are; it goes on where it was interrupted and writes
``benchmarks/studies/results/fediod_segment_membrane_table.md`` and ``.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.studies.fediod_runs import IOD, IODRuns, Study
from benchmarks.studies.study import run_sections
from benchmarks.studies.study_fediod import Section, about, main_table

SLICES, CLIENTS, SIDE = 30, 5, 128
VALIDATION, TEST = range(20, 24), range(24, 30)
STUDIES = {
    "membrane": Study(
        {
            "data": "segmentation", "clients": CLIENTS, "batch_size": 16, "weight_decay": 3e-4,
            "model": "unet", "width": 8, "local_epochs": 30, "public_samples": 32,
            "data_option": ("size=64", "colour=grey", "names=cell|membrane"),
        },
        75, 4, 10,  # a client has four batches of tiles, and its discriminator learns from each once in a round
        alphas=("attribute",), figure="dice", students=(IOD, "FedDF, public images"),
        iod={
            "ngf": 16, "ndf": 16, "student_steps": 4, "batch": 16, "generator_lr": 2e-3, "critic_lr": 1e-3,
            "student_optimizer": "adamw", "student_lr": 3e-3, "warmup": 0.25, "w_real": 8.0, "disc_weight": True,
        },
        rates=(1e-3, 3e-3, 1e-2),  # AdamW is the default for folders of masks
        choices=tuple({"critic_layers": layers, "w_balance": balance} for layers in (2, 4) for balance in (0.0, 1.0)),
    )
}  # fmt: skip


def cut_tiles(source: Path, folder: Path) -> Path:
    """Cuts the slices into tiles of 128 pixels and lists them in ``tiles.csv``, whose path is returned.

    A mask is 255 on the membranes.  A client holds four neighbouring slices.
    """
    listing = folder / "tiles.csv"
    if listing.exists():
        return listing
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,mask,split,client"]
    for number in range(SLICES):
        image, label = (
            np.asarray(Image.open(source / kind / f"{number}.png", formats=["PNG"])) for kind in ("image", "label")
        )
        split = "test" if number in TEST else "val" if number in VALIDATION else "train"
        client = str(number * CLIENTS // VALIDATION[0]) if split == "train" else ""
        for top in range(0, image.shape[0], SIDE):
            for left in range(0, image.shape[1], SIDE):
                names = [f"{kind}-{number}-{top}-{left}.png" for kind in ("image", "mask")]
                for name, pixels in zip(names, (image, np.where(label > 127, 0, 255).astype(np.uint8)), strict=True):
                    Image.fromarray(pixels[top : top + SIDE, left : left + SIDE]).save(folder / name)
                lines.append(",".join([*names, split, client]))
    temporary = listing.with_suffix(".part")
    temporary.write_text("\n".join(lines) + "\n")
    return temporary.replace(listing)


def make(study: Study, folder: Path, workers: int, settings: Mapping[str, Any]) -> IODRuns:
    """The runs, on tiles that are cut first."""
    listing = cut_tiles(Path(settings["data_root"]), folder / "tiles")
    return IODRuns(study, folder, workers, {**settings, "data_root": str(listing.resolve())})


SECTIONS: Mapping[str, Callable[[IODRuns], Section]] = {"table": main_table}


if __name__ == "__main__":
    run_sections("fediod_segment", "FedIOD", __doc__ or "", STUDIES, SECTIONS, make, about)
