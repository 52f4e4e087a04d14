"""A Dataset of your own, as torchvision's CIFAR10: `--data examples/own_dataset.py:cifar10 --data-root FILE.npz`."""

import tempfile

import numpy as np
import torch
from torch.utils.data import Dataset

import fedkern


class Images(Dataset):
    """Images uint8 [3, 32, 32] with classes, of a file with x_train [n, 32, 32, 3], y_train [n], x_test and y_test."""

    def __init__(self, file: str, part: str) -> None:
        with np.load(file) as arrays:
            self.data, self.targets = arrays[f"x_{part}"], arrays[f"y_{part}"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.data[index]).permute(2, 0, 1), int(self.targets[index])


def cifar10(root: str) -> tuple[Images, Images]:
    """Return the training set, which clients share, and the test set."""
    return Images(root, "train"), Images(root, "test")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)  # stands for CIFAR-10: noise in ten shades
        y = draw.integers(0, 10, 400)
        x = (draw.integers(0, 100, (400, 32, 32, 3)) + 15 * y[:, None, None, None]).astype(np.uint8)
        np.savez(f"{folder}/x.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])
        train, test = cifar10(f"{folder}/x.npz")
        how = {"model": "cnn", "augment": "crop-flip", "clients": 3, "rounds": 2, "batch_size": 32}
        run = fedkern.simulate("fediod", data=train, test=test, **how, out=f"{folder}/run", progress=False)
        print(f"accuracy after 2 rounds: {run.metrics['accuracy']:.2f}")
