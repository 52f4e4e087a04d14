"""A run from Python, its figures round by round, and the trained network.

python examples/finished_run.py
"""

import tempfile

import torch

import fedkern

with tempfile.TemporaryDirectory() as folder:
    fedkern.simulate("fedprox", data="digits", rounds=3, clients=4, partition="dirichlet:0.3", mu=0.1, out=folder)
    run = fedkern.load(folder)  # simulate returns the same; a script that begins later opens the folder
    for record in run.history.records:
        if "accuracy" in record:  # a round that was evaluated
            print(f"round {record['round']}: accuracy {record['accuracy']:.1%}")
    network = run.model()
with torch.no_grad():
    logits = network(torch.zeros(1, 1, 8, 8))
size = sum(parameter.numel() for parameter in network.parameters())
print(f"{run.config.model} of {size} parameters, logits {list(logits.shape)}")
