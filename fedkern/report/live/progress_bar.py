"""Progress of a run: a live display on a terminal and in a notebook, otherwise plain lines."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedkern.data import FederatedData
from fedkern.errors import MESSAGE
from fedkern.listeners.events import Listener, Record, RunInfo, Summary
from fedkern.report.names import TITLE, label, literal_text, print_line
from fedkern.report.tables import describe_epsilon, human_bytes, human_metric, human_time, partition_table
from fedkern.settings.config import RunConfig
from fedkern.tasks.figure_names import set_noun, short_set_title, short_title, split_metric

PIPE_WIDTH = 120
WIDE = 100
"""Fewest columns of a terminal whose bar shows the bytes sent."""
SITES, STAGES = 8, 6
"""Most sites, and most stages of training, in the heading."""
UNSHOWN = (
    "Records are private: class counts, losses and accuracies of single clients are neither shown nor written, nor are "
    "partition.png and figures on a validation set that was drawn from their images; --records all tells them, outside "
    "of epsilon."
)


def run_headline(run: RunInfo) -> list[str]:
    """Return the heading of a run: method, data, model, device, run folder and privacy, in two to eight lines."""
    # Who trains on how many samples, and which test sets judge the network.
    config = run.config
    samples, clients = sum(run.samples), len(run.samples)
    tests = [
        f"{size:,} {short_set_title(name)} test" if name else f"{size:,} test"
        for name, size in run.test_sets.items()
        if name != "validation"
    ]
    who_trains = f"{clients} client{'s' * (clients != 1)}"
    if clients != config.trained_clients:
        who_trains = f"the data of {config.trained_clients} clients in one place"
    if config.held_out_client is not None:
        who_trains += f" (one of {config.clients} is held out)"
    client_tests = sum(len(split) for split in getattr(run.data, "client_tests", ())) if not run.private else 0
    tests += [f"{client_tests:,} own test"] if client_tests else []
    validation = run.test_sets.get("validation", 0)
    training = f"{samples:,} training"
    if config.unit.name == "patient":
        training = f"training images of {samples // config.unit.images:,} patients"
    # The first two lines are always there. The others follow only if they apply.
    noun = "images" if run.data is None else run.data.form.noun
    lines = [
        f"{config.method} on {config.data}: {who_trains}, {training}, "
        f"{f'{validation:,} validation, ' if validation else ''}{', '.join(tests)} {noun}",
        f"{run.model or config.model} with {run.parameters:,} parameters{_frozen(run)} on {config.device}, "
        f"{config.threads} thread{'s' * (config.threads != 1)}{_side_by_side(run)}; run folder {run.out}",
    ]
    sites = getattr(run.data, "client_names", None) or ()
    if sites:
        lines.append(f"sites: {', '.join(sites[:SITES])}{', ...' * (len(sites) > SITES)}")
    lines += [f"{config.model}: {config.served}"] if config.served else []
    lines += [] if config.teachers else [_local_training(config)]
    lines += [] if run.data is None else run.data.task.header(config.output_bytes or 0, run.test_sets)
    notes = () if run.data is None else run.data.form.seen or run.data.form.describe_stored()
    lines += notes[:1] if run.private else notes[1:] or notes  # of single sites nothing, where records are private
    lines += _resize_lines(run.data)
    # What a reader must not overlook: the privacy guarantee, the schedule, and that the run was resumed.
    if run.guarantee is not None:
        unit = run.guarantee.unit
        lines.append(f"differential privacy of every {unit.name}: {unit.change}")
        lines.append(describe_epsilon(run.guarantee.to_dict()))
    lines += schedule(training_words(run))
    if run.first_round:
        lines.append(f"resumed after round {run.first_round} of {len(run.rounds)}")
    return lines


def _local_training(config: RunConfig) -> str:
    ignored = {*config.find_unused()}
    end = "" if config.lr_end == 1 or "lr_end" in ignored else f" to {config.lr * config.lr_end:g}"
    step_words = {"lr": f"learning rate {config.lr:g}{end}", "momentum": f"momentum {config.momentum:g}"}
    if config.training:
        ignored |= {"momentum"} if config.training.startswith("train ") else {"lr", "momentum"}
    words = [config.training or {"sgd": "SGD", "adamw": "AdamW"}[config.optimizer]]
    words += [text for name, text in step_words.items() if name not in ignored]
    count, unit = (config.local_steps, "step") if config.local_steps else (config.local_epochs, "local epoch")
    return f"local training: {', '.join(words)}, batch size {config.batch_size}, {count} {unit}{'s' * (count != 1)}"


def _frozen(run: RunInfo) -> str:
    norms = f" with {run.frozen_norms} batch norms in eval mode" if run.frozen_norms else ""
    return f" ({run.frozen:,} frozen{norms})" if run.frozen else ""


def _resize_lines(data: FederatedData | None) -> list[str]:
    splits = () if data is None or not data.form.offers else (data.validation, *data.tests.values())
    masks = [split.full for split in splits if split.full is not None and len(split)]
    sizes = sorted({size for full in masks for size in full.sizes()}, key=lambda size: (max(size), size))
    if not sizes or sizes == [(masks[0].store.size,) * 2]:
        return []
    ends = [sizes[0], sizes[-1]][: len(sizes)]
    side = masks[0].store.size
    pixels = " to ".join(f"{width}x{height}" for width, height in ends)
    ratios = [side / max(size) for size in ends]
    factors = " to ".join(dict.fromkeys(f"1/{1 / x:.3g}" if x < 1 else f"{x:.3g} times" for x in ratios))
    return [f"images of {pixels} pixels are resized to {side}x{side} ({factors}); Dice and IoU are of masks as given"]


def _side_by_side(run: RunInfo) -> str:
    """Return the clients' threads and worker processes if they differ from the server's, else ""."""
    client_threads = run.config.client_threads
    words = [f"{client_threads} of a client"] if client_threads and client_threads != run.config.threads else []
    if run.workers > 1:
        upto = "up to " if run.config.workers == "auto" else ""
        words.append(f"{upto}{run.workers} workers of some {run.worker_bytes / 1e6:.0f} MB")
    return "".join(f", {word}" for word in words)


def training_words(run: RunInfo) -> list[str]:
    """Describe what every round trains, in empty texts if all rounds train the same."""
    words = [entry.trains or entry.name for entry in run.rounds]
    return words if len(set(words)) > 1 else [""] * len(words)


def schedule(words: Sequence[str]) -> list[str]:
    """Return a line such as ``trained: generator (rounds 1 to 16), generator and student (rounds 17 to 32)``.

    Empty if all rounds train the same, or if this changes more than `STAGES` times.
    """
    parts: list[str] = []
    start = 1
    for stage, group in groupby(words):
        end = start + len(list(group)) - 1
        parts.append(f"{stage} (round {start})" if start == end else f"{stage} (rounds {start} to {end})")
        start = end + 1
    return [f"trained: {', '.join(parts)}"] if 1 < len(parts) <= STAGES else []


def figures_by_set(record: Record, main: str, tests: Collection[str] = ()) -> dict[str, str]:
    """Return the ``main`` figure of a record per test set: ``{"ID": "93.0 %", "OOD": "71.2 %"}``."""
    figures = {}
    for name, value in record.items():
        test_set, figure = split_metric(name, tests)
        if figure == main and test_set != "validation" and isinstance(value, (int, float)):
            title = short_set_title(test_set) or short_title(figure)
            figures[title if title not in figures else set_noun(test_set)] = human_metric(figure, value)
    return figures


def main_figures(record: Record, main: str, tests: Collection[str] = ()) -> str:
    """Return :func:`figures_by_set` as a text: ``"ID 93.0 %  OOD 71.2 %"``."""
    return "  ".join(f"{title} {value}" for title, value in figures_by_set(record, main, tests).items())


def line(record: Record, trains: str, figures: str, remaining: float | None) -> str:
    width = len(str(record["rounds"]))
    parts = [f"round {record['round']:>{width}}/{record['rounds']}{_in_parentheses(trains)}"]
    parts += [figures] if figures else []
    if isinstance(record.get("loss"), (int, float)):
        parts.append(f"loss {record['loss']:.3f}")
    parts.append(f"up {human_bytes(record['bytes_up'])} down {human_bytes(record['bytes_down'])}")
    parts.append(human_time(record["seconds"]) + (f", {human_time(remaining)} left" if remaining else ""))
    return "  ".join(parts)


def _in_parentheses(trains: str) -> str:
    return f" ({label(trains, TITLE)})" if trains else ""


class Clock:
    """Estimator of the time left from the rounds of this process, as a resumed run may have changed machines.

    A round is taken to last as long as earlier rounds that trained the same (``words``), or, without any, as rounds
    like the last one. Set-up rounds do not count.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.since = time.monotonic()
        self.spent: dict[str, tuple[int, float]] = {}  # rounds and seconds

    def begin(self) -> None:
        if not self.spent:
            self.since = time.monotonic()

    def remaining(self, done: int) -> float | None:
        """Return the seconds left after ``done`` rounds, None if other rounds than the first train something else."""
        trains, remaining_rounds = self.words[done - 1], Counter(self.words[done:])
        count, seconds = self.spent.get(trains, (0, 0.0))
        before, self.since = self.since, time.monotonic()
        self.spent[trains] = count + 1, seconds + self.since - before
        means = {stage: seconds / count for stage, (count, seconds) in self.spent.items()}
        if not count and remaining_rounds.keys() - means.keys():
            return None
        return sum(means.get(stage, means[trains]) * rounds for stage, rounds in remaining_rounds.items())


