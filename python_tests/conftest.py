"""What all tests share."""

from __future__ import annotations

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Seeds the global generator that tests draw their inputs from."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """A shell starts background jobs with Ctrl-C ignored, and so would be the tests' own processes."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
