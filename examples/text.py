"""Text: a GRU learns the next letter of Python's own documentation, a topic a client; its perplexity."""

import math
import tempfile
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedkern


class Topic(Dataset):
    """Pieces of 32 letters as numbers; the targets are the next letters."""

    def __init__(self, name: str, pieces: int) -> None:
        self.letters = torch.tensor([min(ord(letter), 127) for letter in topics[name][: 32 * pieces + 1]])

    def __len__(self) -> int:
        return (len(self.letters) - 1) // 32

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.letters[32 * index :][:32], self.letters[32 * index + 1 :][:32]


class Letters(nn.Sequential):
    def forward(self, letters: Tensor) -> Tensor:
        return self[2](self[1](self[0](letters))[0]).transpose(1, 2)


torch.manual_seed(0)
sites = {name: Topic(name, pieces) for name, pieces in (("class", 60), ("import", 80), ("try", 40))}
network = Letters(nn.Embedding(128, 16), nn.GRU(16, 32, batch_first=True), nn.Linear(32, 128))
given = {"data": sites, "test": Topic("with", 40), "model": network}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fedkern.simulate("fedavg", **given, rounds=5, lr=0.5, out=f"{folder}/run", progress=False, pictures=False)
        print(f"perplexity after 5 rounds: {math.exp(run.metrics['loss']):.0f}")
