"""A training loop of your own in place of a method's: what it leaves in the model is the upload.

python examples/own_loop.py
"""

import tempfile

import torch
from torch.nn.functional import cross_entropy

import fedkern


def train(model, client):
    optimizer = torch.optim.SGD(model.parameters(), lr=client.lr, momentum=0.9)
    for _ in range(client.epochs):
        for batch in client.batches():
            optimizer.zero_grad()
            loss = cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            optimizer.step()
    client.report["last_loss"] = loss.item()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fedkern.simulate("fedavg", train=train, data="digits", rounds=3, out=folder, pictures=False)
        print(f"accuracy after {run.config.rounds} rounds: {run.metrics['accuracy']:.1%}")
