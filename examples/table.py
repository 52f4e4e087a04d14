"""A table with natural clients: two clinics whose instruments differ, and a small network."""

import tempfile

import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedkern

generator = torch.Generator().manual_seed(0)
weights = torch.randn(6, 3, generator=generator)


def clinic(patients: int, offset: float) -> TensorDataset:
    """Six measurements of every patient, with an instrument's offset, and one of three diagnoses."""
    true = torch.randn(patients, 6, generator=generator)
    return TensorDataset(true + offset, (true @ weights).argmax(1))


torch.manual_seed(0)
given = {
    "data": {"north": clinic(300, 0.0), "south": clinic(150, 0.4)},
    "test": {"north": clinic(100, 0.0), "south": clinic(100, 0.4)},
    "model": nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)),
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fedkern.simulate("scaffold", **given, rounds=5, out=f"{folder}/run", progress=False, pictures=False)
        worst = min(figures["accuracy"] for figures in run.summary["client_metrics"].values())
        print(f"accuracy after 5 rounds: {run.metrics['accuracy']:.2f}, of the worst clinic {worst:.2f}")
