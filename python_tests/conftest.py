"""What all tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Seeds the global generator that tests draw their inputs from."""
    torch.manual_seed(0)
