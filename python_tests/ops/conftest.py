"""Fixtures of all operator tests: the available backends and ISA levels, and how often the slowest one runs."""

import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch

from python_tests.ops import operator_cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", operator_cases.BACKENDS, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Yield each available backend and ISA level in turn, active during the test."""
    with operator_cases.using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch on one thread: on a busy machine its own operators, the oracle, crawl with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Restore torch's number of threads where a test has set another."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def cache_bytes() -> Iterator[Callable[[int], None]]:
    """Set the core's size of the last-level cache."""
    from fedkern.ops._core.backend import cpu_core

    core = cpu_core()
    before = core.cache_bytes()
    yield core.set_cache_bytes
    core.set_cache_bytes(before)


# Tests whose cases are all too large for the interpreter: long vectors, many iterations.
LARGE = {
    "test_clients",
    "test_more_than_a_block",
    "test_out_may_be_an_input_or_overlap_one",
    "test_streamed_results_are_the_same",
}


def _in_full(config: pytest.Config) -> bool:
    return "slow" in config.option.markexpr and "not slow" not in config.option.markexpr


def _texts(item: Any) -> set[str]:
    return {value for value in item.callspec.params.values() if isinstance(value, str)}


def _is_triton(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and "triton" in _texts(item)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave a few cases of each test to Triton's interpreter.

    ``pytest -m slow -k triton`` runs all of them.

    The default run has ``triton/test_triton_operators.py`` alone; the interpreter's other cases, CUDA's kernels in the
    emulator, and the CPU kernels at other ISA levels than the best one are ``exhaustive``.
    """
    other_kernels = set(operator_cases.KERNELS[:-1])
    groups = defaultdict(list)
    for item in items:
        folder = item.path.parent.name
        interpreted = folder == "triton" and item.path.name != "test_triton_operators.py"
        if folder == "cuda" or interpreted or (folder != "triton" and _is_triton(item)):
            item.add_marker(pytest.mark.exhaustive)
        if other_kernels and hasattr(item, "callspec") and other_kernels & _texts(item):
            item.add_marker(pytest.mark.exhaustive)
        if _is_triton(item):
            groups[item.nodeid.partition("[")[0]].append(item)
    for group in groups.values():
        chosen = group if len(group) == 1 else operator_cases.few(group, lambda item: item.callspec.params)
        for item in group:
            if _in_full(config) or item not in chosen or getattr(item, "originalname", "") in LARGE:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _thin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the same for a test that walks through its cases itself."""
    if _is_triton(request.node) and not _in_full(request.config):
        monkeypatch.setattr(operator_cases, "THIN", True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Skip what Triton does not implement, and say so."""
    try:
        yield
    except RuntimeError as error:
        if re.search("backend 'triton' was forced, but it (does not implement|has no kernel for)", str(error)):
            pytest.skip(str(error))
        raise
