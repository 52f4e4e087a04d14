"""What must hold bit for bit whatever the numbers are: blending, fusing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkern import ops
from python_tests.ops.property_inputs import QUARTERS, examples, tensors

pytestmark = pytest.mark.usefixtures("one_thread")


@examples
@given(tensors((3, 5), QUARTERS), tensors((4, 5), QUARTERS), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_blend_interpolates(foreground: Tensor, background: Tensor, picks: list[int]) -> None:
    index = torch.tensor(picks)
    assert torch.equal(ops.blend(foreground, background, 1.0, index=index), foreground)
    assert torch.equal(ops.blend(foreground, background, 0.0, index=index), background[index])
    half = ops.blend(foreground, background, 0.5, index=index)
    assert torch.equal(half, ops.blend(background[index], foreground, 0.5))


@examples
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_fusing_is_concatenating(channels: list[int], last: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, c, 3, 4, generator=draw) for c in channels]
    if last:
        maps = [x.to(memory_format=torch.channels_last) for x in maps]
    assert torch.equal(ops.fuse_concat(maps), torch.cat(maps, 1))
    assert torch.equal(ops.fuse_concat(maps, activation="relu"), torch.cat(maps, 1).relu())
    one = maps[0]
    assert torch.equal(ops.fuse_mean([one]), one)
    torch.testing.assert_close(ops.fuse_mean([one] * 5), one)
