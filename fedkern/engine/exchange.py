"""One exchange of a round: sends messages, collects the clients' uploads and checks them for the server."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedkern.engine.absences import absent_clients
from fedkern.engine.config import RunConfig, clients_of_a_round
from fedkern.engine.executors.base import Answer
from fedkern.engine.executors.ranks import Ranks
from fedkern.engine.executors.worker_messages import Reducing
from fedkern.interrupts import check
from fedkern.methods.base import Message, Method, Round, Step, Upload
from fedkern.methods.uploads import like, why_refused
from fedkern.privacy.dpsgd import stream_name
from fedkern.streams import stream


def sample_clients(config: RunConfig, round: int, secret: str = "") -> list[int]:
    """The clients of a round in ascending order, drawn from the round's own stream.

    Args:
        config: the run's settings.
        round: communication round, from 0.
        secret: mixed into the stream, so that nobody foresees the clients; empty: they follow from the seed.
    """
    count = config.sampled_clients
    if count >= config.trained_clients:
        return list(range(config.trained_clients))
    draws = stream(config.seed, stream_name("sampling", secret), round=round)
    return sorted(int(k) for k in draws.choice(config.trained_clients, size=count, replace=False))


def fewest_uploads(config: RunConfig, rounds: int) -> int:
    """The smallest number of uploads of any round, as far as absences decide.

    Args:
        config: the run's settings.
        rounds: communication rounds.
    """
    most = clients_of_a_round(config)
    if not config.dropout_rate and (config.late_work != "drop" or not config.straggler_rate):
        return most
    drawn = ((each, sample_clients(config, each)) for each in range(rounds))
    return min((len(them) - len(absent_clients(config, each, them)) for each, them in drawn), default=most)


class Exchange:
    """One exchange of a round: sends, has the clients work, yields their uploads in client order."""

    def __init__(self, engine: Any, asker: str, step: Step, participants: list[int], entry: Round) -> None:
        self.engine, self.asker, self.step = engine, asker, step
        self.method = engine.askers[asker]
        self.participants, self.entry = participants, entry
        self.seconds = 0.0
        self._left_out = 0

    def lose(self, outgoing: Any, absent: Mapping[int, str]) -> None:
        """Books what is sent to clients that never answer.

        Args:
            outgoing: what ``send`` returned.
            absent: the reasons, by client.
        """
        messages = messages_for(outgoing, absent, getattr(self.method, "selective", False))
        for k, why in absent.items():
            message = messages[k]
            if message is not None:
                self._book(k, "down", message)
            self.engine.lost(k, self.step.exchange, why)

    def uploads(self, outgoing: Any) -> Iterator[Upload]:
        """Yields the uploads in client order, lazily: the server is done with an upload before it gets the next one.

        An upload that is not as the method declares is refused here, so that the server never sees it.  An empty upload
        that the method allows is not yielded.

        Raises:
            UserError: the run is to stop because an upload is refused or a client diverged or failed; or no client is
                left.
        """
        engine, step = self.engine, self.step
        messages = messages_for(outgoing, self.participants, getattr(self.method, "selective", False))
        sent: dict[int, Message] = {k: message for k, message in messages.items() if message is not None}
        answers = self._answers(sent)
        while True:
            check()
            start = time.perf_counter()
            answer = next(answers, None)
            if answer is None:
                break
            k, message = answer.client, sent[answer.client]
            self._book(k, "down", message)
            engine.heard(answer)
            if answer.absent or answer.refused or answer.problem is not None:
                if answer.absent:
                    engine.missed(k, step.exchange, answer.absent)
                elif answer.problem is not None:
                    engine.dropped(k, answer.problem)
                else:
                    engine.refused(k, step.exchange, answer.refused)
                if engine.silent:  # as many bytes as with an upload, or the ledger would tell that there was none
                    self._book(k, "up", dict(self._declared(k, message)))
                self._left_out += 1
                self.seconds += time.perf_counter() - start
                continue
            declared = engine.context.federation.samples[k]
            engine.released(k, answer.message)
            self._book(k, "up", answer.message)
            info: dict[str, Any] = {"samples": declared, **answer.report}
            if answer.checked is None:
                own, why = self._checked(k, message, answer.message, info)
            else:  # by the rank that keeps vectors of the upload
                info.update(answer.checked)
                own, why = answer.message, ""
            if why:
                engine.refused(k, step.exchange, why)
                self._left_out += 1
                self.seconds += time.perf_counter() - start
                continue
            engine.client_done(k, info, answer.seconds)
            self.seconds += time.perf_counter() - start
            # No reference stays here: while the next client trains, only the server may still hold this upload.
            handover = [Upload(k, declared, own)] if own is not None else []
            del answer, own
            if handover:
                yield handover.pop()
        if self._left_out == len(self.participants):
            engine.none_left()

    def _answers(self, sent: dict[int, Message]) -> Iterator[Answer]:
        """The clients' answers; the clients of a cohort are asked at once."""
        apart = self.engine.executor.apart
        if self.entry.cohort and not apart and sent and isinstance(self.method, Method):
            start = time.perf_counter()
            executor = self.engine.executor.here
            clients = {k: executor.client(k) for k in self.participants}
            for client in clients.values():
                client.report = {}
            with self.engine.context.drawing(self.engine.server, self.step), self.engine.method_code("cohort_update"):
                answers = self.method.cohort_update(clients, self.step, sent)
                found = None if answers is None else dict(answers)
            if found is not None:
                each = (time.perf_counter() - start) / len(sent)
                return (Answer(k, found.pop(k), report=clients[k].report, seconds=each) for k in list(sent))
        together = (self.entry.cohort or self.engine.tracing) and not apart
        executor = self.engine.executor.here if together else self.engine.executor
        if isinstance(executor, Ranks) and (reducing := self._reducing(sent)):
            return executor.answers(self.asker, self.step, sent, reducing)
        return executor.answers(self.asker, self.step, sent)

    def _reducing(self, sent: dict[int, Message]) -> dict[int, Reducing]:
        """How every client's upload is checked and kept on its rank; empty where whole uploads travel."""
        engine, config = self.engine, self.engine.config
        needed = engine.private is not None or engine.releases is not None
        needed = needed or config.max_update_norm or config.clip_update_norm
        if self.asker != "method" or config.sums != "exact" or needed or engine.server.aggregator is not None:
            return {}
        with engine.method_code("reduce"):
            names = reduced(self.method, self.step)
        if not names:
            return {}
        declared = {k: self._declared(k, message) for k, message in sent.items()}
        return {k: Reducing(names, _without_tensors(each)) for k, each in declared.items()}

    def _checked(self, client: int, message: Message, answer: Any, info: dict[str, Any]) -> tuple[Message | None, str]:
        """Checks a client's upload against the method's declaration and the bounds on updates.

        Args:
            client: the client's id.
            message: the message that the client was sent.
            answer: the upload.
            info: the client's entry in the round's record; ``drift`` and ``clipped`` are added to it.

        Returns:
            The upload as the server may see it, or None where it is refused, or empty as the method allows; and why it
            is refused, else ``""``.
        """
        declared = self._declared(client, message)
        why = examined(message, answer, declared, info)
        if why or (declared and not answer):
            return None, why
        start, config = declared.get("parameters"), self.engine.config
        if isinstance(start, Tensor) and (config.max_update_norm or config.clip_update_norm):
            return bounded(answer, start, config, info)
        return answer, ""

    def _declared(self, client: int, message: Message) -> Any:
        """The method's declaration of a client's upload."""
        with self.engine.method_code("expects"):
            return self.method.expects(self.engine.server, self.step, client, message)

    def _book(self, client: int, direction: str, message: Message) -> None:
        if self.entry.booked:
            step = None if self.entry.one_off else self.step
            self.engine.ledger.book(client, direction, message, step=step)


