"""Tests of partitioners: disjoint, covering, reproducible, and clear when a rule cannot be met."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkern.data import PARTITIONERS, PartitionStatistics, parse_partition, partition, partition_like
from fedkern.data.sharing.groups import rows_by_owner, share_cases, share_units
from fedkern.errors import UserError
from fedkern.streams import stream

LABELS = np.random.default_rng(0).integers(0, 10, size=3_000)


def assert_partition(parts: list[np.ndarray], n: int) -> None:
    joined = np.concatenate(parts)
    assert len(joined) == n
    np.testing.assert_array_equal(np.sort(joined), np.arange(n))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


SPECS = (
    "iid", "dirichlet:0.1", "dirichlet:0.5", "dirichlet:100", "dirichlet:0.5:plain", "dirichlet:0.2:min=20",
    "classes:1", "classes:2", "classes:3", "classes:10", "attribute", "quantity:0.5", "quantity:3:min=1",
)  # fmt: skip
# classes:S needs enough clients for every class to be held; fewer are an error, tested below.
CASES = [
    (spec, clients)
    for spec in SPECS
    for clients in (1, 5, 10, 17)
    if not spec.startswith("classes") or int(spec.split(":")[1]) * clients >= 10
]


@pytest.mark.parametrize(("spec", "clients"), CASES)
def test_parts_are_disjoint_and_cover_the_set(spec: str, clients: int) -> None:
    parts = partition(spec, LABELS, clients, seed=3)
    assert len(parts) == clients
    assert_partition(parts, len(LABELS))
    sizes = [len(part) for part in parts]
    assert min(sizes) > 0
    assert spec != "iid" or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.3", "classes:2", "quantity:0.3"])
def test_the_seed_reproduces_and_changes_the_partition(spec: str) -> None:
    parts, again, reseeded = (partition(spec, LABELS, 8, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(parts, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(parts, reseeded, strict=True))


@pytest.mark.exhaustive
@given(n=st.integers(1, 300), clients=st.integers(1, 40), classes=st.integers(1, 12), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_any_size_ends_in_a_partition_or_a_user_error(n: int, clients: int, classes: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, size=n)
    for spec in ("iid", "dirichlet:0.2:min=1", "dirichlet:0.001:plain", "classes:2"):
        try:
            parts = partition(spec, labels, clients, seed, class_count=classes)
        except UserError:
            assert clients > n or spec != "iid"
            continue
        assert_partition(parts, n)
        assert min(len(part) for part in parts) > 0


def test_dirichlet_skew_grows_as_alpha_falls_and_the_minimum_holds() -> None:
    def skew(alpha: float) -> float:
        parts = partition(f"dirichlet:{alpha}", LABELS, 10, seed=0)
        assert min(len(part) for part in parts) >= 10
        return float(PartitionStatistics.of([LABELS[part] for part in parts], tuple("0123456789"), "").skew.mean())

    assert skew(0.1) > 1.5 * skew(1) > 3 * skew(100)


def test_dirichlet_stops_giving_to_clients_that_hold_their_share() -> None:
    # Balanced: no client may hold more than its fair share plus one whole class; plain: one does, for some seed.
    largest_class = np.bincount(LABELS).max()
    fair = len(LABELS) / 10
    balanced = [max(map(len, partition("dirichlet:0.1", LABELS, 10, seed))) for seed in range(20)]
    assert max(balanced) <= fair + largest_class
    plain = [max(map(len, partition("dirichlet:0.1:plain:min=0", LABELS, 4, seed))) for seed in range(20)]
    assert max(plain) > 1.3 * len(LABELS) / 4


def test_plain_dirichlet_keeps_the_order_inside_a_class() -> None:
    parts = partition("dirichlet:1:plain", LABELS, 5, seed=0)
    for label in range(10):
        rows = np.concatenate([part[LABELS[part] == label] for part in parts])
        assert (np.diff(rows) > 0).all()


def test_dirichlet_is_fast_for_500_clients() -> None:
    labels = np.random.default_rng(1).integers(0, 100, size=50_000)
    start = time.perf_counter()
    parts = partition("dirichlet:0.5", labels, 500, seed=0)
    assert time.perf_counter() - start < 5
    assert_partition(parts, len(labels))
    assert min(len(part) for part in parts) >= 10


def test_dirichlet_gives_up_with_a_message_instead_of_looping() -> None:
    labels = np.random.default_rng(1).integers(0, 10, size=20_000)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"dirichlet:0.01.*500 clients.*larger ALPHA"):
        partition("dirichlet:0.01", labels, 500, seed=0)
    assert time.perf_counter() - start < 20


def test_dirichlet_minimum_that_cannot_exist_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"at least 10 samples per client, but 200 clients share only 1200"):
        partition("dirichlet:0.5", LABELS[:1200], 200, seed=0)


@pytest.mark.parametrize(("per_client", "clients"), [(1, 10), (2, 5), (5, 2)])
def test_classes_are_exclusive_where_the_numbers_allow(per_client: int, clients: int) -> None:
    parts = partition(f"classes:{per_client}", LABELS, clients, seed=4)
    held = [set(LABELS[part].tolist()) for part in parts]
    assert all(len(classes) == per_client for classes in held)
    assert sum(len(classes) for classes in held) == len(set.union(*held)) == 10


@pytest.mark.parametrize(("per_client", "clients"), [(1, 23), (2, 10), (3, 7), (7, 4)])
def test_shared_classes_have_equally_many_holders(per_client: int, clients: int) -> None:
    parts = partition(f"classes:{per_client}", LABELS, clients, seed=4)
    holders = np.zeros(10, dtype=int)
    for part in parts:
        present = np.unique(LABELS[part])
        assert len(present) == per_client
        holders[present] += 1
    assert holders.max() - holders.min() <= 1


def test_attribute_follows_the_groups() -> None:
    groups = np.random.default_rng(2).integers(0, 4, size=len(LABELS))
    for k, part in enumerate(partition("attribute", LABELS, 4, seed=0, groups=groups)):
        np.testing.assert_array_equal(part, np.flatnonzero(groups == k))
    with pytest.raises(UserError, match="client 4 would have no training sample"):
        partition("attribute", LABELS, 5, seed=0, groups=groups)


def test_sizes_are_one_dirichlet_draw_and_classes_are_mixed() -> None:
    parts = partition("quantity:0.8", LABELS, 6, seed=3)
    rng = stream(3, "partition")
    while True:
        cuts = (np.cumsum(rng.dirichlet(np.full(6, 0.8)))[:-1] * len(LABELS)).astype(np.int64)
        wanted = np.split(rng.permutation(len(LABELS)), cuts)
        if min(map(len, wanted)) >= 10:
            break
    for part, rows in zip(parts, wanted, strict=True):
        np.testing.assert_array_equal(part, np.sort(rows))


DOMAINS = np.repeat([7, 2, 5], [600, 300, 100])  # numbers that are no positions, and the largest first


def domain_counts(spec: str, clients: int) -> np.ndarray:
    """Return every client's rows of domains 2, 5 and 7, int64 ``[clients, 3]``."""
    parts = partition(spec, LABELS[:1000], clients, seed=1, groups=DOMAINS)
    assert_partition(parts, 1000)
    return np.array([[(DOMAINS[part] == domain).sum() for domain in (2, 5, 7)] for part in parts])


