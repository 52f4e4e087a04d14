"""Patients as the unit of privacy: at most so many images of each, and no patient at two clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedkern.data.cases import Rows
from fedkern.data.types import FederatedData, Split
from fedkern.errors import UserError
from fedkern.streams import stream


def numbered(split: Split) -> Rows:
    """int64 ``[n]``, counted from 0: the patient of every image of a split that names patients."""
    assert split.patients is not None  # asked for in limited
    return np.unique(split.patients.numpy(), return_inverse=True)[1].astype(np.int64)


def limited(data: FederatedData, images: int, seed: int) -> FederatedData:
    """The federation with at most ``images`` training images of every patient, drawn at random; order is kept.

    What is drawn of a patient depends on no other patient's images.

    Raises:
        UserError: the training images do not name their patients, or a patient has images at two clients.
    """
    owners: dict[int, int] = {}
    for k, split in enumerate(data.clients):
        if split.patients is None:
            raise UserError(
                f'--privacy-unit patient needs to know whose every image is, and the data set "{data.name}" names no '
                "patients: give its table a column patient_id, or take --privacy-unit image."
            )
        for patient in np.unique(split.patients.numpy()).tolist():
            if (owner := owners.setdefault(patient, k)) != k:
                raise UserError(
                    f"--privacy-unit patient needs all images of a patient at one client, and clients {owner} and {k} "
                    "share a patient: name one client for all images of a patient, or none for any."
                )
    return replace(data, clients=tuple(_limited(split, images, k, seed) for k, split in enumerate(data.clients)))


def _limited(split: Split, images: int, client: int, seed: int) -> Split:
    order = stream(seed, "patient-images", client=client).permutation(len(split))
    sorted_units = numbered(split)[order]
    by_unit = np.argsort(sorted_units, kind="stable")  # each patient's images in the order that was drawn
    starts = np.searchsorted(sorted_units[by_unit], np.arange(sorted_units.max(initial=-1) + 1))
    place = np.arange(len(order)) - starts[sorted_units[by_unit]]
    rows = np.sort(order[by_unit[place < images]])
    return split.subset(torch.from_numpy(rows))
