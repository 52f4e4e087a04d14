"""Images that tests of caches and of images on disk write, and which of them are decoded."""

import numpy as np
from PIL import Image

from fedkern.data.images import image_files
from fedkern.files.image_rows import ImageStore


def two_brightnesses(root, count):
    """Grey images of nine by nine pixels, half of them, those of the class b, brighter than the others; the folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128, (9, 9), dtype=np.uint8) + 100 * np.uint8(number % 2)).save(path)
    return root


def watched(monkeypatch):
    """The files that are decoded from now on, in order."""
    found = []
    read = image_files.read_images

    def counted(paths, *args, **options):
        found.extend(paths)
        return read(paths, *args, **options)

    monkeypatch.setattr(image_files, "read_images", counted)
    return found


def count_gathered(monkeypatch):
    """Return a list to which every read of an image file adds its number of images from now on."""
    counts = []
    gather = ImageStore.gather

    def counted(self, rows):
        counts.append(len(rows))
        return gather(self, rows)

    monkeypatch.setattr(ImageStore, "gather", counted)
    return counts
