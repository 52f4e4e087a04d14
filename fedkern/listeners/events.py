"""Events of a run, the listener that receives them, and a record's figures as scalars for trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkern.methods.base import Round
    from fedkern.privacy import Guarantee
    from fedkern.settings.config import RunConfig
from collections.abc import Collection

from fedkern.errors import printable_name

TAG = 200
"""Longest tag, in characters."""
_NOT_FIGURES = {"round", "rounds", "name", "evaluated", "clients", "dropped", "phases"}
_BOOKKEEPING = {
    "clock", "simulated_seconds", "seconds", "round_seconds", "bytes_up", "bytes_down", "round_bytes_up",
    "round_bytes_down",
}  # fmt: skip
_NOT_OF_CLIENTS = {"samples", "seconds"}


def scalars(record: Mapping[str, Any], sets: Collection[str] = ()) -> dict[str, float]:
    """Return the figures of a round's record by tag. ``sets`` are the names of the run's test sets.

    Metrics and losses keep their names, with the test set before a slash. Times and bytes are under ``run/``, means
    over the clients of the round under ``clients/``.
    """
    from fedkern.tasks.figure_names import split_metric

    result: dict[str, float] = {}
    for name, value in record.items():
        if name in _NOT_FIGURES or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        test_set, figure = split_metric(name, sets)
        tag = f"run/{name}" if name in _BOOKKEEPING else f"{test_set}/{figure}" if test_set else name
        result[printable_name(tag, TAG)] = float(value)
    for name, mean in _means(list(record.get("clients", {}).values())).items():
        result[printable_name(f"clients/{name}", TAG)] = mean
    return result


def _means(clients: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for info in clients:
        for name, value in info.items():
            if name not in _NOT_OF_CLIENTS and isinstance(value, (int, float)) and not isinstance(value, bool):
                values.setdefault(name, []).append(float(value))
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


Record = Mapping[str, Any]
"""A line of metrics.jsonl, the values of a round by name: JSON, with figures that the user may have named."""
Summary = Mapping[str, Any]
"""Contents of summary.json."""


@dataclass(frozen=True)
class RunInfo:
    """Facts about a run that are known before its first round.

    Attributes:
        config: every effective setting.
        out: the run folder.
        first_round: 0, or the round that a resumed run continues with.
        samples: training samples per client.
        parameters: number of parameters of one network of the run.
        test_sets: sizes of the test sets by name ("" for a single one).
        data: the federated data, for pictures and tables of its partition.
        rounds: the communication rounds planned, in order.
        private: ``--records private``: a listener must not show anything of a single client's data.
        guarantee: what the run's epsilon covers and leaves uncovered. None without an epsilon.
        model: name of the network, or of its two encoders. Empty: the name in ``config``.
        workers: processes in which clients may work side by side. 1: one client after another.
        worker_bytes: estimated memory of a worker, without the data, which all workers map.
        frozen: number of parameters that are not trained.
        frozen_norms: number of batch norms that stay in eval mode.
    """

    config: RunConfig
    out: Path
    first_round: int
    samples: tuple[int, ...]
    parameters: int
    test_sets: Mapping[str, int]
    data: Any = None
    rounds: tuple[Round, ...] = ()
    private: bool = False
    model: str = ""
    guarantee: Guarantee | None = None
    workers: int = 1
    worker_bytes: int = 0
    frozen: int = 0
    frozen_norms: int = 0

    def __deepcopy__(self, memo: dict[int, object]) -> RunInfo:
        copied = {name: value if name == "data" else deepcopy(value, memo) for name, value in vars(self).items()}
        return RunInfo(**copied)


class Listener:
    """Base class of listeners (displays, trackers). Every method does nothing until overridden.

    An exception of a listener does not end the run: the listener is left out from then on, and a warning has its name
    and the error. A :class:`~fedkern.errors.UserError` of :meth:`restore` or :meth:`on_start` does end the run.

    Listeners get copies, and a run restores the modes of PyTorch and the working folder after every call. The data in
    ``RunInfo`` are not copied.

    Example::

        class Losses(fedkern.listeners.Listener):
            def on_round(self, record):
                print(record["round"], record.get("loss"))

        fedkern.simulate("fedavg", data="digits", rounds=5, listener=Losses())

    Attributes:
        essential: whether an exception of this listener ends the run after all.
    """

    essential = False

    def state(self) -> dict[str, Any]:
        """Return plain values to keep in the checkpoint, such as a tracker's run id. Called at every commit.

        Returns:
            A dict of texts, numbers, booleans, None, lists and such dicts. An empty dict is not kept.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint with a state of a listener of this class. Called before :meth:`on_start`.

        Args:
            state: what :meth:`state` returned at that checkpoint.
        """

    def on_start(self, run: RunInfo) -> None:
        """Handle the start of a run, when data and model are ready."""

    def on_notice(self, text: str) -> None:
        """Handle progress of a long step (a detector looking for objects, a set-up round, a teacher in training)."""

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        """Handle the start of a round.

        Args:
            round: the round, negative for one-off set-up rounds.
            name: the round's name in the plan.
            participants: numbers of the clients that take part.
        """

    def on_client(self, round: int, client: int, info: Mapping[str, Any]) -> None:
        """Handle a client that is done.

        Args:
            round: the round.
            client: the client's number.
            info: ``samples``, ``seconds``, ``loss`` (mean of its batches), ``drift`` and observations. Empty with
                ``--records private``.
        """

    def on_round(self, record: Mapping[str, Any]) -> None:
        """Handle the end of a communication round.

        Keys of ``record``:

        * ``round``: rounds done, from 1. ``rounds``: rounds planned. ``name``: the round's name in the plan.
        * ``seconds``: since the start of the run, over all its resumptions. ``phases``: of this round, by phase.
        * ``bytes_up``, ``bytes_down``: so far. ``round_bytes_up``, ``round_bytes_down``: of this round.
        * ``loss``: mean training loss of the round.
        * The figures that the server reported, by name.
        * ``evaluated``: whether the round was evaluated. If so, the metrics by name.

        With ``--records private``, ``loss`` and everything else that no epsilon covers is left out.
        """

    def on_warning(self, name: str, text: str) -> None:
        """Handle a named diagnostic. Every name comes once."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Handle the end of a run, when everything is on disk.

        If the run was already finished, no :meth:`on_start` comes before.
        """

    def close(self) -> None:
        """Close the listener after a run, finished or not. This is the last call, and it may come twice."""


class Listeners(Listener):
    """Several listeners as one. A listener that fails is left out alone, and each has its own state.

    Args:
        listeners: the listeners, which get every event in this order.

    Attributes:
        info: the run's :class:`RunInfo`. None before its start.
    """

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners
        self.info: RunInfo | None = None

    def _each(self, hook: str, call: Callable[[Listener], object], *, early: bool = False) -> None:
        """Pass the event ``hook`` to every listener.

        Subclasses read ``early``: whether a UserError is for the user.
        """
        for listener in self.listeners:
            call(listener)

    def on_start(self, run: RunInfo) -> None:
        self.info = run
        self._each("on_start", lambda listener: listener.on_start(deepcopy(run)), early=True)

    def on_notice(self, text: str) -> None:
        self._each("on_notice", lambda listener: listener.on_notice(text))

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        self._each("on_round_start", lambda listener: listener.on_round_start(round, name, [*participants]))

    def on_client(self, round: int, client: int, info: Mapping[str, Any]) -> None:
        self._each("on_client", lambda listener: listener.on_client(round, client, deepcopy(info)))

    def on_round(self, record: Mapping[str, Any]) -> None:
        self._each("on_round", lambda listener: listener.on_round(deepcopy(record)))

    def on_warning(self, name: str, text: str) -> None:
        self._each("on_warning", lambda listener: listener.on_warning(name, text))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._each("on_end", lambda listener: listener.on_end(deepcopy(summary)))

    def close(self) -> None:
        self._each("close", lambda listener: listener.close())
