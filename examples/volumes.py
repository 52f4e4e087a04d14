"""3-D volumes that are read, and moved at random, when a batch needs them; a network with batch norm."""

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedkern


class Scans(Dataset):
    """Volumes of 12³ voxels with a bright ball, which is large in class 1."""

    def __init__(self, count: int, first: int) -> None:
        self.numbers = range(first, first + count)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = self.numbers[index]
        centre = 4 + 4 * torch.rand(3)  # another place in every epoch, the same in every run
        axes = torch.meshgrid(*[torch.arange(12.0)] * 3, indexing="ij")
        distance = sum((axis - place) ** 2 for axis, place in zip(axes, centre, strict=True)).sqrt()
        return (distance < 2 + number % 2).float()[None] + 0.1 * torch.randn(1, 12, 12, 12), number % 2


torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv3d(1, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2)
)
given = {"data": [Scans(60, 0), Scans(40, 60), Scans(30, 100)], "test": Scans(40, 200), "model": network}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fedkern.simulate("fedavg", **given, rounds=5, out=f"{folder}/run", progress=False, pictures=False)
        print(f"accuracy after 5 rounds: {run.metrics['accuracy']:.2f}")
