"""What happens during a run, told to whoever wants to see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkern.engine.config import RunConfig
    from fedkern.privacy import Guarantee


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first round.

    Attributes:
        config: every effective setting.
        out: the run folder.
        first_round: 0, or the round a resumed run continues with.
        samples: training samples per client.
        parameters: number of the parameters of one network of the run.
        test_sets: their names ("" for a single one) and sizes.
        data: the federated data, for pictures and tables of its partition.
        rounds: names of the communication rounds planned, in order.
        private: ``--records private``: nothing of a single client's data may be shown.
        guarantee: what the run's epsilon covers and what not; None where it has none.
        model: the network's name, or those of its two encoders; empty for that of the settings.
        workers: processes in which clients may work side by side; 1 where they work one after another.
        worker_bytes: the memory of a worker, beside the data that all of them map: an estimate.
    """

    config: RunConfig
    out: Path
    first_round: int
    samples: tuple[int, ...]
    parameters: int
    test_sets: Mapping[str, int]
    data: Any = None
    rounds: tuple[str, ...] = ()
    private: bool = False
    model: str = ""
    guarantee: Guarantee | None = None
    workers: int = 1
    worker_bytes: int = 0


class Listener:
    """Base of displays and tests; every method does nothing until overridden."""

    def on_start(self, run: RunInfo) -> None:
        """Data and model are ready."""

    def on_notice(self, text: str) -> None:
        """How far something long has come (a detector looking for objects, a teacher that is trained or asked)."""

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        """A round begins; ``round`` is negative for one-off set-up rounds."""

    def on_client(self, round: int, client: int, info: Mapping[str, Any]) -> None:
        """A client is done: ``samples``, ``seconds``, ``loss`` (mean of its batches), ``drift``, observations.

        ``info`` is empty with ``--records private``.
        """

    def on_round(self, record: Mapping[str, Any]) -> None:
        """A communication round is done.

        ``record`` has ``round`` (from 1: how many are done), ``rounds``, ``seconds`` (since the start of the run, over
        all its resumptions), ``name`` (the round's in the plan), ``bytes_up``, ``bytes_down`` (so far),
        ``round_bytes_up``, ``round_bytes_down`` (of this round), ``loss`` (mean training loss of the round), ``phases``
        (seconds of this round by phase), what the server reported and, where the round was evaluated, the metrics by
        name; with ``evaluated`` telling whether it was.  With ``--records private`` neither ``loss`` nor anything else
        that no epsilon covers is in it.
        """

    def on_warning(self, name: str, text: str) -> None:
        """A named diagnostic, said once."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run is finished and everything is on disk."""
