"""A federated method of your own: FedAvg with label smoothing, as one loss.

python examples/own_method.py
"""

import tempfile
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

import fedkern
from fedkern.methods import Batch, LocalTraining, Received, option, register


@register("smoothed")
class Smoothed(LocalTraining):
    """FedAvg on smoothed labels."""

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        smoothing: float = option(0.1, "share of the label that goes to all classes", low=0, high=1)

    def loss(self, model, batch: Batch, received: Received) -> Tensor:
        return cross_entropy(model(batch.inputs), batch.targets, label_smoothing=self.options.smoothing)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fedkern.simulate("smoothed", smoothing=0.2, data="digits", rounds=3, out=folder, pictures=False)
        print(f"accuracy after {run.config.rounds} rounds: {run.metrics['accuracy']:.1%}")
