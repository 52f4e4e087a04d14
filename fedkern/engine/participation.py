"""Participation in a round: clients that the server asks, that fail or that are slow, on one virtual clock.

The clock's unit is the time of one local step at usual speed, or with ``--devices`` a simulated second. No measured
time enters: all follows from settings, declared bytes, round and client, on any machine and after an interruption.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedkern.engine.client_choice import ClientChoice
from fedkern.errors import UserError
from fedkern.messages.states import State
from fedkern.methods.protocol import ClientId, Federation, Message, Round, batch_slices
from fedkern.methods.uploads import is_alike
from fedkern.privacy.dpsgd import stream_name
from fedkern.settings.config import RunConfig
from fedkern.settings.devices import assign_devices
from fedkern.streams import stream

DROPPED_OUT = "it dropped out of the round"
InFlight = dict[int, dict[int, Message]]
"""Messages in flight, by the communication round that sent them and their number within the round."""
DAMAGED = (
    "The checkpoint is damaged: what it says of the clients at work does not fit the run. Put the run's files back, or "
    "start the run again."
)
LATE = "it had not finished by the deadline"
Traffic = Callable[[ClientId], tuple[int, int]]
"""Returns the bytes that a client would receive and send, as declared, if it began its round now."""


def sample_clients(config: RunConfig, round: int, secret: str = "") -> list[int]:
    """Return the clients of a round in ascending order, drawn from the round's own stream.

    A ``secret`` in the stream prevents anybody from foreseeing the clients.
    """
    count = config.sampled_clients
    if count >= config.trained_clients:
        return list(range(config.trained_clients))
    draws = stream(config.seed, stream_name("sampling", secret), round=round)
    return sorted(int(k) for k in draws.choice(config.trained_clients, size=count, replace=False))


def speed(config: RunConfig, round: int, client: int) -> float:
    """Return a client's speed in a round: 1, or with probability ``straggler_rate`` uniform in (0, 1)."""
    if not config.straggler_rate:
        return 1.0
    chance, lost = stream(config.seed, "stragglers", round=round, client=client).random(2)
    return float(1 - lost) if chance < config.straggler_rate else 1.0


def share_of_work(config: RunConfig, round: int, client: int) -> float:
    """Return the share of its local steps that a client does until the deadline, in (0, 1], without ``--devices``.

    The deadline is a multiple of the client's time at usual speed.
    """
    if config.asynchronous is not None:
        return 1.0  # no deadline
    return min(1.0, speed(config, round, client) * (config.deadline or 1))


def absent_clients(
    config: RunConfig, round: int, participants: Sequence[int], shares: Mapping[int, float] | None = None
) -> dict[int, str]:
    """Return the clients of a round whose uploads never reach the server, with the reasons.

    One client, drawn at random, stays if all would be missing. ``shares`` replace :func:`share_of_work`.
    """
    threshold = 1.0 if config.stragglers == "drop" else math.ulp(0)
    missing: dict[int, str] = {}
    for k in participants:
        if config.dropout_rate and stream(config.seed, "dropout", round=round, client=k).random() < config.dropout_rate:
            missing[k] = DROPPED_OUT
        elif (share_of_work(config, round, k) if shares is None else shares[k]) < threshold:
            missing[k] = LATE
    if missing and len(missing) == len(participants):
        spared = stream(config.seed, "dropout", round=round).integers(len(participants))
        del missing[participants[int(spared)]]
    return missing


def local_steps(config: RunConfig, samples: int) -> int:
    if config.local_steps is not None:
        return config.local_steps
    return config.local_epochs * len(batch_slices(samples, config.batch_size))


@dataclass(frozen=True)
class Assignment:
    """The clients of a round.

    Attributes:
        clients: clients that the server asks, in ascending order.
        absent: clients among them whose uploads never reach the server, with the reasons.
        began: the round that sent the message, of clients that answer an earlier round's.
        shares: shares of their local steps that clients do until the deadline of ``--devices``, if below 1.
    """

    clients: Sequence[ClientId]
    absent: Mapping[ClientId, str] = field(default_factory=dict)
    began: Mapping[ClientId, int] = field(default_factory=dict)
    shares: Mapping[ClientId, float] = field(default_factory=dict)


