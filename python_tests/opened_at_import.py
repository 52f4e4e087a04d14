"""Data sets of the bytes of this file, which is open in several ways when a run forks its workers."""

import functools
import os
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

CONTENT = Path(__file__).read_bytes()
FILE = Path(__file__).open("rb", buffering=0)  # noqa: SIM115


@functools.cache
def open_once():
    return Path(__file__).open("rb", buffering=0)


class Bytes(Dataset):
    """Items that raise where another process has moved the file's position."""

    def __init__(self, kind, begin, count):
        self.kind, self.first, self.count = kind, begin, count
        self.descriptor = os.open(__file__, os.O_RDONLY) if kind == "descriptor" else -1

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        files = {"descriptor": lambda: self.descriptor, "cached": open_once().fileno, "module": FILE.fileno}
        descriptor, place = files[self.kind](), self.first + index
        os.lseek(descriptor, place, os.SEEK_SET)
        time.sleep(0.0005)
        byte = os.read(descriptor, 1)[0]
        if byte != CONTENT[place]:
            raise RuntimeError(f"byte {place} is {byte}, not {CONTENT[place]}")
        return torch.tensor([place / 100, byte / 100]), place % 3
