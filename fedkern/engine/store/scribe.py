"""Files are written beside the next round: the disk's answer takes longer than a small network's training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

PENDING_BYTES = 256 << 20
"""Of content that waits to be written; beyond it whoever wants to write more waits."""


class Scribe:
    """One thread that does what it is given, in that order; after a failure it does nothing more.

    What it is given must not be changed any more.  It must not compute with torch: a second thread would have OpenMP
    threads of its own.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedkern-scribe")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._failed: BaseException | None = None

    def give(self, job: Callable[[], object], size: int) -> Future[None]:
        """Adds a job whose content has this many bytes, and returns what :meth:`settle` takes.

        Raises:
            What an earlier job raised; this one is not done.
        """
        while self._pending and (
            self._pending[0][0].done() or sum(waiting for _, waiting in self._pending) + size > PENDING_BYTES
        ):
            self._first()
        self._check()
        given = self._thread.submit(self._do, job)
        self._pending.append((given, size))
        return given

    def settle(self, until: Future[None] | None = None) -> None:
        """Waits until everything is done, or everything up to a job.

        Raises:
            What a job raised.
        """
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
        wait([self._pending[0][0]])  # before it is taken away: Ctrl-C may come meanwhile
        self._pending.popleft()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Waits until everything is done that can be done, and ends the thread."""
        self._thread.shutdown(wait=True)
