"""``fedkern.record``: the records of a run of any program, for comparisons."""

import hashlib
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedkern.errors import UserError, first_of, format_value
from fedkern.files import atomic, toml
from fedkern.files.filesystem import expand
from fedkern.foreign_runs import recorded_run
from fedkern.foreign_runs.recorded_run import COSTS, METRICS, RECORD, SUMMARY, Header, Table, dump


def hash_labels(labels: object) -> str:
    """Return a hash of test labels in their order, by which `compare` sees that runs were judged on the same samples.

    The type of the numbers makes no difference: 1, ``True`` and 1.0 are the same label.

    Args:
        labels: numbers of shape ``[n]`` or ``[n, ...]``: a list, a NumPy array or a tensor on the CPU.

    Returns:
        The SHA-256 of the shape and of the labels as little-endian float64, in hexadecimal.

    Raises:
        UserError: the labels are no numbers, or there are none.
    """
    try:
        array = np.asarray(labels)
        if array.dtype.kind not in "biuf" or not array.size:
            raise TypeError
        sha256 = hashlib.sha256(repr(array.shape).encode())
        sha256.update((np.asarray(array, "<f8") + 0.0).tobytes())  # -0.0 + 0.0 is 0.0
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"Test labels must be numbers in an array on the CPU, not {format_value(labels)}.") from None
    return sha256.hexdigest()


class Recording:
    """A run that is being recorded, from :func:`record`."""

    durable = True
    """Whether every round is flushed to the disk, so that it outlives a power cut."""

    def __init__(self, folder: Path, header: Header, records: list[Table]) -> None:
        self._folder, self._header, self._records, self._time = folder, header, records, time.monotonic()
        self._is_cut = False  # whether the last write failed

    def round(
        self, number: int, *, seconds: float | None = None, bytes_up: float | None = None,
        bytes_down: float | None = None, **figures: object,
    ) -> None:  # fmt: skip
        """Add a round to the records, on the disk when this returns.

        Args:
            number: the round, higher than the one before. Round 0 stands for the network before training.
            seconds: time that the round took. None measures the time since the last call; NaN says that it is unknown.
            bytes_up: bytes that clients sent in this round. A direction that no round gives counts as 0, and costs
                are unknown if no round gives either, or one is NaN.
            bytes_down: bytes that clients received in this round.
            **figures: figures by name, as numbers, arrays or tensors of one value. Shares are fractions from 0 to 1.

        Raises:
            UserError: a figure is no number or has a name that records need, the round is not higher, or the disk is
                full. Nothing of this round is recorded.
        """
        elapsed, self._time = time.monotonic() - self._time, time.monotonic()
        previous: Table = self._records[-1] if self._records else {"round": -1, "seconds": 0.0}
        record: Table = {"round": number}
        try:
            for name, cost in zip(COSTS, (elapsed if seconds is None else seconds, bytes_up, bytes_down), strict=True):
                if cost is not None or name in previous:
                    parts = previous.get(name, 0.0), _read_number(name, 0.0 if cost is None else cost)
                    recorded_run.check_record({"round": number, name: parts[1]}, previous["round"])
                    record[name] = None if None in parts else sum(parts)
            record |= {name: _read_number(name, value) for name, value in figures.items()}
            recorded_run.check_record(record, previous["round"])
        except ValueError as error:
            raise UserError(f"Round {format_value(number)} of {self._folder}: {error}.") from None
        if not self._records and not self._is_cut:
            _check_free(self._folder)  # a second program may have begun
            atomic.make_folder(self._folder)
            atomic.write_bytes(self._folder / RECORD, _dump_header(self._header).encode())
        if self._is_cut:
            atomic.write_bytes(self._folder / METRICS, b"".join(map(dump, self._records)))
        self._is_cut = True
        with atomic.open_in_place(self._folder / METRICS, "ab", durable=self.durable) as file:
            file.write(dump(record))
        self._is_cut = False
        self._records.append(record)


def _read_number(name: str, value: object) -> float | None:
    try:
        number = float("none" if isinstance(value, str) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several values
        raise ValueError(f"{name} must be a number, not {format_value(value)}") from None
    return number if np.isfinite(number) else None


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
    sets = test_labels if isinstance(test_labels, Mapping) else {} if test_labels is None else {"test": test_labels}
    try:
        hashes = {name: labels if isinstance(labels, str) else hash_labels(labels) for name, labels in sets.items()}
        way = better or ("max" if str(main).endswith("accuracy") else "")
        header = Header(method, seed, framework, main, way, settings, sizes, hashes)
    except ValueError as error:
        raise UserError(f"fedkern.record: {error}.") from None
    records = _check_free(path) if resume is None else _cut_rounds(path, header, resume)
    yield Recording(path, header, records)
    if not any(main in record for record in records):
        raise UserError(
            f'No round of {path} has the main figure "{main}": give it to round(), or name another by main=.'
        )
    atomic.write_bytes(path / SUMMARY, dump(recorded_run.summarise(records)))


def _check_free(folder: Path) -> list[Table]:
    """Return the records of an absent or empty folder, which are none, or raise UserError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name another folder, or continue its run by resume=ROUND.")
    return []


def _dump_header(header: Header) -> str:
    settings = {name: value for name, value in header.settings.items() if value is not None}
    return toml.dumps({"format": recorded_run.FORMAT, **asdict(header), "settings": settings})


def _cut_rounds(folder: Path, header: Header, last_round: int) -> list[Table]:
    """Remove the rounds after ``last_round`` from an existing run, and return the others."""
    if not folder.exists():
        raise UserError(f"{folder} has no run to continue: leave out resume to begin one.")
    stored, records = asdict(recorded_run.read_header(folder)), recorded_run.read_records(folder)
    given = tomllib.loads(text := _dump_header(header))
    if changed := [name for name in stored if name not in ("main", "better") and stored[name] != given[name]]:
        names = ", ".join(changed)
        raise UserError(f"The run in {folder} was begun with other values of {names}: give those, or another folder.")
    remaining = [record for record in records if record["round"] <= last_round]
    if not remaining or remaining[-1]["round"] != last_round:
        rounds = first_of([str(record["round"]) for record in records[::-1]], 3) or "none"
        raise UserError(f"{folder} has no round {last_round} to continue after; its rounds are, last first: {rounds}.")
    with atomic.report_unwritable(folder / SUMMARY):
        (folder / SUMMARY).unlink(missing_ok=True)
    atomic.write_bytes(folder / METRICS, b"".join(map(dump, remaining)))
    atomic.write_bytes(folder / RECORD, text.encode())
    return remaining