class Participation:
    """Policy of synchronous rounds, and the base of others.

    The clients of a round begin with it. The server waits for all, and for slow ones until the deadline.

    Attributes:
        secret: mixed into the draws of clients; empty: they follow from the run's seed.
        clock: end of the round that was assigned last.
    """

    def __init__(self, config: RunConfig, federation: Federation) -> None:
        self._config, self._federation = config, federation
        self.secret, self.clock = "", 0.0
        self._choice = None if config.choose == "uniform" else ClientChoice(config, federation.samples)
        text = config.devices
        self._devices = [] if text is None else assign_devices(text, federation.clients, config.seed)

    def clients(self, entry: Round, round: int) -> Sequence[ClientId]:
        if isinstance(entry.participants, tuple):
            return entry.participants
        if entry.participants == "all":
            return range(self._federation.clients)
        if self._choice is None or self._config.sampled_clients == self._config.trained_clients:
            return sample_clients(self._config, round, self.secret)
        return self._choice.draw(round)

    def assign(self, entry: Round, round: int, traffic: Traffic | None = None) -> Assignment:
        """Assign clients to the round that begins now, once a round and in order.

        In a one-off round nobody fails or is slow, and no time passes.
        """
        config, clients = self._config, self.clients(entry, round)
        if entry.one_off:
            return Assignment(clients)
        if self._devices:
            return self._assign_devices(round, clients, traffic)
        if config.straggler_rate:
            limits = {k: self._steps(k) * (config.deadline or 1) for k in clients}
            self.clock += max(min(self._duration(round, k), limits[k]) for k in clients)
        return Assignment(clients, absent_clients(config, round, clients))

    def _assign_devices(self, round: int, clients: Sequence[ClientId], traffic: Traffic | None) -> Assignment:
        """Assign clients whose devices have to train and upload until the deadline.

        A client that is late trains the steps that it has time for, or is absent. The last client that stays has time.
        """
        config, limit = self._config, math.inf if self._config.deadline is None else self._config.deadline
        seconds = {k: self._duration(round, k, traffic) for k in clients}
        shares = {}
        for k in clients:
            steps = self._steps(k)
            shares[k] = min(1.0, 1 - (seconds[k] - limit) / self._devices[k].seconds_of_training(steps))
            shares[k] *= shares[k] * steps >= 1  # no time for a step
        absent = absent_clients(config, round, clients, shares)
        cut = {k: share for k, share in shares.items() if 0 < share < 1 and config.stragglers == "keep"}
        self.clock += max(min(seconds[k], limit) if k in absent or k in cut else seconds[k] for k in clients)
        return Assignment(clients, absent, shares=cut)

    def _steps(self, client: ClientId) -> int:
        return local_steps(self._config, self._federation.samples[client])

    def _duration(self, round: int, client: ClientId, traffic: Traffic | None = None) -> float:
        """Return the time from a client's beginning to the arrival of its upload, without a deadline."""
        steps = self._steps(client)
        if not self._devices:
            return steps / speed(self._config, round, client)
        device, transfer = self._devices[client], (0, 0) if traffic is None else traffic(client)
        seconds = device.seconds_of_transfer(*transfer) + device.seconds_of_training(steps)
        return device.seconds_of_wait(self.clock) + seconds

    def messages(
        self, clients: Sequence[ClientId], send: Callable[[Iterable[ClientId]], dict[ClientId, Message]]
    ) -> dict[ClientId, Message]:
        """Return the messages that clients of the round answer."""
        return send(clients)

    def fewest_uploads(self, plan: Iterable[Round]) -> int:
        config = self._config
        rounds = enumerate(entry for entry in plan if not entry.one_off)
        if self._devices and config.deadline is not None:
            return 1  # who is late depends on messages
        if not config.dropout_rate and (config.stragglers != "drop" or not config.straggler_rate):
            return min((self._size(entry) for _, entry in rounds), default=config.sampled_clients)
        if self._choice is not None:
            return 1  # losses of rounds to come decide
        draws = ((number, self.clients(entry, number)) for number, entry in rounds)
        counts = (len(clients) - len(absent_clients(config, number, clients)) for number, clients in draws)
        return min(counts, default=config.sampled_clients)

    def _size(self, entry: Round) -> int:
        if entry.participants == "sampled":
            return min(self._config.sampled_clients, self._config.trained_clients)
        return len(self.clients(entry, 0))

    def figures(self) -> dict[str, float]:
        return {self.clock_name: self.clock} if self._devices or self._config.straggler_rate else {}

    @property
    def clock_name(self) -> str:
        return "simulated_seconds" if self._devices else "clock"

    def note_reports(self, reports: Mapping[str, State]) -> None:
        """Note what the clients of a communication round reported, by their ids as texts."""
        if self._choice is not None:
            self._choice.note_losses(reports)

    def state(self) -> State:
        """Return the state for a checkpoint, in tensors, numbers, texts and dicts."""
        clock = {"clock": self.clock} if self.figures() else {}
        return {**clock, **({} if self._choice is None else {"losses": self._choice.losses.clone()})}

    def in_flight(self) -> InFlight:
        """Return the messages in flight, which never change."""
        return {}

    def restore(self, state: State, messages: InFlight, rounds: int) -> None:
        if not self._can_restore(state, messages, rounds):
            raise UserError(DAMAGED)
        self.clock = state.get("clock", 0.0)
        if self._choice is not None:
            self._choice.losses = state["losses"]

    def _can_restore(self, state: State, messages: InFlight, rounds: int) -> bool:
        if state.keys() != self.state().keys() or not is_time(state.get("clock", 0.0)):
            return False
        losses = state.get("losses")
        return self._choice is None or (isinstance(losses, Tensor) and is_alike(losses, self._choice.losses))


def is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
