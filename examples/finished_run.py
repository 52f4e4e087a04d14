"""A run from Python, its figures round by round, and the trained network.

python examples/finished_run.py
"""

import tempfile

import torch

from fedkern.downstream.saved_network import read_model
from fedkern.engine import RunConfig, read_metrics, run

config = RunConfig.make("fedprox", data="digits", rounds=3, clients=4, partition="dirichlet:0.3", options={"mu": 0.1})
with tempfile.TemporaryDirectory() as folder:
    run(config, out=folder)
    for record in read_metrics(folder):
        if "accuracy" in record:  # a round that was evaluated
            print(f"round {record['round']}: accuracy {record['accuracy']:.1%}")
    network, info = read_model(folder)
with torch.no_grad():
    logits = network.eval()(torch.zeros(1, 1, 8, 8))
size = sum(parameter.numel() for parameter in network.parameters())
print(f"{info['model']} of {size} parameters, logits {list(logits.shape)}")