class Warnings(Listener):
    """Display of warnings only, for ``--quiet`` and ``--json``."""

    essential = True  # the command ends once standard error has no reader

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_warning(self, name: str, text: str) -> None:
        message = Text("warning", "yellow").append(literal_text(f" ({name}): {text}", limit=MESSAGE))
        self.console.print(message, soft_wrap=True)

    def close(self) -> None:
        """Restore the terminal. Safe to call twice, and after an interruption."""


class Lines(Warnings):
    """Display in plain lines, for files and pipes: a heading, then one line per evaluated round."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.clock = Clock(())
        self.tests: Collection[str] = ()
        self.main = ""

    def on_start(self, run: RunInfo) -> None:
        for text in run_headline(run):
            print_line(self.console, text)
        if run.private:
            print_line(self.console, UNSHOWN)
        elif run.data is not None:
            self.console.print(partition_table(run.data.statistics))
        self.clock, self.tests, self.main = Clock(training_words(run)), run.test_sets, run.config.main

    def on_notice(self, text: str) -> None:
        print_line(self.console, text)

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        if round > 0:
            self.clock.begin()

    def on_round(self, record: Record) -> None:
        remaining, trains = self.clock.remaining(record["round"]), self.clock.words[record["round"] - 1]
        figures = main_figures(record, self.main, self.tests)
        if trains or figures or record["round"] == record["rounds"]:
            print_line(self.console, line(record, trains, figures, remaining))


class Live(Lines):
    """Display on a terminal: a bar that moves with every client, accuracies, bytes, time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        figures = TextColumn("{task.fields[figures]}", style="bold", markup=False)
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), figures
        self.progress = Progress(*columns, TextColumn("{task.fields[rest]}"), console=console, transient=True)
        self.bar: Any = None
        self.participants = 1
        self.done = 0

    def on_start(self, run: RunInfo) -> None:
        super().on_start(run)
        self.done = run.first_round
        self.bar = self.progress.add_task(
            f"round {self.done}/{len(run.rounds)}", total=len(run.rounds), completed=self.done, figures="", rest=""
        )
        self.progress.start()

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        super().on_round_start(round, name, participants)
        self.participants = max(len(participants), 1)
        if self.bar is not None and round > 0:
            words = self.clock.words
            self.progress.update(self.bar, description=f"round {round}/{len(words)}{_in_parentheses(words[round - 1])}")

    def on_client(self, round: int, client: int, info: Mapping[str, object]) -> None:
        if self.bar is not None and round > 0:
            bar = self.progress.tasks[0]
            # A round with several exchanges must not move the bar past the end of the round.
            self.progress.update(self.bar, completed=min(bar.completed + 1 / self.participants, self.done + 1))

    def on_round(self, record: Record) -> None:
        remaining = self.clock.remaining(record["round"])
        self.done = record["round"]
        if self.bar is None:
            return
        sent = f"up {human_bytes(record['bytes_up'])} down {human_bytes(record['bytes_down'])}"
        left = "" if remaining is None else f"{human_time(remaining)} left"
        status = f"{sent} {left}" if self.console.width >= WIDE else left
        figures = main_figures(record, self.main, self.tests) or self.progress.tasks[0].fields["figures"]
        self.progress.update(self.bar, completed=self.done, rest=status, figures=figures)

    def on_end(self, summary: Summary) -> None:
        self.close()

    def close(self) -> None:
        self.progress.stop()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError for the command line, where rich would exit with code 1."""
        raise BrokenPipeError


@contextmanager
def show_progress(total: int, doing: str) -> Iterator[Callable[[], None]]:
    """Show a long task's progress on a terminal. Yields a function to call after every part."""
    console = make_console(stderr=True)
    columns = (SpinnerColumn(), TextColumn(doing, markup=False), BarColumn(bar_width=30),
               TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        yield lambda: progress.update(bar, advance=1)


def make_console(*, stderr: bool = False) -> Console:
    """Return the console to print on. Lines in files and pipes have :data:`PIPE_WIDTH` columns, not rich's 80."""
    stream = sys.stderr if stderr else sys.stdout
    # FORCE_COLOR and TTY_COMPATIBLE ask for colours; a bar that moves belongs on a terminal alone.
    console = _Console(stderr=stderr, force_terminal=None if stream.isatty() else False)
    return console if console.is_terminal else _Console(stderr=stderr, force_terminal=False, width=PIPE_WIDTH)
