"""Base class of a run's parts, and the record and summary that they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import nn

from fedkern.engine.figures.final_figures import FinalFigures
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.messages.states import State
from fedkern.methods.base import Round
from fedkern.privacy.guarantee import About
from fedkern.usercode.registry import Registry, register_class


@dataclass(frozen=True)
class Stop:
    """Reason why a run ends before its plan does.

    Attributes:
        name: for programs, as in summary.json.
        reason: a sentence.
    """

    name: str
    reason: str


@dataclass
class Record:
    """Record of a round: participants, figures, timings.

    Attributes:
        entry: the round in the method's plan.
        number: of the communication round, from 1; of a one-off round, from -1 downwards.
        rounds: communication rounds of the plan.
        participants: the clients that the server asks.
        due: whether the network is evaluated at the round's end.
        in_server_process: whether all clients work in the server's process.
        clients: every client's report by its id as a text, filled when the round is over.
        reports: the same, one exchange after another.
        figures: figures of the network, if evaluated, by name.
        seconds: seconds by activity, such as "train".
        started: start of the round, by ``time.perf_counter``.
        entries: entries by name, with what each is about.
        public: the record as disclosed.
        stop: why the run ends with this round, or None.
    """

    entry: Round
    number: int
    rounds: int
    participants: list[int]
    due: bool = False
    exchanges: tuple[str, ...] = ()
    in_server_process: bool = False
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    entries: dict[str, tuple[About, Any]] = field(default_factory=dict)
    public: dict[str, Any] = field(default_factory=dict)
    stop: Stop | None = None

    @property
    def last(self) -> bool:
        return self.number == self.rounds

    def put(self, figures: Mapping[str, object], about: About = About.RUN) -> None:
        self.entries.update({name: (about, value) for name, value in figures.items()})


@dataclass
class Summary:
    """Summary of a run that has played its rounds.

    Attributes:
        network: the final network, in eval mode.
        metrics: all figures of the run by name.
        of_tests: figures of the network on the test sets and the validation set.
        latest, best: figures of the last evaluation, and the best of every main figure over all evaluations.
        final: further figures of the final network on the test sets.
        of_clients: the clients' figures on their own test sets, None if undefined.
        client_set: kind of these sets, as in evaluation.csv.
        entries: the other entries of summary.json.
        stop: why the run ended before its plan did, or None.
    """

    network: nn.Module
    metrics: dict[str, Any] = field(default_factory=dict)
    of_tests: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    final: FinalFigures = field(default_factory=FinalFigures)
    of_clients: dict[int, dict[str, float | None]] = field(default_factory=dict)
    client_set: str = ""
    entries: dict[str, Any] = field(default_factory=dict)
    stop: Stop | None = None


class Part:
    """A part of a run.

    Every method does nothing until overridden. Parts are called in the order of the run's list. A part knows no other
    part: it reads the record, the summary and the objects that it is made with.

    Attributes:
        name: as registered; its key in checkpoints.
    """

    name: ClassVar[str] = ""

    @classmethod
    def build(cls, run: RunObjects) -> Part | None:
        """Return the part, or None if the run does without it.

        Args:
            run: the run's objects, among them ``run.config`` (its settings), ``run.server``, ``run.context`` (data and
                networks) and ``run.out`` (its folder).
        """
        return cls()

    def begin(self, resumed: bool) -> None:
        """Handle the start of a run.

        Args:
            resumed: whether the run continues from a checkpoint. The part's state is then already restored.
        """

    def before_round(self, record: Record) -> Stop | None:
        """Handle the start of a round.

        Args:
            record: the round, with ``number`` (from 1; one-off rounds from -1 downwards), ``entry`` (the round in the
                method's plan) and ``participants`` (client ids).

        Returns:
            A :class:`Stop` to end the run without this round, or None.
        """
        return None

    def round_end(self, record: Record) -> Stop | None:
        """Handle the end of a round, even of a one-off round.

        Args:
            record: the round, now with ``clients`` (every client's report), ``figures`` (if the network was evaluated)
                and ``seconds``. ``record.put`` adds entries to the public record.

        Returns:
            A :class:`Stop` to end the run with this round, or None.
        """
        return None

    def finish(self, summary: Summary) -> None:
        """Handle the end of all rounds.

        Args:
            summary: the final network, all figures by name in ``metrics``, and the further ``entries`` of summary.json.
        """

    def state(self) -> State:
        """Return the part's state for a checkpoint: numbers, texts, lists and dicts of these.

        Files that it names must be on the disk.
        """
        return {}

    def restore(self, state: State) -> None:
        """Continue from a checkpoint, before :meth:`begin`.

        Args:
            state: the result of :meth:`state` at the checkpoint. An empty state is not restored.
        """

    def close(self) -> None:
        """Close what is open after a run, finished or not."""


class RunPart(Part):
    def __init__(self, run: RunObjects) -> None:
        self._run = run

    @classmethod
    def build(cls, run: RunObjects) -> Part | None:
        return cls(run)


class SettingPart(RunPart):
    """Part of runs with the setting that has the part's name."""

    @classmethod
    def build(cls, run: RunObjects) -> Part | None:
        return None if getattr(run.config, cls.name) is None else cls(run)


PARTS: Registry[type[Part]] = Registry("part")
"""Classes of parts by name."""
PartClass = TypeVar("PartClass", bound=type[Part])


def register_part(name: str) -> Callable[[PartClass], PartClass]:
    """Register a class as a part of runs under ``name``, its key in checkpoints (see :meth:`Part.build`).

    Raises:
        ValueError: another part has the name.
        TypeError: the class is not derived from :class:`Part`, or has no docstring.

    Example:
        >>> @register_part("rounds_printed")
        ... class RoundsPrinted(Part):
        ...     '''Prints the number of every finished round.'''
        ...
        ...     def round_end(self, record):
        ...         print(record.number)
    """
    return register_class(PARTS, name, Part)
