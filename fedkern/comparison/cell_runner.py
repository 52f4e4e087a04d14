"""Runs the cells of a comparison that are not finished, each into its own folder."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from select import select
from typing import Any

from fedkern.comparison.boards import Board
from fedkern.comparison.cells import Cell, Variant, cells
from fedkern.comparison.found_runs import OwnRun, read_own_run
from fedkern.comparison.parallel_runs import RunProcess, check_jobs
from fedkern.data import FederatedData
from fedkern.data.identity import identify_memory
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.run import run
from fedkern.engine.setup.own_model import network_hash
from fedkern.engine.store import initial_weights
from fedkern.engine.store.checkpoints import read_newest
from fedkern.engine.store.resuming import with_identity
from fedkern.engine.store.run_folder import reserve
from fedkern.errors import UserError, first_of, traceback_of
from fedkern.files import atomic
from fedkern.listeners.events import Listener, Listeners
from fedkern.methods.method_registry import short_name
from fedkern.models import MODELS, Own, available
from fedkern.process import interrupts
from fedkern.report.tables import human_metric
from fedkern.settings.config import NAME as SETTINGS
from fedkern.settings.config import RunConfig, check_regular, load_settings, stored_code
from fedkern.settings.provenance import describe_difference, files_identity
from fedkern.tasks.figure_names import short_title
from fedkern.usercode.code_identity import digest, find_changes, fold_table, is_unchanged

COMPARISONS = Path("comparisons")
"""Folder of comparisons without ``out``."""
_OPEN = ("threads", "client_threads")
"""Settings whose default depends on the machine. Unless given, a stored run keeps its own values."""


class OtherDataOrCode(UserError):
    """A comparison that would continue with other data or code than its runs so far."""


@dataclass
class Runner:
    """The runs of a comparison, in folders in ``out``.

    Attributes:
        data: returns the in-memory data of a run, or None.
        settings: names of the settings that the user gave.
        failures: messages by cell name.
        tracebacks: of cells in which Python code failed.
        begun: run folders so far, with their settings.
        listener: gets the events of the runs beside the board, but none with several jobs.
        jobs: most runs at once, each in its own process.
    """

    out: Path
    make: Callable[[Variant, int], RunConfig]
    settings: frozenset[str] = frozenset()
    board: Board = field(default_factory=Board)
    data: Callable[[RunConfig], FederatedData | None] = lambda config: None
    script: ScriptObjects = ScriptObjects()
    failures: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)
    begun: list[tuple[Path, RunConfig]] = field(default_factory=list)
    listener: Listener = field(default_factory=Listener)
    jobs: int = 1
    _compared: set[Path] = field(default_factory=set)

    def plan(self, variants: Sequence[Variant], seeds: Sequence[int]) -> list[Cell]:
        """Return the cells of some variants, whose existing run folders must have the same settings."""
        result = cells(variants, seeds, self.make)
        configs = []
        for cell in result:
            folder = self.folder(cell)
            if (folder / SETTINGS).exists():
                configs.append(self._stored_config(cell))
                before = load_settings(folder, trusted=self._trusted_code(cell), device="cpu")
                self.begun.append((folder, with_identity(before, read_newest(folder))))
                continue
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder} is there and holds no run: remove it, or name another --out.")
            configs.append(cell.config)
        check_jobs(self.jobs, configs)
        return result

    def folder(self, cell: Cell) -> Path:
        return self.out / cell.name

    def read(self, cell: Cell) -> OwnRun:
        return read_own_run(self.folder(cell), self._trusted_code(cell))

    def play(self, planned: Sequence[Cell], check: Callable[[Cell, OwnRun], None] | None = None) -> None:
        """Run the cells that are not finished. A failed cell is noted, and the others still run.

        The UserError of ``check``, called with every finished cell and its run, ends the comparison. So does a full
        disk, and an error that all cells share.
        """
        self.board.on_cells(planned)
        outcomes: list[Exception | None] = []
        with closing(self._play_all([cell for cell in planned if cell.name not in self.failures])) as attempts:
            for cell, again, error in attempts:
                try:
                    if error is not None:
                        raise error
                    result = self.read(cell)
                except Exception as failure:
                    full = isinstance(failure, OSError) and failure.errno in atomic.FULL
                    if full or isinstance(failure, OtherDataOrCode):
                        raise
                    self._note_failure(cell, failure)
                    outcomes.append(failure)
                else:
                    self.board.on_cell_end(cell, result, again=again)
                    outcomes.append(None)
                    if self.jobs > 1:
                        self.begun.append((result.folder, result.config))
                    if check is not None:
                        check(cell, result)
        first_error = next(iter(outcomes), None)
        if first_error is not None and all(error is not None and str(error) == str(first_error) for error in outcomes):
            raise first_error

    def _play_all(self, planned: Sequence[Cell]) -> Generator[tuple[Cell, bool, Exception | None], None, None]:
        """Yield cells as they end, whether they were finished before, and their errors, with `jobs` at once."""
        waiting, running = [*planned], list[RunProcess]()
        with interrupts.in_order():
            try:
                while waiting or running:
                    interrupts.check()
                    if waiting and len(running) < self.jobs:
                        cell, process, error = waiting.pop(0), None, None
                        again = (self.folder(cell) / "summary.json").exists()
                        try:
                            process = None if again else self._begin(cell)
                        except Exception as failure:
                            error = failure
                        if process is None:
                            yield cell, again, error
                        else:
                            running.append(process)
                        continue
                    for process in select(running, [], [], 1.0)[0]:
                        event, value = process.receive()
                        if event == "end":
                            running.remove(process)
                            process.close()
                            yield process.cell, False, value
                        else:
                            self.board.focus(process.cell)
                            getattr(self.board, event)(value)
            finally:
                for process in running:
                    process.process.terminate()
                for process in running:
                    process.close()

    def _begin(self, cell: Cell) -> RunProcess | None:
        """Run an unfinished cell, or with several jobs return the process that runs it."""
        self.board.on_cell(cell)
        folder = self.folder(cell)
        resume = (folder / SETTINGS).exists()
        config = cell.config if not resume else self._stored_config(cell)
        config = config.replace(common=self.settings | cell.variant.settings.keys())
        config = config.replace(workers="1") if self.jobs > 1 else config
        play: partial[dict[str, Any]] = partial(
            run, config, out=folder, resume=resume, data=self.data(config), trusted=self._trusted_code(cell),
            check=partial(check_provenance, self.begun, folder), at_once=self.jobs,
        )  # fmt: skip
        if self.jobs > 1:
            return RunProcess(cell, self.out / f"{cell.name}.log", self.script, play)
        play(listener=Listeners(self.board, self.listener), script=self.script)
        return None

    def _note_failure(self, cell: Cell, error: Exception) -> None:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self.failures[cell.name] = f"{cell.variant.label}, seed {cell.seed}: {' '.join(message.split())}"
        if trace := traceback_of(error):
            self.tracebacks[cell.name] = trace
        self.board.on_cell_failed(cell, message)

    def _trusted_code(self, cell: Cell) -> list[str]:
        # The user has named this code again in this command.
        return [*(part for _, part in cell.config.code()), *cell.config.plugins]

    def _stored_config(self, cell: Cell) -> RunConfig:
        folder = self.folder(cell)
        check_regular(folder)
        stored = load_settings(folder, trusted=self._trusted_code(cell), device=cell.config.device)
        current = self.script.describe_settings(cell.config)
        fields = (*current.unset, *(name for name in _OPEN if name not in self.settings))
        stored_values = {name: getattr(stored, name) for name in fields}
        current = current.replace(**stored_values, augment=current.augment or stored.augment)
        if changed := current.with_client_threads().differences(stored.with_client_threads()):
            raise UserError(
                f"{folder} was made with other settings ({'; '.join(changed)}): name another --out, or give the former "
                "settings."
            )
        if folder not in self._compared:
            self._check_identity(current, with_identity(stored, read_newest(folder)), folder)
            self._compared.add(folder)
        return current

    def _check_identity(self, config: RunConfig, stored: RunConfig, folder: Path) -> None:
        """Raise UserError unless code, files and in-memory data are those of a stored run."""
        data = self.data(config)
        code = self.script.code_at_begin(config, data)
        identity = {} if data is None else identify_memory(data)
        identity |= {name: text for name, text in files_identity(config).items() if name != "version"}
        hashes = {group: digest(table) for group, table in code.items()}
        before = {**stored.identity, "method": stored.method_sha256}
        hashes = {
            group: before[group] or hash_now if is_unchanged(before.get(group, ""), hash_now) else hash_now
            for group, hash_now in hashes.items()
        }
        identity |= {group: hashes[group] for group in ("network", "loss_fn") if group in hashes}
        found: dict[str, Any] = {"method_sha256": hashes.get("method")}
        if config.init is not None:
            found["init_sha256"] = initial_weights.sha256(config.init)
        with available(config.model, self.script.network):
            maker = getattr(MODELS.get(config.model), "make", None)
            if isinstance(maker, Own):
                found["model_sha256"] = network_hash(maker)
        if reason := describe_difference(stored, config.replace(identity=identity, **found)):
            tables = stored_code(folder)
            words = [text for key in tables.keys() & code for text in find_changes(tables[key], fold_table(code[key]))]
            raise UserError(
                f"{folder} was made with {reason}{f' ({first_of(words, 3)})' if words else ''}: name another --out, or "
                "put the former code back."
            )


def check_provenance(begun: list[tuple[Path, RunConfig]], folder: Path, config: RunConfig) -> None:
    """Note a run in ``begun``, or raise OtherDataOrCode if its data or code differ from the runs before."""
    for place, before in begun:
        if place != folder and (reason := describe_difference(before, config)):
            raise OtherDataOrCode(
                f"{place} was made with {reason} than this command would run with: name another --out, or put the "
                "former data and code back."
            )
    begun.append((folder, config))


def pick_best(runner: Runner, by_method: Mapping[str, Sequence[Variant]], seed: int) -> tuple[list[Variant], list[str]]:
    """Return every method's best variant by the main validation figure of one seed, and sentences on the choices.

    Test figures choose nothing. The first of equally good variants wins, and failed or NaN variants never do.
    """
    candidates = [variant for choices in by_method.values() if len(choices) > 1 for variant in choices]
    winners, sentences = [], []
    scores: dict[str, tuple[float, RunConfig]] = {}

    def score(cell: Cell, run: OwnRun) -> None:
        name = f"validation_{run.main}"
        if name in run.metrics:
            scores[cell.variant.label] = run.metrics[name], run.config
        elif name not in run.summary["metrics"]:  # else it is NaN, and such a variant is never chosen
            raise UserError(
                f"--select validation needs a figure on a validation set, and the run in {run.folder} has none: "
                "leave --select out to run every setting with every seed."
            )

    runner.play(runner.plan(candidates, (seed,)), score)
    for method, choices in by_method.items():
        if len(choices) == 1:
            winners.append(choices[0])
            continue
        if not (finished := [variant for variant in choices if variant.label in scores]):
            continue
        config = scores[finished[0].label][1]
        pick: Callable[..., Variant] = min if config.better == "min" else max
        best = pick(finished, key=lambda variant: scores[variant.label][0])
        winners.append(best)
        figures = ", ".join(f"{_point(v)}: {human_metric(config.main, scores[v.label][0])}" for v in finished)
        name = f"{short_name(method)}: {_point(best)}"
        sentences.append(f"{name} was chosen by validation {short_title(config.main)} of seed {seed} ({figures}).")
    return winners, sentences


def _point(variant: Variant) -> str:
    return variant.label.removeprefix(short_name(variant.method)).strip()


def check_out(out: Path) -> None:
    """Raise UserError if runs cannot be put into folders of ``out``."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is no folder: name another --out.")
    if (out / SETTINGS).exists():
        raise UserError(f"{out} is the folder of a single run: name another --out for the comparison.")


def reserve_folder() -> Path:
    return reserve(COMPARISONS, time.strftime("%Y%m%d-%H%M%S"), "name another folder with --out")
