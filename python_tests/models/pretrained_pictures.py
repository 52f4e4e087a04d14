"""Pictures for pre-trained image networks, and the preprocessing that their folders name."""

import numpy as np
import torch

SCALE = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
SIDE = 16
PICTURES = {
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2, "do_rescale": True,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False,
}  # fmt: skip


def pictures(count: int = 3, height: int = 12, width: int = 12, channels: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(7)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, height, width)).astype(np.uint8))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(SCALE[name][: pixels.shape[1]]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std
