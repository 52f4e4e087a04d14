"""Holdout: a test set of every client's own samples, and one client that is left out of training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fedkern.data.cases import drawn_rows, grouped_rows
from fedkern.data.transforms import central
from fedkern.data.types import FederatedData, Split, joined
from fedkern.errors import UserError, nearest
from fedkern.streams import stream

HELD_OUT = "held_out"
"""Name of the test set with the samples of the client that is left out of training."""
SHOWN = 20
"""Most clients that a message lists by name."""


def hold_out(data: FederatedData, *, held_out: str | int | None, share: float, seed: int) -> FederatedData:
    """The federation without one client, and with an own test set for every other client.

    Args:
        data: all clients.
        held_out: name or number of the client that never trains, or None.  All its samples become the test set
            ``"held_out"``, and the numbers of the clients after it fall by one.
        share: share of every other client's samples, in [0, 1), that becomes its own test set and replaces a client
            test of the data set; 0 keeps the client tests of the data set.  A test set has at least two samples.  A
            patient, a case and an image with several texts count as one sample and are never divided.
        seed: the run's root seed; the samples drawn of a client depend on no other client.

    Raises:
        UserError: there is no such client, no other client is left, another client has some of its images, or a client
            has too few samples.
    """
    numbers = list(range(len(data.clients)))
    tests, statistics = dict(data.tests), data.statistics
    if held_out is not None:
        absent = _client(data, held_out)
        numbers.remove(absent)
        _check_unseen(data, absent, numbers)
        tests = _without(data, absent)
        statistics = statistics.without(absent, len(tests[HELD_OUT]))
    names = None if data.client_names is None else tuple(data.client_names[k] for k in numbers)
    kept = tuple(data.clients[k] for k in numbers)
    own = tuple(data.client_tests[k] for k in numbers) if data.client_tests else ()
    if share:
        parts = [_divided(data.clients[k], data.client_label(k), k, share, seed) for k in numbers]
        kept = tuple(part for part, _ in parts)
        own = tuple(central(test, data.image_shape[1:]) for _, test in parts)
        statistics = statistics.recounted([split.image_labels.numpy() for split in kept], [len(test) for test in own])
    homes = data.test_clients
    if homes is not None:
        place = torch.full((len(data.clients) + 1,), -1)  # the last place is that of images without a client, -1
        place[numbers] = torch.arange(len(numbers))
        homes = place[homes]
    return replace(
        data,
        clients=kept,
        tests=tests,
        client_tests=own,
        client_names=names,
        statistics=statistics,
        test_clients=homes,
    )


def _client(data: FederatedData, wanted: str | int) -> int:
    """The number of the client that has this name or, where none has, this number."""
    names, count = data.client_names, len(data.clients)
    text = str(wanted)
    if count > 1 and names is not None and text in names:
        return names.index(text)
    if count > 1 and text.isdecimal() and int(text) < count:
        return int(text)
    named = [data.client_label(k) for k in range(min(count, SHOWN))] if names is not None else []
    every = ", ".join(named) + ", ..." * (count > SHOWN) if named else f"0 to {count - 1}"
    last = every if count > 1 else "and a single one cannot be"
    raise UserError(f"--held-out-client must be one of the clients, {last}, not {text}.{nearest(text, names or ())}")


def _without(data: FederatedData, held_out: int) -> dict[str, Split]:
    """The test sets where a client never trains: all its samples are the test set ``held_out``.

    The client's own test images belong to ``held_out`` too, and to no other test set.
    """
    sides = data.image_shape[1:]
    unseen = central(data.clients[held_out], sides)
    if not data.client_tests:
        return {**data.tests, HELD_OUT: unseen}
    own = data.client_tests[held_out]
    names = set(own.ids or ())
    found: dict[str, Split] = {}
    shared = False
    for key, split in data.tests.items():
        rows = torch.tensor([row for row, name in enumerate(split.ids or ()) if name not in names], dtype=torch.int64)
        ours = bool(names) and split.ids is not None and len(rows) < len(split)
        found[key] = split.subset(rows) if ours else split
        shared = shared or ours
    return {**found, HELD_OUT: joined([unseen, own]) if shared else unseen}


def _check_unseen(data: FederatedData, held_out: int, others: list[int]) -> None:
    own = set(data.clients[held_out].ids or ())
    for k in others:
        shared = own.intersection(data.clients[k].ids or ())
        if shared:
            raise UserError(
                f"Client {data.client_label(held_out)} cannot be held out: {len(shared)} of its images ({min(shared)}) "
                f"belong to client {data.client_label(k)}, which trains on them; name one client for every image."
            )


def _divided(split: Split, label: str, client: int, share: float, seed: int) -> tuple[Split, Split]:
    units = grouped_rows(split.ids, split.cases, split.patients)
    parts = drawn_rows(stream(seed, "client-test", client=client), len(split), units)
    count = max(2, round(share * len(parts)))
    if len(parts) < count + 2:
        named = "patients" if split.patients is not None else "different images" if split.cases is None else "cases"
        what = "samples" if units is None else named
        raise UserError(
            f"Client {label} has {len(parts)} {what}, too few for a test set of its own: use fewer clients, more "
            f"{what}, or --client-test 0."
        )
    test, kept = (torch.from_numpy(np.sort(np.concatenate(rows))) for rows in (parts[:count], parts[count:]))
    return split.subset(kept), split.subset(test)
