"""A federated method of your own: FedAvg with label smoothing, as one loss.

python examples/own_method.py
"""

import tempfile
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedkern.engine import RunConfig, run
from fedkern.methods.base import Batch, LocalTraining, Received, option
from fedkern.methods.registry import register


@register("smoothed")
class Smoothed(LocalTraining):
    """FedAvg on smoothed labels."""

    @dataclass(frozen=True)
    class Options(LocalTraining.Options):
        smoothing: float = option(0.1, "share of the label that goes to all classes", low=0, high=1)

    def loss(self, model, batch: Batch, received: Received) -> Tensor:
        return cross_entropy(model(batch.images), batch.labels, label_smoothing=self.options.smoothing)


if __name__ == "__main__":
    config = RunConfig.make("smoothed", data="digits", rounds=3, options={"smoothing": 0.2})
    with tempfile.TemporaryDirectory() as folder:
        summary = run(config, out=folder)
    print(f"accuracy after {config.rounds} rounds: {summary['metrics']['accuracy']:.1%}")
