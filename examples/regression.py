"""Regression with a loss and a figure of our own."""

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedkern

generator = torch.Generator().manual_seed(0)


def house(count: int, shift: float) -> TensorDataset:
    x = torch.randn(count, 4, generator=generator) + shift
    return TensorDataset(x, x[:, :1] * x[:, 1:2] + 0.1 * torch.randn(count, 1, generator=generator))


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.huber_loss(outputs, targets, delta=0.5)


def mae(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs - targets).abs().mean())


torch.manual_seed(0)
given = {
    "data": [house(200, 0.0), house(100, 0.5)], "test": house(100, 0.2),
    "model": nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)),
    "loss_fn": huber, "metrics": {"mae": mae}, "main": "mae", "better": "min",
}  # fmt: skip

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        how = {"optimizer": "adamw", "lr": 0.03, "rounds": 5, "progress": False, "pictures": False}
        run = fedkern.simulate("fedprox", **given, **how, out=f"{folder}/run")
        print(f"mean absolute error after 5 rounds: {run.metrics['mae']:.2f}")
