"""Tests of random calls of every public operator, each in another process, beside its float64 reference.

The seed changes from day to day and stands in pytest's header; ``FEDKERN_SEED=N`` repeats a day's cases.
"""

import contextlib
import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fedkern import ops
from python_tests.ops import differential
from python_tests.ops.case_server import Cases, cases
from python_tests.ops.every_operator import NO_OPERATORS
from python_tests.ops.operator_cases import KERNELS

SEED = int(os.environ["FEDKERN_SEED"])  # python_tests/conftest.py sets it to the day's
SECONDS = 12 / len(differential.OPERATORS)
MORE = 100 / len(differential.OPERATORS)
HOUR = 3600 / len(differential.OPERATORS)
LEAST = 20


ISAS = [name.removeprefix("cpu-") for name in KERNELS]


@pytest.fixture(scope="module")
def server() -> Iterator[Cases]:
    with cases() as running:
        yield running


def search(server: Cases, operator: str, seconds: float, start: int) -> int:
    """Try cases for some seconds, and return their number.

    A failure is shrunk and printed with its case and backend.
    """
    end = time.monotonic() + seconds
    tried = 0

    @seed(start)
    @settings(
        max_examples=1_000_000,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(differential.OPERATORS[operator].cases, st.sampled_from(["", "", *ISAS, "reference"]))
    def one(case: differential.Case, where: str) -> None:
        nonlocal tried
        if time.monotonic() > end and tried >= LEAST and not failed:
            raise _TimeIsUp
        failure = server.failure(operator, case, where)
        tried += 1
        if failure:
            failed.append(failure)
            raise AssertionError(f"ops.{operator} {where or 'as dispatched'} (FEDKERN_SEED={start}): {failure}")

    failed: list[str] = []
    with contextlib.suppress(_TimeIsUp):
        one()
    return tried


class _TimeIsUp(BaseException):
    """End of a search: hypothesis counts examples, not seconds."""


def test_every_operator_has_cases() -> None:
    assert set(differential.OPERATORS) == set(ops.__all__) - NO_OPERATORS | {"Accumulator"}


@pytest.mark.parametrize("operator", differential.OPERATORS)
def test_random_calls_agree_with_the_reference(server: Cases, operator: str) -> None:
    assert search(server, operator, SECONDS, SEED) >= LEAST


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", differential.OPERATORS)
def test_more_random_calls_agree_with_the_reference(server: Cases, operator: str) -> None:
    assert search(server, operator, MORE, SEED + 10**6) >= LEAST


@pytest.mark.slow
@pytest.mark.parametrize("operator", differential.OPERATORS)
def test_an_hour_of_random_calls(server: Cases, operator: str) -> None:
    assert search(server, operator, float(os.environ.get("FEDKERN_SECONDS", HOUR)), SEED + 1) > LEAST


@pytest.mark.exhaustive
def test_a_wrong_result_and_a_crash_are_failures(server: Cases) -> None:
    """The search relies on this: a case that fails or kills its process is reported, and the next one runs."""
    numbers = {"dtype": "float32", "values": "normal", "layout": "contiguous", "grad": True, "seed": 1, "shape": [2, 3]}
    right = {"logits": numbers, "reduction": "sum", "dim": 1, "_stacked": False}
    assert server.failure("entropy", right, "") == ""
    assert "KeyError" in server.failure("entropy", {**right, "reduction": None, "logits": {}}, "")
    # AddressSanitizer, where it is loaded, ends the process in its own way.
    crashed = "ended its process" if "ASAN_OPTIONS" in os.environ else "crashed: SIGSEGV"
    assert crashed in server.failure("crash", {}, "")
    assert server.failure("entropy", right, "") == ""
