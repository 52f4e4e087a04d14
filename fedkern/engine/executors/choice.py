"""Which executor a run has: this process, workers of its own, the ranks of torchrun, or one of remote clients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from fedkern.engine.executors import torchrun_group
from fedkern.engine.executors.base import Executor
from fedkern.engine.executors.ranks import Ranks
from fedkern.engine.executors.sizing import workers_for
from fedkern.engine.executors.workers import Workers
from fedkern.engine.run_objects import RunObjects

Remote = Callable[[RunObjects], Executor]
"""Makes the executor of clients that keep their data and states to themselves (see :attr:`Executor.remote`)."""


def executor_of(run: RunObjects, remote: Remote | None) -> Executor:
    """Chooses the executor; the rest of the plan says how often clients will be asked.

    Args:
        run: the run's objects.
        remote: makes the executor; None: clients work on this machine, or on the ranks of torchrun.
    """
    if remote is not None:
        return remote(run)
    config, context = run.config, run.context
    rounds = list(islice(run.plan, run.progress.planned, None))
    asks = config.sampled_clients * sum(len(entry.exchanges) for entry in rounds if not entry.cohort)
    if config.own_networks:  # all clients evaluate theirs
        asks += context.federation.clients * -(-len(rounds) // config.eval_every)
    if (ranks := torchrun_group.present()) is not None:
        return _on_ranks(run, ranks, asks)
    count = workers_for(config, context, asks, run.parameters)
    if count < 2:
        return run.here
    expected = asks if config.workers == "auto" else None
    return Workers(context, run.here, run.handlers, run.checkpoints.reader, count, asks=expected)


def _on_ranks(run: RunObjects, ranks: torchrun_group.TorchrunGroup, asks: int) -> Executor:
    """The executor of several ranks; this process alone, where others would have nothing to do."""
    config, context = run.config, run.context
    if config.workers not in ("auto", "1"):
        why = "each rank of torchrun has its clients work one after another"
        context.warn("no-workers", f"--workers {config.workers} changes nothing here, as {why}.")
    if not asks or config.clients_of_a_round < 2:
        return run.here
    executor = Ranks(context, run.here, run.handlers, run.checkpoints.reader, ranks)
    run.server.summing = executor.accumulator
    return executor
