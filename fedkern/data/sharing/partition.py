"""Partitioners, which share training samples out among clients.

Each returns one sorted int64 array of rows per client; the arrays are disjoint and cover the set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedkern.data.sharing.groups import grouped_rows, rows_by_owner, share_cases, share_units, unit_noun
from fedkern.errors import UserError, suggest_name
from fedkern.streams import stream

Rows = npt.NDArray[np.int64]

DIRICHLET_MIN_SAMPLES = 10
DIRICHLET_DRAWS = 200
DIRICHLET_ALPHA = 1e9
"""Largest ALPHA: shares then differ by less than one sample, and NumPy's draws overflow far above."""


@dataclass(frozen=True)
class PartitionerInfo:
    usage: str
    description: str
    needs_classes: bool = False
    by_groups: bool = False


PARTITIONERS: dict[str, PartitionerInfo] = {
    "iid": PartitionerInfo("iid", "equal random shares: every client sees the same distribution"),
    "stratified": PartitionerInfo("stratified", "equal shares of every class", needs_classes=True),
    "dirichlet": PartitionerInfo(
        "dirichlet:ALPHA[:min=N][:plain]",
        "label skew: class shares by a Dirichlet(ALPHA) draw per class; small ALPHA, strong skew",
        needs_classes=True,
    ),
    "classes": PartitionerInfo("classes:S", "label skew: every client holds S classes only", needs_classes=True),
    "quantity": PartitionerInfo(
        "quantity:ALPHA[:min=N]", "quantity skew: sizes by one Dirichlet(ALPHA) draw; small ALPHA, strong skew"
    ),
    "attribute": PartitionerInfo(
        "attribute", "attribute skew: every client has its own contexts or background colours", by_groups=True
    ),
    "domain": PartitionerInfo(
        "domain:LAMBDA",
        "domain skew: 0: one domain (a group that the data name) a client, 1: all mixed",
        by_groups=True,
    ),
}


@dataclass(frozen=True)
class PartitionSpec:
    """Parsed partition specification.

    ``min_samples``: fewest samples per client under ``dirichlet`` and ``quantity``; every image of a patient or case
    counts.  ``plain``: ``dirichlet`` without balancing and without shuffling inside a class.  ``mixing``: LAMBDA of
    ``domain``.
    """

    text: str
    name: str
    alpha: float = math.nan
    classes_per_client: int = 0
    min_samples: int = DIRICHLET_MIN_SAMPLES
    plain: bool = False
    mixing: float = math.nan

    @property
    def info(self) -> PartitionerInfo:
        return PARTITIONERS[self.name]


def parse_partition(text: str) -> PartitionSpec:
    """Parse one of `PARTITIONERS` with its value, such as ``dirichlet:0.5:min=1``.

    Returns:
        The specification for :func:`partition`, with the text as the user wrote it.

    Raises:
        UserError: an unknown name (the message suggests the nearest), or a missing, malformed or superfluous value.
    """
    name, *values = text.strip().split(":")
    if name not in PARTITIONERS:
        choices = ", ".join(info.usage.split("[")[0] for info in PARTITIONERS.values())
        raise UserError(f'unknown partition "{text}": expected one of {choices}.{suggest_name(name, PARTITIONERS)}')
    usage = PARTITIONERS[name].usage
    if name in ("iid", "stratified", "attribute"):
        if values:
            raise UserError(f'partition "{text}": {name} takes no value, write {usage}')
        return PartitionSpec(text, name)
    if not values or not values[0]:
        example = 2 if name == "classes" else 0.5
        raise UserError(f'partition "{text}": {name} needs a value, for example {name}:{example}')
    if name == "classes":
        if len(values) > 1 or not values[0].isdecimal() or int(values[0]) < 1:
            raise UserError(f'partition "{text}": expected classes:S with a whole number S of at least 1')
        return PartitionSpec(text, name, classes_per_client=int(values[0]))
    try:
        number = float(values[0])
    except ValueError:
        number = math.nan
    if name == "domain":
        if len(values) > 1 or not 0 <= number <= 1:
            raise UserError(f'partition "{text}": expected domain:LAMBDA with a number LAMBDA from 0 to 1')
        return PartitionSpec(text, name, mixing=number)
    if not 0 < number <= DIRICHLET_ALPHA:
        equal = "stratified gives equal shares of every class" if name == "dirichlet" else "iid gives equal sizes"
        raise UserError(
            f'partition "{text}": expected {name}:ALPHA with a positive number ALPHA up to {DIRICHLET_ALPHA:g}, for '
            f"example 0.5; {equal}"
        )
    plain = name == "dirichlet" and "plain" in values[1:]
    fewest = 1 if plain else DIRICHLET_MIN_SAMPLES
    for value in values[1:]:
        if value.startswith("min=") and value[4:].isdecimal():
            fewest = int(value[4:])
        elif not plain or value != "plain":
            raise UserError(f'partition "{text}": cannot read "{value}", expected {usage}')
    return PartitionSpec(text, name, alpha=number, min_samples=fewest, plain=plain)


