"""Data kept from training: own test sets, a client that never trains, images of a patient beyond a limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedkern.data.sharing.groups import Rows, drawn_rows, rows_of_units, unit_noun
from fedkern.data.split import Split
from fedkern.data.types import FederatedData
from fedkern.errors import UserError, suggest_name
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


HELD_OUT = "held_out"
"""Name of the test set with the held-out client's samples."""
SHOWN = 20
"""Most clients that a message names."""


def hold_out(data: FederatedData, *, held_out: str | int | None, share: float, seed: int) -> FederatedData:
    """Return the federation without one client, and with an own test set for every other client.

    Args:
        held_out: name or number of the client that never trains, or None.  Its samples become the test set
            ``"held_out"``, and later clients' numbers fall by one.  Other sets lose its images, known by `Split.homes`
            or name, or else by equal pixels and label; an emptied test set is dropped.
        share: share in [0, 1) of each other client's samples, at least two, for its own test set, instead of the data
            set's; 0: unchanged.  Patients, cases and images with several texts stay whole.
        seed: root seed; a client's draw depends on no other client.
    """
    numbers = list(range(len(data.clients)))
    statistics = data.statistics
    if held_out is not None:
        absent = _client(data, held_out)
        if HELD_OUT in data.tests:
            raise UserError(f'--held-out-client makes the test set "{HELD_OUT}", which the data have: rename theirs.')
        numbers.remove(absent)
        _check_unseen(data, absent, numbers)
        data = _move_client_to_test(data, absent, numbers)
        statistics = statistics.without(absent, len(data.tests[HELD_OUT]))
    names = None if data.client_names is None else tuple(data.client_names[k] for k in numbers)
    splits = tuple(data.clients[k] for k in numbers)
    client_tests = tuple(data.client_tests[k] for k in numbers) if data.client_tests else ()
    if share:
        parts = [_divide_split(data.clients[k], data.client_label(k), k, share, seed) for k in numbers]
        splits = tuple(part for part, _ in parts)
        client_tests = tuple(data.form.central(test) for _, test in parts)
        statistics = statistics.recounted(splits, [len(test) for test in client_tests])
    return replace(data, clients=splits, client_tests=client_tests, client_names=names, statistics=statistics)


def _client(data: FederatedData, client: str | int) -> int:
    """Return the number of a client by name, or by number if no name is a number."""
    names, count = data.client_names, len(data.clients)
    text = str(client)
    if count > 1 and names is not None and text in names:
        return names.index(text)
    numbers = {k: int(name) for k, name in enumerate(names or ()) if str(name).isdecimal()}
    candidates = numbers or {k: k for k in range(count)}
    meant = [k for k, number in candidates.items() if text.isdecimal() and number == int(text)]
    if count > 1 and len(meant) == 1:
        return meant[0]
    named = [names[k] if numbers else data.client_label(k) for k in range(min(count, SHOWN))] if names else []
    choices = ", ".join(named) + ", ..." * (count > SHOWN) if named else f"0 to {count - 1}"
    last = choices if count > 1 else "and a single one cannot be"
    hint = suggest_name(text, names or ())
    raise UserError(f"--held-out-client must be one of the clients, {last}, not {text}.{hint}")


def _move_client_to_test(data: FederatedData, absent: int, staying: list[int]) -> FederatedData:
    """Move a client's images from the validation, public and test sets to the test set ``held_out``.

    The clients ``staying`` are renumbered in the homes of images.
    """
    place = torch.full((len(data.clients) + 1,), -1)  # the last place is that of images without a client, -1
    place[staying] = torch.arange(len(staying))
    train = data.clients[absent]
    identities = {name for split in (train, *data.client_tests[absent : absent + 1]) for name in split.identities()}
    unseen = [data.form.central(train)]
    counted = set(train.identities())

    def purge_split(split: Split) -> Split:
        images = split.identities()
        mask = torch.tensor([name in identities for name in images], dtype=torch.bool)
        if split.homes is not None:
            mask |= split.homes == absent
            split = replace(split, homes=place[split.homes])
        if not bool(mask.any()):
            return split
        # A set with cues or patches shows the images of another set again: an image counts once.
        new = mask & torch.tensor([name not in counted for name in images], dtype=torch.bool)
        if bool(new.any()):
            unseen.append(split.subset(new.nonzero().flatten()))
            counted.update(unseen[-1].identities())
        return split.subset((~mask).nonzero().flatten())

    tests = {name: purge_split(split) for name, split in data.tests.items()}
    validation = purge_split(data.validation)
    public = None if data.public is None else purge_split(data.public)
    tests = {name: split for name, split in tests.items() if len(split)}
    held_out = unseen[0].plus(unseen[1:])
    tests[HELD_OUT] = held_out if held_out.homes is None else replace(held_out, homes=None)
    return replace(data, tests=tests, validation=validation, public=public or None)  # None too if it is empty


def _check_unseen(data: FederatedData, held_out: int, staying: list[int]) -> None:
    identities = set(data.clients[held_out].identities())
    for k in staying:
        shared = identities.intersection(data.clients[k].identities())
        if shared:
            named = f" ({min(shared)})" if data.clients[k].ids is not None else ""
            samples_text = f"{len(shared)} of its {data.form.noun}{named}"
            raise UserError(
                f"Client {data.client_label(held_out)} cannot be held out: {samples_text} belong to client "
                f"{data.client_label(k)}, which trains on them; name one client for every one of them."
            )


def _divide_split(split: Split, label: str, client: int, share: float, seed: int) -> tuple[Split, Split]:
    units = split.units()
    parts = drawn_rows(stream(seed, "client-test", client=client), len(split), units)
    count = max(2, round(share * len(parts)))
    if len(parts) < count + 2:
        noun = "samples" if units is None else unit_noun(split.cases, split.patients)
        raise UserError(
            f"Client {label} has {len(parts)} {noun}, too few for a test set of its own: use fewer clients, more "
            f"{noun}, or --client-test 0."
        )
    test, train = (torch.from_numpy(np.sort(np.concatenate(rows))) for rows in (parts[:count], parts[count:]))
    return split.subset(train), split.subset(test)
