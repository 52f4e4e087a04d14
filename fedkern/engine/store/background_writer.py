"""Write checkpoint files on one thread while training continues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

PENDING_BYTES = 256 << 20
"""Bytes of content that may wait to be written, beyond which a call waits."""


class BackgroundWriter:
    """One thread that runs jobs in order, and none after a failure.

    A job's content must not change any more. A job must not compute with torch: a second thread would have its own
    OpenMP threads.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedkern-writer")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._failed: BaseException | None = None

    def give(self, job: Callable[[], object], size: int) -> Future[None]:
        """Add a job with ``size`` bytes of content, and return its future for :meth:`settle`.

        Raises:
            What an earlier job raised; the new job is not run.
        """
        while self._pending and (
            self._pending[0][0].done() or sum(waiting for _, waiting in self._pending) + size > PENDING_BYTES
        ):
            self._first()
        self._check()
        future = self._thread.submit(self._do, job)
        self._pending.append((future, size))
        return future

    def settle(self, until: Future[None] | None = None) -> None:
        """Wait until all jobs, or all jobs up to ``until``, are done."""
        while self._pending and (until is None or not until.done()):
            self._first()
        self._check()

    def _do(self, job: Callable[[], object]) -> None:
        if self._failed is None:
            try:
                job()
            except BaseException as error:
                self._failed = error

    def _first(self) -> None:
        wait([self._pending[0][0]])  # before the job is removed: Ctrl-C may come while waiting
        self._pending.popleft()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        self._thread.shutdown(wait=True)