def partition(
    spec: str | PartitionSpec,
    labels: npt.NDArray[np.int64],
    clients: int,
    seed: int,
    *,
    class_count: int | None = None,
    groups: npt.NDArray[np.int64] | None = None,
    sizes: npt.NDArray[np.int64] | None = None,
    unit: str = "samples",
) -> list[Rows]:
    """Share the rows of ``labels`` out among ``clients``.

    Args:
        spec: a specification as text, or parsed by `parse_partition`.
        labels: int64 ``[n]``.
        clients: number of clients, at least 1.
        seed: the run's root seed; draws come from its stream ``"partition"``.
        class_count: number of classes, some of which may not occur (default: the largest label + 1).
        groups: int64 ``[n]``, for ``attribute`` the client of every row, for ``domain`` its domain.  Without ``groups``
            ``attribute`` shares rows out equally, and the attribute is made later, as in the coloured sets.
        sizes: int64 ``[n]``, the number of samples behind every row (default: 1), such as a patient's images.
        unit: plural noun for a row, for messages.

    Returns:
        One sorted int64 array of rows per client; the arrays are disjoint and cover all rows.

    Raises:
        UserError: more clients than samples, a client that would be empty, or a rule that cannot be met.
    """
    spec = parse_partition(spec) if isinstance(spec, str) else spec
    n = len(labels)
    if clients < 1:
        raise UserError(f"the number of clients must be at least 1, got {clients}")
    if clients > n:
        raise UserError(f"{clients} clients are more than the {n} training {unit}; take fewer clients or more {unit}")
    rng = stream(seed, "partition")
    class_count = (int(labels.max()) + 1) if class_count is None else class_count
    if spec.name == "attribute" and groups is not None:
        parts = rows_by_owner(groups, clients)
    elif spec.name in ("iid", "attribute"):
        parts = np.array_split(rng.permutation(n), clients)
    elif spec.name == "stratified":
        # Deal classes out in turn: clients differ by at most one sample, per class and in total.
        dealt = np.concatenate([rng.permutation(np.flatnonzero(labels == label)) for label in range(class_count)])
        parts = [dealt[k::clients] for k in range(clients)]
    elif spec.name == "classes":
        parts = _by_classes(spec, labels, clients, class_count, rng)
    elif spec.name == "domain":
        parts = _by_domains(spec, groups, clients, rng)
    else:
        row_sizes = np.ones(n, dtype=np.int64) if sizes is None else sizes
        parts = _draw_shares(spec, labels, clients, class_count, rng, row_sizes)
    parts = [np.sort(part).astype(np.int64) for part in parts]
    for k, part in enumerate(parts):
        if len(part) == 0:
            raise UserError(
                f'client {k} would have no training sample under partition "{spec.text}"; take fewer clients, more '
                f"{unit} or a milder partition"
            )
    return parts