def test_domains_are_apart_mixed_or_in_between() -> None:
    # Domain 7 is twice as large as domain 2: of seven clients it has four.
    separate = [[150, 0, 0]] * 2 + [[0, 100, 0]] + [[0, 0, 150]] * 4
    np.testing.assert_array_equal(domain_counts("domain:0", 7), separate)
    np.testing.assert_array_equal(domain_counts("domain:1", 5), [[60, 20, 120]] * 5)
    np.testing.assert_array_equal(domain_counts("domain:0.5", 2), [[75, 25, 450], [225, 75, 150]])  # 5 and 2 together


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5", "classes:2", "attribute"])
def test_more_clients_than_samples_or_none(spec: str) -> None:
    with pytest.raises(UserError, match="21 clients are more than the 20 training samples"):
        partition(spec, LABELS[:20], 21, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        partition(spec, LABELS, 0, seed=0)


@pytest.mark.parametrize(("spec", "message"), [
    ("dirichelt:0.1", 'unknown partition "dirichelt:0.1".*Did you mean "dirichlet"'),
    ("", "unknown partition"),
    ("dirichlet", "needs a value, for example dirichlet:0.5"),
    ("dirichlet:", "needs a value"),
    ("dirichlet:x", "positive number ALPHA"),
    ("dirichlet:0", "positive number ALPHA"),
    ("dirichlet:-1", "positive number ALPHA"),
    ("dirichlet:inf", "positive number ALPHA"),
    ("dirichlet:1e308:plain", r"positive number ALPHA up to 1e\+09.*stratified gives equal shares"),
    ("dirichlet:nan", "positive number ALPHA"),
    ("dirichlet:1:mim=3", 'cannot read "mim=3"'),
    ("classes", "needs a value, for example classes:2"),
    ("domain", "needs a value, for example domain:0.5"),
    ("domain:1.1", "number LAMBDA from 0 to 1"),
    ("domain:0:1", "number LAMBDA from 0 to 1"),
    ("quantity:0", "positive number ALPHA .*iid gives equal sizes"),
    ("quantity:1:plain", 'cannot read "plain", expected quantity:ALPHA'),
    ("classes:0", "whole number S"),
    ("classes:1.5", "whole number S"),
    ("classes:2:3", "whole number S"),
    ("iid:3", "iid takes no value"),
    ("classes:11", "only 10 classes"),
    ("classes:1", "leaves out 5 of 10; take classes:2 or 10 clients"),
])  # fmt: skip
def test_bad_specifications(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        partition(spec, LABELS, 5, seed=0)


def test_every_registered_partitioner_can_be_parsed() -> None:
    examples = {"dirichlet": "dirichlet:0.5", "classes": "classes:2", "quantity": "quantity:1", "domain": "domain:0"}
    examples |= {name: name for name in ("iid", "stratified", "attribute")}
    assert set(examples) == set(PARTITIONERS)
    for name, text in examples.items():
        assert parse_partition(text).name == name
        assert PARTITIONERS[name].usage.startswith(name)
        assert "\n" not in PARTITIONERS[name].description


def test_partition_like_follows_the_training_proportions() -> None:
    counts = np.array([[30, 0, 5], [10, 0, 5], [0, 0, 90]])
    labels = np.repeat([0, 1, 2], [400, 300, 1000])
    parts = partition_like(labels, counts, np.random.default_rng(0))
    assert_partition(parts, len(labels))
    made = np.stack([np.bincount(labels[part], minlength=3) for part in parts])
    np.testing.assert_array_equal(made[:, 0], [300, 100, 0])
    np.testing.assert_array_equal(made[:, 1], [100, 100, 100])  # held by no client: shared out equally
    np.testing.assert_array_equal(made[:, 2], [50, 50, 900])
    with pytest.raises(ValueError, match="labels: expected values below 2, got 2"):
        partition_like(np.array([0, 2]), counts[:, :2], np.random.default_rng(0))


def test_statistics_table() -> None:
    statistics = PartitionStatistics.of(
        [np.array([0, 0, 0, 1]), np.array([1, 1]), np.array([2, 2, 2])], ("cat", "dog", "owl"), "x"
    )
    np.testing.assert_array_equal(statistics.counts, [[3, 1, 0], [0, 2, 0], [0, 0, 3]])
    np.testing.assert_array_equal(statistics.sizes, [4, 2, 3])
    np.testing.assert_allclose(statistics.skew, [(3 / 4 - 1 / 3 + 1 / 3 + 1 / 3 - 1 / 4) / 2, 2 / 3, 2 / 3])
    assert statistics.header() == ["client", "samples", "skew", "cat", "dog", "owl"]
    rows = statistics.rows()
    assert rows[0] == ["0", "4", "0.42", "3", "1", "0"]
    assert rows[-1][:2] == ["all", "9"]
    assert rows[-1][3:] == ["3", "3", "3"]
    short = statistics.rows(limit=1)
    assert [row[0] for row in short] == ["0", "... 2 more", "all"]


def test_rows_of_owners() -> None:
    owners = np.random.default_rng(0).integers(-2, 9, size=200)
    found = rows_by_owner(owners, 7)
    assert len(found) == 7
    for k, rows in enumerate(found):
        np.testing.assert_array_equal(rows, np.flatnonzero(owners == k))
    assert [len(rows) for rows in rows_by_owner(np.zeros(0, dtype=np.int64), 3)] == [0, 0, 0]


def test_units_and_cases_are_shared_out_by_owner() -> None:
    rng = np.random.default_rng(0)
    units = np.concatenate([np.arange(40), rng.integers(0, 40, size=160)])
    given = [np.sort(part) for part in np.split(rng.permutation(40)[:35], [3, 3, 20])]  # an empty client; five are left

    def share(*columns: np.ndarray) -> list[np.ndarray]:
        np.testing.assert_array_equal(columns[-1], np.bincount(units))
        return given

    for found in (share_units(units, share), share_cases(units, units % 3, share)):
        for rows, part in zip(found, given, strict=True):
            np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(units, part)))


