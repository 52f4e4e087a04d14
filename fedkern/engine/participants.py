"""Who takes part in a round, and who of them fails or is slow: drawn from streams of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedkern.privacy.dpsgd import stream_name
from fedkern.settings.config import RunConfig
from fedkern.streams import stream

Draw = Callable[[int], list[int]]
"""Gives the clients of a communication round, counted from 0, in ascending order."""
DROPPED_OUT = "it dropped out of the round"
LATE = "it had not finished by the deadline"


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


def share_of_work(config: RunConfig, round: int, client: int) -> float:
    """The share of its local steps that a client does until the deadline, in (0, 1].

    With probability ``straggler_rate`` a client is slow in a round: its speed is uniform in (0, 1), where 1 is that of
    the others, which need the time 1.  At the deadline, a multiple of that time, it has done ``speed * deadline`` of
    its steps.

    Args:
        config: the run's settings.
        round: communication round, from 0.
        client: client id.
    """
    if not config.straggler_rate:
        return 1.0
    chance, speed = stream(config.seed, "stragglers", round=round, client=client).random(2)
    return min(1.0, (1 - speed) * config.deadline) if chance < config.straggler_rate else 1.0


def absent_clients(config: RunConfig, round: int, participants: Sequence[int]) -> dict[int, str]:
    """The clients of a round whose uploads never reach the server, with the reasons.

    One client, drawn at random, stays where all would be missing.

    Args:
        config: the run's settings.
        round: communication round, from 0.
        participants: the clients that the server sends to.
    """
    missing: dict[int, str] = {}
    for k in participants:
        if config.dropout_rate and stream(config.seed, "dropout", round=round, client=k).random() < config.dropout_rate:
            missing[k] = DROPPED_OUT
        elif config.late_work == "drop" and share_of_work(config, round, k) < 1:
            missing[k] = LATE
    if missing and len(missing) == len(participants):
        spared = stream(config.seed, "dropout", round=round).integers(len(participants))
        del missing[participants[int(spared)]]
    return missing


def fewest_uploads(config: RunConfig, rounds: int) -> int:
    """The smallest number of uploads of any round, as far as absences decide.

    Args:
        config: the run's settings.
        rounds: communication rounds.
    """
    most = config.clients_of_a_round
    if not config.dropout_rate and (config.late_work != "drop" or not config.straggler_rate):
        return most
    drawn = ((each, sample_clients(config, each)) for each in range(rounds))
    return min((len(them) - len(absent_clients(config, each, them)) for each, them in drawn), default=most)
