"""Reader of the network in a run folder, and comparison of two networks bit for bit."""

import torch
from safetensors.torch import load_file


def tensors(out):
    return load_file(out / "model.safetensors")


def same_network(a, b):
    weights, second = tensors(a), tensors(b)
    return weights.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in weights.items())
