"""Patients as privacy units: limit each patient's images and forbid patients at two clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedkern.data.sharing.groups import Rows, rows_of_units
from fedkern.data.split import Split
from fedkern.data.types import FederatedData
from fedkern.errors import UserError
from fedkern.streams import stream


def number_patients(split: Split) -> Rows:
    """Return the patient of every image, int64 ``[n]`` from 0."""
    assert split.patients is not None  # checked by limit_patients
    return np.unique(split.patients.numpy(), return_inverse=True)[1].astype(np.int64)


def limit_patients(data: FederatedData, images: int, seed: int) -> FederatedData:
    """Keep at most ``images`` training images of every patient, drawn at random, in order.

    A draw depends on no other patient's images: otherwise no bound on one patient's influence would hold.
    """
    owners: dict[int, int] = {}
    for k, split in enumerate(data.clients):
        if split.patients is None:
            raise UserError(
                f'--privacy-unit patient needs to know whose every image is, and the data set "{data.name}" names no '
                "patients: give its table a column patient_id, a Dataset groups=, or take --privacy-unit image."
            )
        for patient in np.unique(split.patients.numpy()).tolist():
            if (owner := owners.setdefault(patient, k)) != k:
                raise UserError(
                    "--privacy-unit patient needs all images of a patient at one client, and clients "
                    f"{data.client_label(owner)} and {data.client_label(k)} share a patient: name one client for all "
                    "images of a patient, or none for any."
                )
    splits = tuple(_limit_images(split, images, k, seed) for k, split in enumerate(data.clients))
    return replace(data, clients=splits, statistics=data.statistics.recounted(splits))


def _limit_images(split: Split, images: int, client: int, seed: int) -> Split:
    assert split.patients is not None  # checked by limit_patients
    parts = []
    for rows in rows_of_units(number_patients(split)):
        if len(rows) > images:
            rng = stream(seed, f"patient-images/{int(split.patients[rows[0]])}", client=client)
            rows = rng.permutation(rows)[:images]
        parts.append(rows)
    return split.subset(torch.from_numpy(np.sort(np.concatenate(parts))))