def share_samples(
    spec: PartitionSpec,
    labels: Rows,
    clients: int,
    seed: int,
    classes: int,
    *,
    ids: Sequence[str] | None = None,
    cases: Tensor | None = None,
    patients: Tensor | None = None,
    owners: Rows | None = None,
) -> list[Rows]:
    """Share rows out as :func:`partition` does, with patients, cases and images with several texts kept whole.

    ``owners``, int64 ``[n]``, are clients or domains that the data name. Under ``attribute`` they decide alone.
    """
    is_named = spec.name == "attribute" and owners is not None

    def share(labels: Rows, rows: Rows, sizes: Rows | None) -> list[Rows]:
        unit = "samples" if sizes is None else unit_noun(cases, patients)
        groups = None if owners is None else owners[rows]
        return partition(spec, labels, clients, seed, class_count=classes, groups=groups, sizes=sizes, unit=unit)

    patients = None if is_named else patients
    if cases is not None:
        return share_cases((cases if patients is None else patients).numpy(), labels, share)
    units = None if is_named else grouped_rows(ids, None, patients)
    if units is None:
        return share(labels, np.arange(len(labels)), None)
    return share_units(units, lambda rows, sizes: share(labels[rows], rows, sizes))


def partition_like(
    labels: npt.NDArray[np.int64], counts: npt.NDArray[np.int64 | np.float64], rng: np.random.Generator
) -> list[Rows]:
    """Split a test set among clients in proportion to their training data, class by class (FuseFL's test split).

    Args:
        labels: int64 ``[n]`` of the set to split.
        counts: ``[clients, classes]``, int64 training samples, or float64 shares; a class that no client holds is
            shared out equally.
        rng: shuffles inside every class.

    Returns:
        One sorted int64 array of rows per client, possibly empty; the arrays are disjoint and cover all rows.

    Raises:
        ValueError: a label that ``counts`` has no class for.
    """
    clients, classes = counts.shape
    if len(labels) and int(labels.max()) >= classes:
        raise ValueError(f"labels: expected values below {classes}, got {int(labels.max())}")
    dealt = np.zeros((classes, clients), dtype=np.int64)
    for label, available in enumerate([np.count_nonzero(labels == label) for label in range(classes)]):
        weights = counts[:, label].astype(np.float64)
        share = weights / weights.sum() if weights.sum() > 0 else np.full(clients, 1 / clients)
        cuts = np.rint(np.cumsum(share) * available).astype(np.int64)[:-1]
        dealt[label] = np.diff(cuts, prepend=0, append=available)
    return [np.sort(part) for part in _take_counts(labels, dealt, rng)]


def _by_classes(spec: PartitionSpec, labels: Rows, clients: int, classes: int, rng: np.random.Generator) -> list[Rows]:
    per_client = spec.classes_per_client
    if per_client > classes:
        raise UserError(f'partition "{spec.text}": the data set has only {classes} classes')
    if clients * per_client < classes:
        fitting = math.ceil(classes / clients)
        raise UserError(
            f'partition "{spec.text}" gives {clients} clients {clients * per_client} classes and leaves out '
            f"{classes - clients * per_client} of {classes}; take classes:{fitting} or "
            f"{math.ceil(classes / per_client)} clients"
        )
    # Every client takes the classes that fewest others hold so far, so that clients overlap as little as possible.
    holders, held = np.zeros((classes, clients), dtype=np.int64), np.zeros(classes, dtype=np.int64)
    for client in range(clients):
        chosen = np.lexsort((rng.random(classes), held))[:per_client]
        holders[chosen, client] = 1
        held[chosen] += 1
    # Equal shares of a class for its clients, the first of which get one more.
    shares, remainders = np.divmod(np.bincount(labels, minlength=classes), held)
    counts = holders * (shares[:, None] + (holders.cumsum(1) <= remainders[:, None]))
    return _take_counts(labels, counts, rng)


