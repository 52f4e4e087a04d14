"""Devices of the CUDA tests: a GPU where there is one, and everywhere the emulated core."""

from collections.abc import Iterator

import pytest
import torch

from fedkern.ops import use_backend
from python_tests.ops.emulated_core import emulate


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Yield the device of a test's tensors, with the CUDA backend forced."""
    if request.param == "emulated":
        with emulate():
            yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with use_backend("cuda"):
        yield torch.device("cuda")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """Yield a GPU, with the CUDA backend forced, for checks that an emulation cannot make."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with use_backend("cuda"):
        yield torch.device("cuda")
