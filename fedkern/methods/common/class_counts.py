"""Class counts of a client, the class weights of an ensemble's members (FedIOD, arXiv 2312.14478).

FedIOD's clients disclose them by default, clients of `MemberNetworks` only with ``class_weights=counts``, so that both
can be compared with equal knowledge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkern.methods.roles import Client


def class_counts(client: Client) -> Tensor:
    """Return the samples (labelled pixels for segmentation) of every class, fp32 [C]."""
    return torch.bincount(client.labels[client.labels >= 0], minlength=len(client.classes)).float()
