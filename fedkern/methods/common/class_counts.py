"""Counts of every class at a client, by which an ensemble weighs its members class by class (FedIOD, arXiv 2312.14478).

FedIOD's clients tell their counts by default, those of the methods that keep the clients' networks with
``class_weights=counts``, so that both can be compared on what they are told.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.methods.roles import Client


def class_counts(client: Client) -> Tensor:
    """Return the samples (labelled pixels for segmentation) of every class, fp32 [C]."""
    return torch.bincount(client.labels[client.labels >= 0], minlength=len(client.classes)).float()
