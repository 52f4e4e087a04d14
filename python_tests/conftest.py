"""Fixtures of all tests, and the processes in which they run."""

import datetime
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

# Processes side by side (pytest -n) that each compute on all cores take several times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from python_tests import warm_python
from python_tests.workers_first import waiting_for_workers


def _take_benchmarks_from_the_checkout() -> None:
    """Import "benchmarks" from the checkout, which is not on the path, instead of the package that opacus installs."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


_take_benchmarks_from_the_checkout()

# Processes that a test starts import helpers by their full names, too.  Links lead there: the checkout would have its
# own fedkern found before the installed one.
_LINKS = tempfile.TemporaryDirectory(prefix="fedkern-tests-path-", ignore_cleanup_errors=True)
for _name in ("benchmarks", "python_tests"):
    (Path(_LINKS.name) / _name).symlink_to(Path(__file__).resolve().parents[1] / _name)
sys.path.append(_LINKS.name)

# Random tests try other cases every day; FEDKERN_SEED repeats a failure by its day's number.
os.environ.setdefault("FEDKERN_SEED", str(datetime.datetime.now(datetime.UTC).toordinal()))

# Without a GPU Triton's kernels are tested in its interpreter, which must be asked for before anything imports Triton
# (torch's counter of operations does).  With one the tests marked "gpu" run the compiled ones, unless it is asked for.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Neither the teachers of this user nor leftovers of an earlier session.
_CACHE = tempfile.TemporaryDirectory(prefix="fedkern-tests-cache-", ignore_cleanup_errors=True)
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ.pop("FEDKERN_CACHE_DIR", None)


def pytest_report_header() -> str:
    return f"FEDKERN_SEED={os.environ['FEDKERN_SEED']} (random calls of operators; set it to repeat a day's)"


@pytest.fixture
def registries() -> Iterator[None]:
    """Restore all registries after the test."""
    from fedkern.usercode import plugins

    tables = list(plugins._tables().values())
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of worker processes, which grows with every fork."""
    from fedkern.engine.executors.fork_server import ForkServer

    numbers, fork = [], ForkServer.fork

    def note_fork(self: ForkServer) -> object:
        process, channel = fork(self)
        numbers.append(process)
        return process, channel

    monkeypatch.setattr(ForkServer, "fork", note_fork)
    return numbers


@pytest.fixture(autouse=True, scope="session")
def _waiting_for_workers() -> Iterator[None]:
    """Make every run wait for its workers.

    Otherwise a short run ends before its workers are up, and tests compare runs without workers.
    """
    with waiting_for_workers(), warm_python.warm_fork_servers():
        yield


@pytest.fixture
def warm_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the Python processes of a test from one that has imported PyTorch and fedkern."""
    monkeypatch.setattr(subprocess, "Popen", warm_python.Popen)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork workers from this process, which has loaded PyTorch, instead of the fork server."""
    from fedkern.messages.packets import NotPortable

    def refuse(setup: object) -> None:
        raise NotPortable("what a test trains")

    monkeypatch.setattr("fedkern.engine.executors.choice.check_portable", refuse)


@pytest.fixture
def refuses(tmp_path: Path) -> Callable[..., AbstractContextManager[Any]]:
    """Return the context of a call that ends in a sentence before anything is written to its folder."""
    from fedkern.errors import UserError

    @contextmanager
    def refuses(sentence: str, folder: str = "run") -> Iterator[Any]:
        with pytest.raises(UserError, match=sentence) as error:
            yield error
        assert not (tmp_path / folder).exists()

    return refuses


@contextmanager
def _undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkern.report.figures.pictures._draw", lambda *_: [])
        patch.setattr("fedkern.report.figures.plots.to_svg", lambda figure, name: "<svg></svg>")
        yield


@pytest.fixture
def undrawn() -> Iterator[None]:
    """Skip all pictures and charts, which take longer than a small run."""
    with _undrawn():
        yield


@pytest.fixture(scope="session")
def undrawing() -> Callable[[], AbstractContextManager[None]]:
    """Return the context of ``undrawn``, for a run that a module plays once."""
    return _undrawn


@pytest.fixture(autouse=True)
def _forks_beside_earlier_threads() -> None:
    """Rename the threads of pytest-xdist and earlier tests, which would otherwise keep runs from forking."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.name.startswith("fedkern-"):
            thread.name = f"fedkern-test {thread.name}"


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Seed the global generator that tests draw their inputs from.

    Without a GPU only the CPU's: ``torch.manual_seed`` formats the stack for a GPU that may come later.
    """
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hide a GPU from tests that are not marked "gpu".

    ``device="auto"`` would take the GPU where tests compare bits with the CPU's.
    """
    if not torch.cuda.is_available() or request.node.get_closest_marker("gpu"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts
        yield


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Restore Ctrl-C, which a shell ignores in background jobs and so in the tests' processes."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exclude the collected tests from garbage collections, each of which would walk through all of them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the benchmarks' tests as ``exhaustive``, because they do not test the installed package.

    Mark as ``exhaustive`` also the cases that ``@pytest.mark.sampled`` leaves out.  As many cases remain as its
    argument says, or as the longest axis of the test's parameters has values, and these go through all axes at once.
    Short axes are crossed as far as there is room: of two dtypes and two backends each meets each.

    ``FEDKERN_TESTS_SHARE=3`` leaves another third of the exhaustive tests for each day of ``FEDKERN_SEED``.
    """
    groups = defaultdict(list)
    folder = Path(__file__).parent / "benchmarks"
    of_benchmarks = {path for path in {item.path for item in items} if path.is_relative_to(folder)}
    for item in items:
        if item.path in of_benchmarks:
            item.add_marker(pytest.mark.exhaustive)
        rare = item.get_closest_marker("exhaustive") or item.get_closest_marker("slow")
        if item.get_closest_marker("sampled") and not rare:
            groups[item.nodeid.partition("[")[0]].append(item)
    for group in groups.values():
        cases = [tuple(item.callspec._idlist) for item in group]
        axes = [list(dict.fromkeys(axis)) for axis in zip(*cases, strict=True)]
        longest = max(map(len, axes))
        count = min([longest, *group[0].get_closest_marker("sampled").args])
        chosen, repeats = [[] for _ in axes], 1
        for axis, values in sorted(zip(axes, chosen, strict=True), key=lambda both: len(both[0])):
            if len(axis) * repeats <= count:
                values += [axis[i // repeats % len(axis)] for i in range(count)]
                repeats *= len(axis)
            else:
                values += [axis[i * longest // count % len(axis)] for i in range(count)]
        sample = set(zip(*chosen, strict=True))
        for item, case in zip(group, cases, strict=True):
            if case not in sample:
                item.add_marker(pytest.mark.exhaustive)
    share, day = int(os.environ.get("FEDKERN_TESTS_SHARE", "1")), int(os.environ["FEDKERN_SEED"])
    for item in items:
        if item.get_closest_marker("exhaustive") and (crc32(item.nodeid.encode()) + day) % share:
            item.add_marker(pytest.mark.slow)
