"""Backdoored clients, for whom a corner patch means the attacker's class (BadNets, arXiv 1708.06733).

Half of such a client's training images carry the patch and the target label.  The test ``backdoor`` holds the test
images of all other classes, patched and with the target label: its accuracy is the attack's success rate.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fedkern.data.data_option import CommonOptions, check_single
from fedkern.data.split import Split
from fedkern.data.types import FederatedData
from fedkern.errors import UserError
from fedkern.streams import stream

SHARE = 0.5
"""Share of a backdoored client's images that carry the patch."""


def draw_patch(images: Tensor, size: int) -> Tensor:
    """Copy images uint8 ``[n, C, H, W]`` with a white square, one pixel off the lower right corner."""
    out = images.clone(memory_format=torch.contiguous_format)
    out[..., -size - 1 : -1, -size - 1 : -1] = 255
    return out


def add_backdoor(data: FederatedData, clients: int, target: int, size: int, seed: int) -> FederatedData:
    """Backdoor the first ``clients`` clients and add a ``backdoor`` copy of every test set."""
    if not clients:
        return data
    check_single(data.name, data.task, CommonOptions(backdoor_clients=clients))
    side = min(data.form.shape[1:])
    if clients > len(data.clients):
        raise UserError(f"backdoor_clients is {clients}, but the data are shared out among {len(data.clients)} clients")
    if target >= len(data.classes):
        raise UserError(f'backdoor_target is {target}, but "{data.name}" has the classes 0 to {len(data.classes) - 1}')
    if size >= side:
        raise UserError(f'backdoor_size is {size}, but the images of "{data.name}" are only {side} pixels high or wide')

    def poison_split(split: Split, client: int) -> Split:
        rng = stream(seed, "backdoor/train", client=client)
        rows = torch.from_numpy(rng.permutation(len(split))[: round(SHARE * len(split))])
        images, labels = split.images.clone(), split.labels.clone()
        images[rows], labels[rows] = draw_patch(images[rows], size), target
        return dataclasses.replace(split, images=images, labels=labels)

    def attack_split(name: str, split: Split) -> Split:
        rows = torch.nonzero(split.labels != target)[:, 0]
        if not len(rows):
            raise UserError(f'the test set "{name or "test"}" has no image of a class other than {target} to attack')
        victims = split.subset(rows)
        labels = torch.full_like(victims.labels, target)
        return dataclasses.replace(victims, images=draw_patch(victims.images, size), labels=labels)

    splits = [poison_split(split, k) if k < clients else split for k, split in enumerate(data.clients)]
    statistics = data.statistics.recounted(splits)
    tests = dict(data.tests)
    tests.update({f"{name}_backdoor" if name else "backdoor": attack_split(name, s) for name, s in data.tests.items()})
    return dataclasses.replace(data, clients=tuple(splits), tests=tests, statistics=statistics)
