"""Tests of the memory of large results: reused once they are freed, not before, and given back on request."""

import copy
import errno
import io
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fedkern import ops
from fedkern.ops._core import memory as _memory
from python_tests.ops.every_operator import Operator, each_operator
from python_tests.ops.operator_cases import KERNELS
from python_tests.ops.operator_runs import run

pytestmark = pytest.mark.skipif(not KERNELS, reason="the compiled core is not built")

MB = 1 << 20


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[_memory.Cache]:
    """Yield an unused cache of 64 MB, for results of the compiled core from 4 MB on."""
    monkeypatch.setattr(_memory, "KEPT", 4 * MB)
    monkeypatch.setenv("FEDKERN_CACHE_MB", "64")
    _memory.cache.cache_clear()
    with ops.use_backend("cpu"):  # once: the choice is the process's, and threads that make it each would not undo it
        yield _memory.cache()
    _memory.cache.cache_clear()


def maps(batch: int = 64, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(2, batch, 16, 32, 32, generator=torch.Generator().manual_seed(seed)))


def join(batch: int = 64, seed: int = 0) -> Tensor:
    """Return a result of 8 MB for a batch of 64."""
    return ops.fuse_concat(maps(batch, seed))


def test_memory_is_used_again_once_nothing_refers_to_it(own_cache: _memory.Cache) -> None:
    result = join()
    place, row = result.data_ptr(), result[5]
    second = join(seed=1)
    assert second.data_ptr() != place
    del result
    assert not own_cache.free(), "a view of it is alive"
    assert torch.equal(row, torch.cat([x[5] for x in maps()]))
    del row
    assert [len(memory) for memory in own_cache.free()] == [8 * MB]
    third = join(seed=2)
    assert third.data_ptr() == place
    assert not own_cache.free()
    assert torch.equal(third, torch.cat(maps(seed=2), 1))
    assert torch.equal(second, torch.cat(maps(seed=1), 1))


def test_other_sizes_have_their_own(own_cache: _memory.Cache) -> None:
    join()
    assert torch.equal(join(48), torch.cat(maps(48), 1))
    assert [len(memory) for memory in own_cache.free()] == [8 * MB, 6 * MB]


def test_the_oldest_go_where_too_much_is_kept(own_cache: _memory.Cache) -> None:
    results = [join(batch) for batch in (192, 128, 160)]  # 24, 16 and 20 MB
    while results:
        del results[0]
    assert [len(memory) // MB for memory in own_cache.free()] == [24, 16, 20]
    join(64)
    assert [len(memory) // MB for memory in own_cache.free()] == [16, 20, 8]
    ops.empty_cache()
    assert not own_cache.free()


def test_more_than_is_kept_is_fresh(own_cache: _memory.Cache) -> None:
    assert join(640).shape == (640, 32, 32, 32)
    assert not own_cache.free()


@pytest.mark.parametrize("again", [True, False], ids=["after what is kept has gone", "never"])
def test_where_there_is_no_memory(again: bool, own_cache: _memory.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    join()
    assert own_cache.free()
    real = _memory.mmap.mmap

    def full(*arguments: int, **flags: int) -> object:
        if again and not own_cache.free():
            return real(*arguments, **flags)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(_memory.mmap, "mmap", full)
    assert torch.equal(join(48), torch.cat(maps(48), 1))
    assert len(own_cache.free()) == again


def test_deterministic_mode_decides_what_is_not_written(own_cache: _memory.Cache) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        join()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not own_cache.free()


class Alarm(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_signals_are_not_lost_where_results_are_freed() -> None:
    def ring(*_: object) -> None:
        raise Alarm

    def work(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        begin = time.monotonic()
        while time.monotonic() < begin + 10:
            ops.fuse_concat(given)

    given = maps()
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for turn in range(100):
            with pytest.raises(Alarm):
                work(1e-3 + 3e-5 * turn)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKERN_CACHE_MB", "0")
    _memory.cache.cache_clear()
    assert torch.equal(join(), torch.cat(maps(), 1))
    assert not _memory.cache().free()


@pytest.mark.parametrize("given", ["-1", "1.5", "much"])
def test_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("FEDKERN_CACHE_MB", given)
    _memory.cache.cache_clear()
    with pytest.raises(ValueError, match=f"FEDKERN_CACHE_MB must be a whole number of megabytes, .* not {given!r}"):
        ops.empty_cache()


def test_results_are_tensors_like_others() -> None:
    result, wanted = join(), torch.cat(maps(), 1)
    assert not result._is_view()
    assert result.untyped_storage().nbytes() == result.nbytes
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), torch.load(file), result.numpy().copy()):
        assert torch.equal(torch.as_tensor(copied), wanted)
    assert torch.equal(result.share_memory_(), wanted)
    with torch.inference_mode():
        assert join().is_inference()
    x = maps()[0].requires_grad_()
    (ops.blend(x, x.detach(), 0.5) * 2).sum().backward()
    x.grad.add_(1).mul_(2)
    assert (x.grad == 4).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@each_operator
def test_every_operator_in_used_memory(operator: Operator, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results in reused memory hold nothing of what earlier results left there."""
    monkeypatch.setattr(_memory, "KEPT", 1 << 16)
    inputs, next_inputs = (operator.inputs(large=True, seed=seed) for seed in (0, 1))
    if last:
        inputs, next_inputs = ([x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in tensors]
                          for tensors in (inputs, next_inputs))  # fmt: skip
    with ops.use_backend(None):
        expected = run(operator, inputs, operator.gradient)
        for _ in range(2):
            run(operator, next_inputs, operator.gradient)
        results = run(operator, inputs, operator.gradient)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_threads_do_not_share_what_is_in_use() -> None:
    wrong: list[int] = []
    wanted = [torch.cat(maps(seed=seed), 1) for seed in range(3)]

    def work(seed: int) -> None:
        held: list[Tensor] = []
        for turn in range(12):
            held.append(join(seed=seed))
            if turn % 3 == 2:
                wrong.extend(seed for result in held if not torch.equal(result, wanted[seed]))
                held.clear()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_writes_into_memory_of_its_own() -> None:
    given, wanted = maps(seed=1), torch.cat(maps(seed=1), 1).numpy().tobytes()
    kept = join()
    place = kept.data_ptr()
    del kept
    child = os.fork()
    if not child:
        code = 1
        try:
            result = ops.fuse_concat(given)
            code = 0 if result.data_ptr() == place and result.numpy().tobytes() == wanted else 2
        finally:
            os._exit(code)
    parent = join()
    assert parent.data_ptr() == place
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(parent, torch.cat(maps(), 1))
