"""Stage 1 of FedIOD: every client trains and keeps its own teacher (docs/methods/fediod.md, section 4)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from fedkern.data.sharing.groups import drawn_rows
from fedkern.methods.common.oneshot_members import OwnNetworks, copy_vectors, flatten, load
from fedkern.methods.fediod import private_messages as private
from fedkern.methods.protocol import Batch, Phase, batch_slices
from fedkern.methods.roles import Client

TRAIN = Phase(0, "train", "update")
"""Phase whose random streams a teacher trains with.  The one-shot methods train their members in the same phase, so
without a hold-out the teachers equal these members bit for bit."""


class Held:
    """Test set of some of a client's samples."""

    def __init__(self, client: Client, rows: np.ndarray) -> None:
        self._client, self._rows = client, rows
        self.task = client.task

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def can_be_scored(self) -> bool:
        """True if a sample (segmentation: pixel) has a known class."""
        return bool((self._client.labels[torch.from_numpy(self._rows)] >= 0).any())

    def batches(self) -> Iterator[Batch]:
        for part in batch_slices(len(self), min(self.task.outside, 500)):
            yield self._client.batch(self._rows[part])


def split_holdout(client: Client, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the samples that train the teacher, at least one, and of the held-out samples.

    Groups (patient, case or image) stay on one side. With patients as the unit of privacy, ``share`` is of patients: a
    patient's number of images must not influence who else is held out.
    """
    if client.patients is not None:  # a share of the patients, however many images each has
        parts = drawn_rows(client.rng("holdout", TRAIN), client.samples, client.patients)
        groups = min(round(share * len(parts)), len(parts) - 1)
        out, train = (np.concatenate([np.zeros(0, np.int64), *rows]) for rows in (parts[:groups], parts[groups:]))
        return np.sort(train), np.sort(out)
    count = min(round(share * client.samples), client.samples - 1)
    parts = drawn_rows(client.rng("holdout", TRAIN), client.samples, client.groups)
    groups = int(np.searchsorted(np.cumsum([len(part) for part in parts]), count, side="right"))
    groups = min(max(groups, int(count > 0)), len(parts) - 1)
    order, count = np.concatenate(parts), sum(len(part) for part in parts[:groups])
    return np.sort(order[count:]), np.sort(order[:count])


def make_teacher(method: OwnNetworks, client: Client) -> None:
    """Train the client's teacher, or load a pretrained one, into ``client.state["teacher"]``.

    A pretrained teacher has no ``holdout`` figure, since it may have trained on these samples.
    """
    module = build_network(method, client)
    rows, out = split_holdout(client, method.options.holdout)
    test_set = Held(client, out)
    load_pretrained = client.load_pretrained(module)
    if not load_pretrained and not private.train_teacher(method, client, TRAIN, module, rows):
        client.fit(method, TRAIN, module, rows=None if len(rows) == client.samples else rows)
    module.eval()
    state = client.state["teacher"] = copy_vectors(flatten(module))
    if test_set.can_be_scored and not load_pretrained:
        with torch.no_grad():
            state["holdout"] = test_set.task.score(method.evaluate(module, test_set))


def build_network(method: OwnNetworks, client: Client) -> nn.Module:
    network: nn.Module = client.network(**method.architecture(client.id))
    return network


def load_teacher(method: OwnNetworks, client: Client) -> nn.Module:
    return load(flatten(build_network(method, client)), client.state["teacher"]).eval().requires_grad_(False)
