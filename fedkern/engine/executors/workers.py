"""Parallel executor: clients in worker processes on the CPU, with the bits of :class:`Serial` for any worker count.

A client keeps its worker within a round. After a lost worker, another one begins its clients' round again (see
`fedkern.engine.executors.ordered`). Until the workers have started (a second or two, to load PyTorch), clients work in
this process.
"""

import os
import select
import socket
from collections.abc import Mapping

from fedkern.engine.context import RunContext
from fedkern.engine.executors.executor import Answer, Handler, Setup, States
from fedkern.engine.executors.fork_server import ForkServer, Gone, fork_server_of
from fedkern.engine.executors.ordered import Ordered
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.shared_tensors import Channel
from fedkern.errors import RunFailed
from fedkern.messages.packets import NotPortable, only_code_bars
from fedkern.methods.base import ClientId
from fedkern.process.forking import has_threads

HELD_BYTES = 1 << 30
"""Limit on the bytes of uploads that wait for earlier clients. Beyond it, only the next client in order gets a
worker."""

LOSSES = 3
"""Losses of a client's worker in one round that end the run."""

WORTH_STARTING = 3.0
"""Seconds of remaining client work from which ``--workers auto`` starts workers."""


class _Worker(Channel):
    """Worker process: connection, process id, and the client that it works for (None: idle)."""

    def __init__(self, process: int, end: socket.socket) -> None:
        super().__init__(end)
        self.process = process
        self.client: ClientId | None = None


class Workers(Ordered):
    """Executor of several processes (see :class:`~fedkern.engine.executors.executor.Executor`).

    Args:
        asks: how often the plan will still ask clients; workers start only if enough work is left. None: at once.
    """

    def __init__(
        self,
        context: RunContext,
        serial: Serial,
        handlers: Mapping[str, Handler],
        states: States,
        count: int,
        *,
        asks: int | None = None,
    ) -> None:
        super().__init__(context, serial, states)
        self._handlers, self.count = handlers, count
        self._left, self._asked, self._seconds = asks, 0, 0.0
        self._fork_server: ForkServer | None = None
        self._processes: list[_Worker] = []
        self._losses: dict[ClientId, int] = {}  # how often a client's worker was lost in this round
        if asks is None:
            self._start()

    # -- the executor ----------------------------------------------------------------------------------------------

    def _advance(self, k: ClientId) -> None:
        self._hear(0.0)
        self._hire()
        self._hand_out(k)  # even with the reply, so that no worker idles while the server works
        if k in self._todo:
            self._work(k)
        elif k not in self._replies:
            self._hear(1.0)

    def _answer(self, k: ClientId) -> Answer:
        answer = super()._answer(k)
        self._asked += 1
        self._seconds += answer.seconds
        if self._left is not None and (self._left - self._asked) * self._seconds / self._asked > WORTH_STARTING:
            self._left = None
            self._start()
        return answer

    def end_round(self) -> None:
        self._losses.clear()
        super().end_round()

    def close(self) -> None:
        if self._fork_server is not None:
            self._fork_server.close()
            self._fork_server = None
        for worker in self._processes:
            worker.close()
        self._processes.clear()
        super().close()

    # -- the workers -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        setup = Setup.of(self._context, self._handlers)
        try:
            self._fork_server = fork_server_of(setup)
        except NotPortable as error:
            code = only_code_bars(setup)
            why = ", and a process that has threads cannot be forked" if code and has_threads() else ""
            way = "define it in a module of its own" if code else "open files and connections where an item is read"
            self._give_up(f"{error} cannot be sent to worker processes{why}", way)
        except OSError as error:
            self._give_up(f"worker processes cannot be started ({error.strerror or error})", "")

    def _give_up(self, why: str, way: str) -> None:
        self._context.notices.warn(
            "no-workers",
            f"Clients work one after another, as {why}" + (f": {way} to have them side by side." if way else "."),
        )

    def _hire(self) -> None:
        if self._fork_server is None or len(self._processes) >= self.count:
            return
        try:
            if self._fork_server.ready():
                while len(self._processes) < self.count:
                    self._processes.append(_Worker(*self._fork_server.fork()))
        except Gone as error:
            self._fork_server.close()
            self._fork_server = None
            self._give_up(str(error), "")

    def _hand_out(self, next_client: ClientId) -> None:
        for worker in [worker for worker in self._processes if worker.client is None]:
            for k in list(self._todo):
                if self._at.get(k, worker) is not worker:
                    continue  # this client belongs to another process in this round
                if k != next_client and sum(reply.size for reply in self._replies.values()) > HELD_BYTES:
                    break
                if self._send(worker, k):
                    worker.client = k
                    break

    def _hear(self, seconds: float) -> None:
        for worker in select.select(self._processes, [], [], seconds)[0]:
            try:
                packet = worker.receive()
            except (EOFError, OSError):
                self._free_clients(worker)
                continue
            size = sum(os.fstat(descriptor).st_size for descriptor in packet.files.values())
            if (reply := self._read(packet)) is not None:
                assert worker.client is not None  # it was busy
                reply.size = size
                self._replies[worker.client], worker.client = reply, None

    def _free_clients(self, worker: _Worker) -> None:
        """Let the clients of a dead worker begin their round again in another process."""
        self._processes.remove(worker)
        worker.close()
        how = self._fork_server.how(worker.process) if self._fork_server is not None else "it ended"
        self._at = {k: process for k, process in self._at.items() if process is not worker}
        if (k := worker.client) is None:
            return
        self._losses[k] = self._losses.get(k, 0) + 1
        if self._losses[k] >= LOSSES:
            raise RunFailed(
                f"The worker process of client {self._context.data.client_label(k)} was lost {LOSSES} times in this "
                f"round ({how}): give fewer --workers, or a smaller --batch-size, --model or --width."
            )
        self._context.notices.warn(
            "lost-worker", f"A worker process was lost ({how}); another one repeated its clients' work."
        )
        self._todo.insert(0, k)