@pytest.mark.parametrize("spec", ["dirichlet:0.5", "dirichlet:0.5:plain:min=40", "quantity:1:min=40"])
def test_the_minimum_counts_the_samples_of_a_unit(spec: str) -> None:
    sizes = np.random.default_rng(0).integers(10, 30, size=40)
    labels = np.arange(40) % 2
    minimum = parse_partition(spec).min_samples
    for seed in range(20):
        parts = partition(spec, labels, 5, seed, sizes=sizes, unit="patients")
        assert_partition(parts, 40)
        assert min(sizes[part].sum() for part in parts) >= minimum


def test_units_have_their_name_in_messages() -> None:
    for spec in ("iid", "dirichlet:0.5"):
        with pytest.raises(UserError, match=r"5 clients are more than the 4 training patients; take .* more patients"):
            partition(spec, np.arange(4) % 2, 5, 0, sizes=np.full(4, 20), unit="patients")


def test_clients_that_stand_for_all() -> None:
    counts = np.random.default_rng(0).integers(0, 9, size=(500, 3))
    statistics = PartitionStatistics(counts, ("a", "b", "c"), "iid")
    shown = statistics.spread(50)
    sizes = statistics.sizes[shown]
    assert len(set(shown.tolist())) == 50
    assert (np.diff(sizes) <= 0).all()
    assert (sizes[0], sizes[-1]) == (statistics.sizes.max(), statistics.sizes.min())
    np.testing.assert_array_equal(statistics.spread(500), np.arange(500))


@pytest.mark.parametrize(
    ("text", "title"),
    [("iid", "equal random shares"), ("attribute", "attribute skew"), ("classes:2", "label skew, 2 classes a client"),
     ("dirichlet:0.10:plain", "label skew, Dirichlet(0.1), plain"), ("stratified", "equal shares of every class"),
     ("quantity:0.5:min=1", "quantity skew, Dirichlet(0.5), min=1"), ("domain:0.25", "domain skew, 0.25 of 1 mixed"),
     ("own data", "own data")],
)  # fmt: skip
def test_a_partition_in_words(text, title):
    assert PartitionStatistics(np.zeros((1, 0)), (), text).title == title
