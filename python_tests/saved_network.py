"""The network that a run folder holds, and whether two runs saved the same bits."""

import torch
from safetensors.torch import load_file


def tensors(out):
    return load_file(out / "model.safetensors")


def same_network(one, other):
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