def examined(message: Message, answer: Any, declared: Any, info: dict[str, Any]) -> str:
    """Checks a client's upload against the method's declaration.

    Args:
        message: the message that the client was sent.
        answer: the upload.
        declared: its declaration.
        info: gets ``drift``, the norm of the update, where parameters were sent and came back.

    Returns:
        Why the upload is refused, else ``""``.
    """
    given, got = message.get("parameters"), answer.get("parameters") if isinstance(answer, Mapping) else None
    seen: Tensor | None = None
    if isinstance(given, Tensor) and isinstance(got, Tensor) and is_alike(got, given):
        info["drift"] = drift = float(torch.linalg.vector_norm(got - given))
        seen = got if math.isfinite(drift) else None  # a finite norm has only finite elements
    return why_refused(answer, declared, seen)


def reduced(method: Method, step: Step) -> tuple[str, ...]:
    """The vectors of an upload that the method's server only adds up (see `Method.reduce`).

    Empty where a class has a ``server_update``, ``average`` or ``weight`` of its own and inherits ``reduce``: what it
    does with uploads is not declared.
    """
    kinds = type(method).__mro__
    at = {name: next((i for i, kind in enumerate(kinds) if name in vars(kind)), len(kinds)) for name in _SUMMING}
    return method.reduce(step) if at["reduce"] == min(at.values()) else ()


