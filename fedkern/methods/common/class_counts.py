"""Class counts of a client, the class weights of an ensemble's members (FedIOD, arXiv 2312.14478)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.methods.roles import Client


def class_counts(client: Client) -> Tensor:
    """Return the samples (segmentation: pixels) of every class, fp32 [C]."""
    return torch.bincount(client.labels[client.labels >= 0], minlength=len(client.classes)).float()