def _draw_shares(
    spec: PartitionSpec, labels: Rows, clients: int, classes: int, rng: np.random.Generator, sizes: Rows
) -> list[Rows]:
    """Partition by Dirichlet draws: one per class, or with ``quantity`` one over the sizes of clients.

    Draws repeat until every client has ``min_samples``.
    """
    n = int(sizes.sum())
    if spec.min_samples * clients > n:
        raise UserError(
            f'partition "{spec.text}" asks for at least {spec.min_samples} samples per client, but {clients} clients '
            f"share only {n}; take fewer clients, more samples, or append :min=1"
        )
    per_class = np.bincount(labels, minlength=classes)
    for _ in range(DIRICHLET_DRAWS):
        if spec.name == "quantity":
            cuts = np.cumsum(rng.dirichlet(np.full(clients, spec.alpha)))[:-1] * len(labels)
            parts = np.split(rng.permutation(len(labels)), cuts.astype(np.int64))
        else:
            counts = _dirichlet_counts(spec, per_class, clients, rng)
            if counts.sum(axis=0).min() * sizes.max() < spec.min_samples:
                continue  # before the rows are shuffled: counting makes a retry cheap
            parts = _take_counts(labels, counts, None if spec.plain else rng)
        if min(sizes[part].sum() for part in parts) >= spec.min_samples:
            return parts
    raise UserError(
        f'partition "{spec.text}" found no draw in {DIRICHLET_DRAWS} that leaves each of {clients} clients '
        f"{spec.min_samples} samples of {n}; take a larger ALPHA or fewer clients, or append :min=1"
    )


def _take_counts(labels: Rows, counts: npt.NDArray[np.int64], rng: np.random.Generator | None) -> list[Rows]:
    """Return every client's rows, of every class as many as ``counts`` ``[classes, clients]``, shuffled by ``rng``."""
    of_classes = [np.flatnonzero(labels == label) for label in range(len(counts))]
    rows = np.concatenate(of_classes if rng is None else [rng.permutation(part) for part in of_classes])
    owners = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
    return [rows[places] for places in rows_by_owner(owners, counts.shape[1])]


def _dirichlet_counts(
    spec: PartitionSpec, per_class: Rows, clients: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return rows per class and client, int64 ``[classes, clients]``, of one Dirichlet draw per class.

    The default is the "NIID-bench" form, as in FuseFL's code: a client with its fair share of rows gets nothing of the
    next class.  ``plain`` is FedIOD's form, without balancing and without shuffling inside a class.
    """
    counts = np.zeros((len(per_class), clients), dtype=np.int64)
    totals = np.zeros(clients, dtype=np.int64)
    fair = per_class.sum() / clients
    draws = rng.dirichlet(np.full(clients, spec.alpha), size=len(per_class))
    for label, (available, share) in enumerate(zip(per_class, draws, strict=True)):
        if not spec.plain:
            room = totals < fair
            share = np.where(room, share, 0.0)
            if share.sum() == 0:  # the whole draw fell on clients that are full
                share = room if room.any() else np.ones(clients)
            share = share / share.sum()
        cuts = np.floor(np.cumsum(share)[:-1] * available).astype(np.int64).clip(0, available)
        counts[label] = np.diff(cuts, prepend=0, append=available)
        totals += counts[label]
    return counts


def _by_domains(
    spec: PartitionSpec, groups: npt.NDArray[np.int64] | None, clients: int, rng: np.random.Generator
) -> list[Rows]:
    """Partition by domains, as "heterogeneous partitioning" of Bai et al. (arXiv 2307.04942).

    A domain's clients share the part 1 - LAMBDA of its rows, and all clients the part LAMBDA.
    """
    if groups is None:
        raise UserError(
            f'partition "{spec.text}" needs the domain of every sample: a column client, site folders, or groups= in '
            "Python"
        )
    positions = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    owners = _domain_clients(np.bincount(positions), clients)
    shares = (1 - spec.mixing) * owners / owners.sum(1, keepdims=True) + spec.mixing / clients
    return partition_like(positions, shares.T, rng)


def _domain_clients(counts: npt.NDArray[np.int64], clients: int) -> npt.NDArray[np.int64]:
    """Return which clients a domain has, int64 ``[domains, clients]`` of 0 and 1, for clients of similar sizes."""
    owners = np.zeros((len(counts), clients), dtype=np.int64)
    if clients < len(counts):  # the largest domain first, each to the client with fewest samples
        for domain in np.argsort(-counts, kind="stable"):
            owners[domain, np.argmin(counts @ owners)] = 1
        return owners
    number = np.ones(len(counts), dtype=np.int64)
    for _ in range(clients - len(counts)):
        number[np.argmax(counts / number)] += 1
    owners[np.repeat(np.arange(len(counts)), number), np.arange(clients)] = 1
    return owners
