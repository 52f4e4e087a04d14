"""Serial executor: clients work in this process, one after another or in lanes, on shared networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from fedkern.engine.client import Client
from fedkern.engine.context import TAKEN, RunContext, convert_figures
from fedkern.engine.executors.executor import Answer, Done, Handler, Job, Request, States
from fedkern.engine.local.first_steps import UnfitStep
from fedkern.engine.local.lanes import lanes, on_this_stream, side_by_side
from fedkern.engine.local.training import Diverged
from fedkern.engine.uploads.encoders import Departure, Encoder
from fedkern.errors import RAISED, ClientFailed
from fedkern.messages.states import Fingerprint, State
from fedkern.methods.base import ClientId, Message, Messages, Phase
from fedkern.process.torch_modes import cpu_threads


class Serial:
    """Executor of one process (see :class:`~fedkern.engine.executors.executor.Executor`)."""

    count = 1
    remote = False

    def __init__(self, context: RunContext, handlers: Mapping[str, Handler], states: States, threads: int) -> None:
        self._context, self._handlers, self._states, self._threads = context, handlers, states, threads
        self._clients: dict[ClientId, Client] = {}
        self._before: dict[ClientId, Fingerprint] = {}  # fingerprints of states, of clients that have worked since
        self._asked_count = 0
        self._objects = context.user_objects()  # before any client has worked

    @property
    def here(self) -> Serial:
        return self

    def client(self, k: ClientId) -> Client:
        """Return client ``k`` of this round, and notice changes of its state from now on."""
        if k not in self._clients:
            self.take(k, self._states(k)())
        if k not in self._before:
            self._before[k] = Fingerprint(self._clients[k].stored_state)
        return self._clients[k]

    def take(self, k: ClientId, state: State, played: Iterable[Request] = ()) -> None:
        """Begin the client's round with ``state``, and replay messages that it has answered."""
        self._clients[k] = Client(self._context, k, state)
        self._before.pop(k, None)
        for request in played:
            self.ask(k, *request)

    def answers(
        self, callee: str, phase: Phase, messages: Messages, encoders: Mapping[ClientId, Encoder] | None = None
    ) -> Iterator[Answer]:
        self._context.networks.begin_exchange()
        encoders = encoders or {}
        count = lanes(self._context, self._handlers[callee]) if len(messages) > 1 else 1
        begun = (
            self._begin(k, callee, phase, message, encoders.get(k), number % count if count > 1 else None)
            for number, (k, message) in enumerate(messages.items())
        )
        yield from side_by_side(begun, count)

    def ask(self, k: ClientId, callee: str, phase: Phase, message: Message, encoder: Encoder | None = None) -> Answer:
        return self._begin(k, callee, phase, message, encoder)()

    def reply(self, job: Job) -> Done:
        """Do a job, keeping the client's warnings and its exception for its turn."""
        context = self._context
        earlier, context.notices.warnings = context.notices.warnings, {}
        try:
            if job.state is not None:
                self.take(job.client, dict(job.state), job.played)
            answer = self.ask(job.client, *job.request)
            answer.warnings = context.notices.warnings
        except Exception as error:
            return Done(None, failed=error)
        finally:
            context.notices.warnings = earlier
        return Done(answer, self.changed_state(job.client))

    def _begin(
        self, k: ClientId, callee: str, phase: Phase, message: Message, encoder: Encoder | None, lane: int | None = None
    ) -> Callable[[], Answer]:
        """Start a client's work, on a ``lane`` without waiting for the GPU.

        Returns:
            A function that waits for the answer.
        """
        start = time.perf_counter()
        context, client = self._context, self.client(k)
        client.report, client.phase, client.marks = {}, phase, set()
        client.share = getattr(encoder, "share", 1.0)
        client.on_gpu, client.drift = () if encoder is None else encoder.on_gpu, None
        client.later = None if lane is None else []

        # The client works now. On a lane it only starts the GPU's work, whose results finish() reads.
        answer, wait = Answer(k), None
        if lane is not None and isinstance(message.get("parameters"), Tensor):
            context.networks.send(message["parameters"])  # sent once, before the lanes that need it
        with (
            self._problems(answer, callee),
            cpu_threads(self._threads),
            context.drawing(client, phase),
            ExitStack() as on,
        ):
            if lane is not None:
                on.enter_context(context.networks.on_lane(lane))
                assert context.networks.graphs is not None
                wait = on.enter_context(context.networks.graphs.ahead())
            answer.message = self._handlers[callee].client_update(client, phase, message)
        answer.seconds = time.perf_counter() - start

        def finish() -> Answer:
            start = time.perf_counter()
            with self._problems(answer, callee), cpu_threads(self._threads):
                # Results of a lane are ready after its event, and later work on this stream may use their memory.
                if wait is not None:
                    wait()
                    for value in answer.message.values() if answer.problem is None else ():
                        on_this_stream(value)
                for work in client.later or () if answer.problem is None else ():
                    work()
                answer.report = convert_figures(client.report, "client.report", TAKEN) if answer.problem is None else {}
            # The state is checked even after a failure, as the client keeps it.
            problem, client.later, answer.marks = answer.problem, None, client.collect_marks()
            with self._problems(answer, callee):
                client.check_state()
            answer.problem = problem or answer.problem  # the first
            self._asked_count += 1
            if (
                self._asked_count & (self._asked_count - 1) == 0
            ):  # after 1, 2, 4, 8 ... answers: a state may change late
                context.tell_attributes(client, self._objects)
            # Encoders read the upload's values, so they run once the GPU is done.
            if answer.problem is None and encoder is not None:
                with self._problems(answer, callee), cpu_threads(self._threads):
                    sent = self._beside(message, answer.message) if encoder.on_gpu else message
                    leaving = Departure(k, sent, answer.message, client.drift, client.encoded)
                    answer.message, answer.checked = encoder.encode(leaving)
            if answer.problem is not None:
                answer.message, answer.report = None, {}
            answer.seconds += time.perf_counter() - start
            return answer

        return finish

    @contextmanager
    def _problems(self, answer: Answer, callee: str) -> Iterator[None]:
        try:
            yield
        except Diverged as problem:
            answer.problem = problem
        except UnfitStep:  # the fault is no single client's
            raise
        except RAISED as error:
            code = self._context.script.train or type(self._handlers["method"])
            answer.problem = ClientFailed.of(answer.client, error, code)

    def _beside(self, message: Message, upload: object) -> Message:
        """Return the message with parameters on the GPU, if the upload's are there."""
        sent, got = message.get("parameters"), upload.get("parameters") if isinstance(upload, Mapping) else None
        if not isinstance(sent, Tensor) or not isinstance(got, Tensor) or got.device == sent.device:
            return message
        return {**message, "parameters": self._context.networks.send(sent)}

    def changed_state(self, client: ClientId) -> State | None:
        before = self._before.get(client)
        state = self._clients[client].stored_state if before is not None else {}
        if before is None or before.matches(state):
            return None
        del self._before[client]  # taken anew if the client works again in this round
        return state

    def working(self) -> list[ClientId]:
        return list(self._clients)

    def forget(self, client: ClientId) -> None:
        self._clients.pop(client, None)
        self._before.pop(client, None)

    def end_round(self) -> None:
        self._clients.clear()
        self._before.clear()

    def close(self) -> None:
        """Do nothing: no process was started."""
