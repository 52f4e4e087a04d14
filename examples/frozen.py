"""A frozen backbone with a new head: only the head is trained and travels."""

import tempfile

import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedkern

generator = torch.Generator().manual_seed(0)


def signals(count: int) -> TensorDataset:
    """One-dimensional signals of three frequencies."""
    targets = torch.randint(3, (count,), generator=generator)
    time = torch.linspace(0, 6.28, 64)
    waves = torch.sin((targets[:, None] + 1) * time + torch.rand(count, 1, generator=generator))
    return TensorDataset((waves + 0.3 * torch.randn(count, 64, generator=generator))[:, None], targets)


torch.manual_seed(0)
backbone = nn.Sequential(nn.Conv1d(1, 32, 9, 2), nn.ReLU(), nn.Conv1d(32, 32, 9, 2), nn.ReLU(), nn.AdaptiveMaxPool1d(1))
backbone.requires_grad_(False)
given = {
    "data": [signals(100), signals(60)], "test": signals(80),
    "model": nn.Sequential(backbone, nn.Flatten(), nn.Linear(32, 3)),
}  # fmt: skip

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fedkern.simulate("fedavg", **given, rounds=5, lr=0.3, out=f"{folder}/run", progress=False, pictures=False)
        print(
            f"accuracy after 5 rounds: {run.metrics['accuracy']:.2f}, {run.history.records[-1]['bytes_up']:,} bytes up"
        )
