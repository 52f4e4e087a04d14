"""Which executor a run has: this process, workers of its own, or the ranks of torchrun."""

from __future__ import annotations

from itertools import islice

from fedkern.engine.executors import team
from fedkern.engine.executors.base import Executor, States
from fedkern.engine.executors.ranks import Ranks
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.sizing import workers_for
from fedkern.engine.executors.workers import Workers
from fedkern.engine.preparing import Prepared


def executor_of(prepared: Prepared, here: Serial, states: States, parameters: int) -> Executor:
    """Chooses the executor; the rest of the plan says how often clients will be asked.

    Args:
        prepared: the run.
        here: the executor of this process.
        states: where clients' states come from.
        parameters: number of parameters of one network.
    """
    config, context = prepared.config, prepared.context
    left = islice(prepared.plan, prepared.progress.planned, None)
    asks = config.sampled_clients * sum(len(entry.exchanges) for entry in left if not entry.cohort)
    if (ranks := team.present()) is not None:
        return _on_ranks(prepared, here, states, ranks, asks)
    count = workers_for(config, context, asks, parameters)
    if count < 2:
        return here
    expected = asks if config.workers == "auto" else None
    return Workers(context, here, prepared.askers, states, count, asks=expected)


def _on_ranks(prepared: Prepared, here: Serial, states: States, ranks: team.Team, asks: int) -> Executor:
    """The executor of several ranks; this process alone, where others would have nothing to do."""
    config, context = prepared.config, prepared.context
    if config.workers not in ("auto", "1"):
        why = "each rank of torchrun has its clients work one after another"
        context.warn("no-workers", f"--workers {config.workers} changes nothing here, as {why}.")
    if not asks or config.clients_of_a_round < 2:
        return here
    found = Ranks(context, here, prepared.askers, states, ranks)
    prepared.server.summing = found.accumulator
    return found
