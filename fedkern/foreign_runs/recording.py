"""``fedkern.record``: the records of a run of any program, for comparisons."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedkern.errors import UserError, format_value
from fedkern.files import atomic, toml
from fedkern.files.filesystem import expand
from fedkern.foreign_runs import recorded_run
from fedkern.foreign_runs.recorded_run import METRICS, RECORD, SUMMARY, Header, Table, dump

PIECE = 1 << 20
"""Labels that are hashed at once."""


def hash_labels(labels: object) -> str:
    """Return a hash of test labels in their order, by which `compare` sees that runs were judged on the same samples.

    The type of the numbers makes no difference: 1, ``True`` and 1.0 are the same label.

    Args:
        labels: numbers of shape ``[n]`` or ``[n, ...]``: a list, a NumPy array or a tensor on the CPU.

    Returns:
        The SHA-256 of the shape and of the labels as little-endian float64, in hexadecimal.

    Raises:
        UserError: the labels are no numbers, or none.
    """
    try:
        array = np.asarray(labels)
        sha256 = hashlib.sha256(repr(array.shape).encode())
        for piece in np.array_split(array, 1 + array.size // PIECE):
            sha256.update((np.ascontiguousarray(piece, "<f8") + 0.0).tobytes())  # -0.0 + 0.0 is 0.0
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"Test labels must be numbers, in a list, an array or a tensor on the CPU, not {format_value(labels)}."
        ) from None
    return sha256.hexdigest()


class Recording:
    """A run that is being recorded, from :func:`record`."""

    durable = True
    """Whether every round is flushed to the disk, so that it outlives a power cut."""

    def __init__(self, folder: Path, header: Header, records: list[Table]) -> None:
        self._folder, self._header, self._records = folder, header, records
        self._time = time.monotonic()

    def round(
        self, number: int, *, seconds: float | None = None, bytes_up: float | None = None,
        bytes_down: float | None = None, **figures: object,
    ) -> None:  # fmt: skip
        """Add a round to the records, on the disk when this returns.

        Args:
            number: the round, higher than the one before. Round 0 stands for the network before training.
            seconds: time that the round took. None measures the time since the last call; NaN says that it is unknown.
            bytes_up: bytes that clients sent in this round. A direction that no round gives counts as 0, and costs
                are unknown if no round gives either.
            bytes_down: bytes that clients received in this round.
            **figures: figures by name, as numbers, arrays or tensors of one value. Shares are fractions from 0 to 1.

        Raises:
            UserError: a figure is no number or has a name that records need, the round is not higher, or the disk is
                full. Nothing of this round is recorded.
        """
        elapsed, self._time = time.monotonic() - self._time, time.monotonic()
        previous: Table = self._records[-1] if self._records else {"round": -1, "seconds": 0.0}
        costs = {"seconds": elapsed if seconds is None else seconds, "bytes_up": bytes_up, "bytes_down": bytes_down}
        record: Table = {"round": number}
        try:
            for name, cost in costs.items():
                if cost is not None or name in previous:
                    parts = previous.get(name, 0.0), _read_number(name, 0.0 if cost is None else cost)
                    record[name] = None if None in parts else sum(parts)
            record |= {name: _read_number(name, value) for name, value in figures.items()}
            recorded_run.check_record(record, previous["round"])
        except ValueError as error:
            raise UserError(f"Round {format_value(number)} of {self._folder}: {error}.") from None
        if not self._records:
            _write_header(self._folder, self._header)
        with atomic.open_in_place(self._folder / METRICS, "ab", durable=self.durable) as file:
            file.write(dump(record))
        self._records.append(record)


def _read_number(name: str, value: object) -> float | None:
    try:
        number = float("none" if isinstance(value, str) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several values
        raise ValueError(f"{name} must be a number, not {format_value(value)}") from None
    return number if math.isfinite(number) else None


def _plain(settings: Mapping[str, object]) -> Mapping[str, object]:
    if not isinstance(settings, Mapping):
        return settings
    table = {name: value for name, value in settings.items() if value is not None}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in table.items()}


@contextmanager
def record(
    folder: str | Path, *, method: str, seed: int, framework: str = "own code", settings: Mapping[str, object] = {},
    sizes: Mapping[str, int] = {}, test_labels: object = None, main: str = "accuracy", better: str | None = None,
    resume: int | None = None,
) -> Iterator[Recording]:  # fmt: skip
    """Record a run of any program in ``folder``, so that :func:`fedkern.compare` reads it beside other runs.

    ::

        with fedkern.record("runs/mine", method="mine", seed=0, settings={"lr": 0.1}, test_labels=labels) as run:
            for number in range(1, 11):
                ...
                run.round(number, accuracy=accuracy, loss=loss, bytes_up=size, bytes_down=size)

    The run is finished when the block ends. An exception inside leaves an unfinished run, which ``resume`` continues.
    The folder appears with the first round.

    Args:
        method: name of the method; runs of one ``method``, ``framework`` and ``settings`` are one group.
        seed: the seed, by which runs of two groups are paired.
        framework: the name that stands behind the method, such as ``"flower"``.
        settings: texts, numbers, booleans and lists of them by name. Entries that are None are left out.
        sizes: whole numbers by name, such as ``{"clients": 10}``.
        test_labels: the labels of the test samples in their order, or their :func:`hash_labels`. Runs with other labels
            are not paired. Several test sets: a dict by the prefix of their figures, without ``_``.
        main: the main figure.
        better: ``"max"`` or ``"min"``: whether high or low values of it are better. Needed unless it is the accuracy.
        resume: continue the run in ``folder`` after this round, whose later rounds are removed.

    Raises:
        UserError: a mistake in the arguments, or ``folder`` has a run (with ``resume``: no such run or round).
    """
    path = expand(folder)
    if better is None and not str(main).endswith("accuracy"):
        raise UserError(f'fedkern.record: main="{main}" needs better="max" or better="min".')
    sets = test_labels if isinstance(test_labels, Mapping) else {} if test_labels is None else {"test": test_labels}
    try:
        header = Header(
            method, seed, framework, main, better or "max",
            _plain(settings), sizes,
            {name: labels if isinstance(labels, str) else hash_labels(labels) for name, labels in sets.items()},
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"fedkern.record: {error}.") from None
    if resume is None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already: name another folder, or continue its run by resume=ROUND.")
    records = [] if resume is None else _cut_rounds(path, header, resume)
    yield Recording(path, header, records)
    if not any(main in record for record in records):
        raise UserError(
            f'No round of {path} has the main figure "{main}", so the run is not finished: give the figure to round(), '
            "or name another one by main=."
        )
    atomic.write_bytes(path / SUMMARY, dump(recorded_run.summarise(records)))


def _write_header(folder: Path, header: Header) -> None:
    atomic.make_folder(folder)
    atomic.write_bytes(folder / RECORD, toml.dumps({"format": recorded_run.FORMAT, **asdict(header)}).encode())


def _cut_rounds(folder: Path, header: Header, last_round: int) -> list[Table]:
    """Remove the rounds after ``last_round`` from an existing run, and return the others."""
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} has no recorded run to continue: leave resume out, or name the run's folder.")
    stored, records = asdict(recorded_run.read_header(folder)), recorded_run.read_records(folder)
    table = {name: value for name, value in asdict(header).items() if name not in ("main", "better")}
    if changed := [name for name, value in table.items() if value != stored[name]]:
        raise UserError(f"The run in {folder} was recorded with another {changed[0]}: give its own, or another folder.")
    remaining = [record for record in records if record["round"] <= last_round]
    if not remaining or remaining[-1]["round"] != last_round:
        rounds = ", ".join(str(record["round"]) for record in records[-3:]) or "none"
        raise UserError(f"{folder} has no round {last_round} to continue after; its last ones are {rounds}.")
    with atomic.report_unwritable(folder / SUMMARY):
        (folder / SUMMARY).unlink(missing_ok=True)
    atomic.write_bytes(folder / METRICS, b"".join(map(dump, remaining)))
    _write_header(folder, header)
    return remaining
