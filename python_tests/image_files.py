"""Images for tests of caches and of images on disk, and a record of which images are decoded."""

import numpy as np
from PIL import Image

from fedkern.data.images.image_files import ImageFiles
from fedkern.files.image_rows import ImageStore


def two_brightnesses(root, count):
    """Write grey images of nine by nine pixels, those of the class b brighter, and return the folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128, (9, 9), dtype=np.uint8) + 100 * np.uint8(number % 2)).save(path)
    return root


def watch_decoded(monkeypatch, kind=ImageFiles):
    """Return the list of files of a kind that are decoded from now on, in order."""
    found = []
    read = kind.read

    def count_and_read(self, rows=None):
        if type(self) is kind and self.stored is None:
            found.extend(self.paths if rows is None else [self.paths[row] for row in rows.tolist()])
        return read(self, rows)

    monkeypatch.setattr(kind, "read", count_and_read)
    return found


def count_gathered(monkeypatch):
    """Return the list of images per read of an image file from now on."""
    counts = []
    gather = ImageStore.gather

    def count_and_gather(self, rows):
        counts.append(len(rows))
        return gather(self, rows)

    monkeypatch.setattr(ImageStore, "gather", count_and_gather)
    return counts
