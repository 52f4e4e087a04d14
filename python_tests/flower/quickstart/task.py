"""A small network and its data, as in Flower's quickstart apps.

The data are random, not downloaded.
"""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def load_data(partition, samples=60):
    generator = torch.Generator().manual_seed(partition)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    images = 0.3 * torch.randn(samples, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels):
        images[i, 0, 2 * label : 2 * label + 2] += 1.0  # a bar whose place is the class
    return images, labels


def train(net, data, rate):
    images, labels = data
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    net.train()
    total = 0.0
    for batch in range(0, len(images), 20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images[batch : batch + 20]), labels[batch : batch + 20])
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / 3


def test(net, data):
    images, labels = data
    net.eval()
    with torch.no_grad():
        answers = net(images)
    return nn.functional.cross_entropy(answers, labels).item(), (answers.argmax(1) == labels).float().mean().item()
