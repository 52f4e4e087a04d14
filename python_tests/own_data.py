"""PyTorch data sets as users write them, each with a network, in a module that worker processes import too."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset


def table():
    """Return three sites of a table with a class per row, and a test set."""

    def make_site(seed, rows=20):
        inputs = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())

    return {f"site {seed}": make_site(seed) for seed in range(3)}, make_site(9)


class Texts(Dataset):
    """Sentences of tokens as dicts, whose class is the more frequent half of the vocabulary."""

    def __init__(self, seed, rows=20):
        self.tokens = torch.randint(0, 12, (rows, 7), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, row):
        tokens = self.tokens[row]
        return {"tokens": tokens, "labels": int((tokens < 6).sum() > 3)}


def text():
    """Return three clients with sentences, and a test set."""
    return [Texts(seed) for seed in range(3)], Texts(9)


class Augmented(Dataset):
    """Images with a bright channel, whose items draw from torch, NumPy and ``random``."""

    def __init__(self, seed, rows=20):
        generator = torch.Generator().manual_seed(seed)
        self.images, self.targets = torch.rand(rows, 3, 8, 8, generator=generator), torch.arange(rows) % 3

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        image, target = self.images[row].clone(), int(self.targets[row])
        image[target] += 1
        image += 0.1 * torch.randn(1) + float(np.random.default_rng(np.random.randint(99)).normal(0, 0.1))  # noqa: NPY002
        return image.flip(-1) if random.random() < 0.5 else image, target


def images():
    """Return a set of images to be shared out, and a test set."""
    return Augmented(0, 60), Augmented(9)


class Rows(nn.Sequential):
    """Network of ``table``."""

    def __init__(self):
        super().__init__(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


class Words(nn.Module):
    """Network of ``text``, with dropout."""

    def __init__(self):
        super().__init__()
        self.embedding, self.dropout, self.head = nn.EmbeddingBag(12, 6), nn.Dropout(0.2), nn.Linear(6, 2)

    def forward(self, tokens):
        return self.head(self.dropout(self.embedding(tokens)))


class Pixels(nn.Sequential):
    """Network of ``images``."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        )  # fmt: skip