_SUMMING = ("reduce", "server_update", "average", "weight")


def _without_tensors(declared: Any) -> Any:
    """A declaration with the shapes and dtypes of its tensors in their place."""
    if isinstance(declared, Mapping):
        return {name: _without_tensors(value) for name, value in declared.items()}
    return like(declared) if isinstance(declared, Tensor) else declared


def is_alike(value: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype, device and layout."""
    alike = value.shape == tensor.shape and value.dtype == tensor.dtype
    return alike and value.device == tensor.device and value.layout is tensor.layout


def bounded(answer: Message, start: Tensor, config: RunConfig, info: dict[str, Any]) -> tuple[Message, str]:
    """Refuses or clips an upload whose update has a larger norm than the settings allow.

    Args:
        answer: the upload, as declared.
        start: fp32 [P], the parameters that were sent.
        config: gives ``max_update_norm`` and ``clip_update_norm``.
        info: gets ``clipped``, the factor on the update, where the update is clipped.

    Returns:
        The upload, clipped where needed; and why it is refused, else ``""``.
    """
    update = answer["parameters"].to(start.device).double() - start.double()
    norm = float(torch.linalg.vector_norm(update))
    largest, clip = config.max_update_norm, config.clip_update_norm
    if largest and norm > largest:
        return answer, f"has an update of norm {norm:.6g} where --max-update-norm allows {largest:g}"
    if not clip or norm <= clip:
        return answer, ""
    info["clipped"] = clip / norm
    return {**answer, "parameters": (start + update * (clip / norm)).to(answer["parameters"])}, ""


def messages_for(outgoing: Any, clients: Iterable[int], selective: bool = False) -> dict[int, Message | None]:
    """The clients' messages out of what ``send`` returned: one message for all clients, or a dict by client id.

    Args:
        outgoing: what ``send`` returned.
        clients: ids of the clients.
        selective: whether ``send`` may leave clients out, or return None for all clients.  The message of such a client
            is None.

    Raises:
        ValueError: a client has no message, and the method is not ``selective``.
    """
    # Looked at once for all clients: a message for every client of a large federation is a long dict.
    if not outgoing or not all(isinstance(key, int) for key in outgoing):
        return dict.fromkeys(clients, outgoing)
    found: dict[int, Message | None] = {}
    for k in clients:
        if k not in outgoing and not selective:
            raise ValueError(f"send: expected a message for client {k}, which takes part; given none")
        found[k] = outgoing.get(k)
    return found


def message_for(outgoing: Any, client: int, selective: bool = False) -> Message | None:
    """One client's message out of what ``send`` returned (see :func:`messages_for`)."""
    return messages_for(outgoing, [client], selective)[client]
