"""The report of a run: what its folder holds, as a page."""

from __future__ import annotations

import math
import re
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from torch import nn

from fedkern.data import DATASETS, Split
from fedkern.data.images.used_cache import remembered
from fedkern.data.sharing.partition import parse_partition
from fedkern.data.sources.arrays import NAME as ARRAYS
from fedkern.engine.script_objects import INSTANCE
from fedkern.engine.store import confusions
from fedkern.engine.store.artifacts import Artifact
from fedkern.engine.store.artifacts import read as read_shown
from fedkern.engine.store.checkpoints import newest
from fedkern.engine.store.confusions import Confusions
from fedkern.engine.store.records import METRICS, read_metrics, read_summary
from fedkern.engine.store.resuming import unedited
from fedkern.errors import UserError, listed, printable_name, spared
from fedkern.files.inputs import open_regular
from fedkern.methods import registry
from fedkern.methods.common.diagnostics import hardly_better
from fedkern.methods.common.final_figures import set_name
from fedkern.process.versions import versions
from fedkern.report import chance
from fedkern.report.figures import pictures
from fedkern.report.figures.plots import (
    COLOURS,
    DRAWN,
    Points,
    accuracy_curves,
    add_point,
    client_points,
    clients_picture,
    main_points,
    partition_picture,
    svg,
)
from fedkern.report.figures.weights import PANELS, weights_picture
from fedkern.report.names import CELL
from fedkern.report.pages import html_page
from fedkern.report.pages.charts import Series, bars, counts_table, curves, of_rounds, rounds_table, scaled, shown
from fedkern.report.pages.html_page import Chart, Page, Picture, Section, Table
from fedkern.report.pages.retrieval_examples import examples, retrieval_examples
from fedkern.report.tables import covering, human_metric, human_time, ordered, sent_rows
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import kept_data, load_data
from fedkern.settings.stored import stored_settings
from fedkern.tasks.figure_names import figure_title, scale, set_noun, set_title, short_title, split_metric
from fedkern.typed_option import as_typed

NAMED = 12
"""Most clients that have a curve each; of more clients the lowest, the middle and the highest value are drawn."""
LISTED = 100
"""Most clients in the table."""
_SETS = ("id", "ood", "", "minority", "unseen", "held_out", "validation")
_LARGEST = 32 << 20
"""Bytes of a picture from which on it is left out."""
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Contents:
    """What is known of a run.

    Attributes:
        summary: contents of ``summary.json``; None where the run is not finished.
        data: the run's ``FederatedData``; None where it cannot be had.
        no_data: why there are no data, as a sentence; empty where there are.
        confusion: confusion matrices, where the run has them.
        built: versions that the run was made with.
    """

    folder: Path
    config: RunConfig
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    data: Any = field(repr=False)
    no_data: str = ""
    confusion: Confusions | None = None
    warnings: Mapping[str, str] = field(default_factory=dict)
    shown: Sequence[Artifact] = ()
    built: Mapping[str, str] = field(default_factory=dict)

    @property
    def private(self) -> bool:
        """Whether nothing may be told of single clients and of counts of samples."""
        return self.config.records == "private"

    @property
    def metrics(self) -> dict[str, float]:
        """The final figures that are numbers; those of the last evaluated round where the run is not finished."""
        found = self.summary["metrics"] if self.summary is not None else self.last
        return {name: found[name] for name in ordered(found, main=self.config.main) if math.isfinite(found[name])}

    @property
    def last(self) -> Mapping[str, Any]:
        """The last record with a main figure; empty where there is none."""
        main = self.config.main
        return next((each for each in reversed(self.records) if any(name.endswith(main) for name in each)), {})

    @property
    def main(self) -> list[str]:
        """Names of the main figures on the test sets."""
        main = self.config.main  # with any prefix: ``ood_accuracy``, ``vote_accuracy``
        names = [name for name in self.metrics if name.endswith(main) and self.split(name)[0] != "validation"]
        return [name for name in names if self.split(name)[1] == main] or names[:1]

    @property
    def statistics(self) -> Any:
        """The partition's statistics, or None where they are not known or must not be told."""
        return None if self.data is None or self.private else self.data.statistics

    @property
    def counted(self) -> Mapping[str, Split]:
        """The test sets of which counts may be told."""
        return {} if self.data is None or self.private or self.data.form.lacks else self.data.tests

    @property
    def classes(self) -> int:
        """Number of classes; 0 where the data cannot be had."""
        return 0 if self.data is None else len(self.data.classes)

    @property
    def tests(self) -> Collection[str]:
        """Names of the test sets; none where the data cannot be had."""
        return () if self.data is None else self.data.tests

    def split(self, name: str) -> tuple[str, str]:
        """Test set and figure of a name such as ``ood_accuracy``, also of test sets that a user has named."""
        return split_metric(name, self.tests)

    def client(self, k: str) -> str:
        """A client's name, or "client" with its number."""
        names = (self.summary or {}).get("client_names")
        if names is None and self.data is not None:
            names = self.data.client_names
        return names[int(k)] if names is not None and int(k) < len(names) else f"client {k}"


def read(run_dir: Path, *, data: Any = None, data_root: str | None = None, trusted: Collection[str] = ()) -> Contents:
    """Reads a run folder, and the run's data where they can be had.

    Args:
        data: the run's ``FederatedData`` without its holdout; None loads the data again.
        data_root: current folder of the data files.
        trusted: code that may be imported (see :func:`fedkern.load`).

    Raises:
        UserError: there is no run, a file is damaged, or the settings were changed after the run began.
    """
    moved = {} if data_root is None else {"data_root": data_root}
    config = unedited(run_dir, trusted=trusted, device="cpu", cache=remembered(run_dir), **moved)
    entry = newest(run_dir)
    info = {} if entry is None else entry["info"]
    summary = read_summary(run_dir) if info.get("finished", True) else None  # an older one, of a run since extended
    no_data = ""
    if data is None:
        try:
            data = kept_data(config, load_data(config, masks=False))
        except UserError as error:
            no_data = str(error)
        else:
            if len(data.statistics.counts) != config.trained_clients:
                data, no_data = None, f"The data found now are of another number of clients than the run in {run_dir}."
    found = summary or info
    private = config.records == "private"
    return Contents(
        run_dir, config, read_metrics(run_dir) if entry or (run_dir / METRICS).exists() else [], summary, data, no_data,
        confusion=None if private else confusions.read(run_dir),
        warnings=info.get("parts", {}).get("warnings", {}) if summary is None else summary.get("diagnostics", {}),
        shown=read_shown(run_dir), built=found.get("versions") or {},
    )  # fmt: skip


def in_memory(config: RunConfig) -> bool:
    """Whether a run's data, network or method were in the memory of a Python program: no command repeats the run."""
    code = config.model.startswith(INSTANCE) or config.method.startswith(registry.CLASS)
    return code or config.data == ARRAYS or config.data not in DATASETS


def stored_device(run_dir: Path) -> str:
    """The device that a run was made with, which this machine may lack.

    Raises:
        UserError: ``config.toml`` cannot be read.
    """
    return str(stored_settings(run_dir).get("device", "cpu"))


def write_report(
    run_dir: Path,
    *,
    data: Any = None,
    model: nn.Module | None = None,
    data_root: str | None = None,
    command: str = "",
    trusted: Collection[str] = (),
) -> Path:
    """Writes ``report.html`` of a run, finished or not, into its folder, and returns its path.

    Pictures that a finished run lacks are drawn first, as :func:`fedkern.report.figures.pictures.write_pictures` does.

    Args:
        run_dir, data, data_root, trusted: see :func:`read`.
        model: the run's network, where it was a module of a script.
        command: the command that repeats the run; may be empty.

    Raises:
        UserError: a file of the run is damaged, or the folder cannot be written.
    """
    html_page.check_target(run_dir)
    run = read(run_dir, data=data, data_root=data_root, trusted=trusted)
    undrawn: list[str] = []
    if run.summary is not None and not pictures.drawn(run_dir):
        why: str | None = run.no_data.rstrip(".")
        if run.data is not None:
            draw = partial(pictures.finished_pictures, model=model, trusted=trusted, warn=undrawn.append)
            why = draw(run_dir, data=run.data)[1]
        undrawn += [f"The run's pictures could not be drawn: {why}."] if why is not None else []
    return html_page.write(page(run, command=command, undrawn=undrawn, model=model, trusted=trusted), run_dir)


def page(
    run: Contents,
    *,
    command: str = "",
    undrawn: Sequence[str] = (),
    model: nn.Module | None = None,
    trusted: Collection[str] = (),
) -> Page:
    """The page of a run; ``undrawn`` are sentences on pictures that could not be drawn."""
    config = run.config
    count = config.trained_clients
    rounds = _rounds(run)
    network = (run.summary or {}).get("model") or config.model
    about = (
        f"seed {config.seed} · {count} client{'s' * (count != 1)} · {rounds} round{'s' * (rounds != 1)} · {network} · "
        f"{'finished' if run.summary is not None else 'not finished'}"
    )
    sections: list[Section] = []
    answers = () if run.data is None or run.summary is None else run.data.task.pictures
    makes: tuple[Callable[[Contents], Section], ...] = (
        _figures, _curves, clients, _weights, _cost, _confusion, partial(_pictures, undrawn=undrawn),
        *(partial(_ANSWERS[name], model=model, trusted=trusted) for name in answers if name in _ANSWERS),
        partial(_settings, command=command),
    )  # fmt: skip
    for make in makes:
        with spared(lambda why: sections.append(Section(f"missing-{len(sections)}", "Missing section", [f"{why}."]))):
            sections.append(make(run))
    return Page(
        title=printable_name(f"{config.method} on {config.data}", CELL),
        about=printable_name(about, CELL),
        headline=headline(run),
        warnings=[(name, text) for name, text in run.warnings.items()],
        tiles=_tiles(run),
        sections=sections,
    )


# -- the headline ------------------------------------------------------------------------------------------------------


def headline(run: Contents) -> list[str]:
    """What a sceptic concludes from a run, sentence by sentence."""
    told = []
    if run.summary is None:
        planned = "" if registry.get(run.config.method).one_shot else f" of {run.config.rounds}"
        told.append(f"This run is not finished: {_rounds(run)}{planned} rounds are done, so no figure is its result.")
        if run.main:
            told.append(f"After round {run.last['round']} it has {listed(_values(run, run.main))}.")
    elif run.main:
        rounds = _rounds(run)
        told.append(
            f"{printable_name(run.config.method, 60)} reaches {listed(_values(run, run.main))} after {rounds} "
            f"round{'s' * (rounds != 1)}."
        )
    else:
        told.append("The run tells no main figure.")
    if stopped := (run.summary or {}).get("stopped"):
        told.append(f"It ended before its {run.config.rounds} rounds were over: {stopped['reason']}.")
    told += baseline(run)
    if run.summary is None:
        python = f"fedkern.load({str(run.folder)!r}, ...).resume() in Python"
        command = f"python -m fedkern.run --resume {shlex.quote(str(run.folder))}"
        told.append(f"Go on with: {python if in_memory(run.config) else command}")
        return told
    told += _worst(run)
    told += _chance(run)
    dropped = sum(bool(record.get("dropped")) for record in run.records)
    if dropped:
        told.append(f"Clients were left out in {dropped} of {len(run.records)} rounds.")
    if run.summary.get("privacy"):
        text = covering(run.summary["privacy"])
        told.append(f"{text[0].upper()}{text[1:]}.")
    return told


def _values(run: Contents, names: Iterable[str]) -> list[str]:
    """Main figures with their test sets: ``"an accuracy of 68.2 % out of distribution"``."""
    found: list[str] = []
    for name in names:
        test_set, figure = run.split(name)
        called = {"accuracy": "an accuracy of ", "dice": "a Dice of ",
                  "i2t_r1": "a recall at 1 (image to text) of "}.get(figure, f"{figure_title(figure)} ")  # fmt: skip
        called = "" if found and called in found[0] else called
        found.append(f"{called}{human_metric(name, run.metrics[name])} {_on(test_set)}")
    return found


def _on(test_set: str) -> str:
    return set_title(test_set) if test_set in ("id", "ood") else f"on the {set_noun(test_set)}"


def baseline(run: Contents, *, judged: bool = True) -> list[str]:
    """What predicting one class everywhere gives, as a sentence; none where a run that goes on does not tell.

    If ``judged``, a second sentence says whether the run's network is hardly better.
    """
    known = chance.constants([run.metrics], run.config.main, run.counted, run.confusion, run.classes)
    found = {name: known[name] for name in run.main if name in known}
    if not found:
        if run.summary is None or not run.main or (run.data is not None and not run.data.classes):
            return []
        why = "the records are private" if run.private else "the run folder does not tell how common each class is"
        return [f"What predicting one class everywhere gives is not known: {why}."]
    what = {
        "accuracy": "Predicting the commonest class everywhere gives",
        "dice": "Predicting one class for every pixel gives",
        "macro_auroc": "Scoring all images alike gives",
        "i2t_r1": "Picking at random gives",
    }.get(run.config.main, "Predicting the same everywhere gives")
    values = [f"{human_metric(name, value)} {_on(run.split(name)[0])}" for name, value in found.items()]
    poor = [name for name, value in found.items() if hardly_better(name, run.metrics[name], value, run.config)]
    verdict = ""
    if poor and judged:
        where = "" if len(poor) == len(found) else " " + listed([_on(run.split(name)[0]) for name in poor])
        verdict = f" The network is hardly better{where}."
    return [f"{what} {listed(values)}.{verdict}"]


def _worst(run: Contents) -> list[str]:
    assert run.summary is not None
    worst = run.summary.get("worst_client")
    if worst is not None:
        count = len(run.summary.get("client_metrics", {}))
        name = printable_name(run.client(str(worst["client"])), 60)
        value = human_metric(worst["metric"], worst["value"])
        return [f"The worst of {count} clients is {name}, with {figure_title(worst['metric'])} {value}."]
    if run.private:
        return ["The records are private: nothing is told of single clients."]
    if run.summary.get("client_metrics") or run.config.trained_clients < 2:
        return []
    return ["How the worst client fares is not known: the clients have no test sets of their own (--client-test)."]


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a probability, of which ``count`` of ``total`` (at least 1) tell."""
    normal = NormalDist().inv_cdf(0.975)
    middle = (2 * count + normal**2) / (2 * (total + normal**2))
    half = normal * math.sqrt(4 * count * (total - count) / total + normal**2) / (2 * (total + normal**2))
    return 0.0 if count == 0 else middle - half, 1.0 if count == total else middle + half


def _chance(run: Contents) -> list[str]:
    """How sure the figures are: the test set's size, and the number of seeds."""
    told = []
    intervals = []
    for name in run.main:
        test_set, figure = run.split(name)
        matrix = run.confusion.matrices.get(set_name(test_set)) if run.confusion is not None else None
        split = run.data.tests.get(test_set) if run.data is not None else None
        # A matrix over several networks counts every image several times.
        if figure != "accuracy" or matrix is None or split is None or int(matrix.sum()) != len(split):
            continue
        low, high = (100 * end for end in wilson(int(np.trace(matrix)), int(matrix.sum())))
        intervals.append(f"{low:.1f} to {high:.1f} % {_on(test_set)} ({len(split):,} samples)")
    if intervals:
        told.append(
            f"The number of test samples alone leaves {listed(intervals)}: 95 % intervals, which take samples as "
            "independent."
        )
    told.append("This is one run: how far another seed moves its figures is not known (compare --seeds 3 tells).")
    return told


def _tiles(run: Contents) -> list[tuple[str, str]]:
    found = []
    for name in run.main[:3]:
        test_set, figure = run.split(name)
        where = f", {set_title(test_set)}" if test_set else ""
        found.append((f"{figure_title(figure)}{where}", human_metric(name, run.metrics[name])))
    summary = run.summary
    if summary is not None and summary.get("worst_client"):
        worst = summary["worst_client"]
        found.append((f"worst client, {figure_title(worst['metric'])}", human_metric(worst["metric"], worst["value"])))
    sent, seconds = _sent(run), _seconds(run)
    if sent is not None:
        found.append(("sent, both directions", shown(sent, "B")))
    if seconds is not None:
        found.append(("time", human_time(seconds)))
    return found


# -- the sections ------------------------------------------------------------------------------------------------------


def _figures(run: Contents) -> Section:
    section = Section("figures", "Final figures", tables_first=True)
    if run.summary is None:
        return section
    over_clients: dict[str, dict[str, str]] = {}
    over = ("mean", "worst")
    rows: dict[str, dict[str, str]] = {}
    by_class = {name: table for name, table in run.summary.get("per_class", {}).items() if name != "validation"}
    for name, value in run.metrics.items():
        test_set, figure = run.split(name)
        if test_set == "validation" or (by_class and figure.startswith("dice_")):
            continue
        which, _, rest = figure.partition("_client_")
        if rest and which in over:
            over_clients.setdefault(rest, {})[which] = human_metric(name, value)
            continue
        rows.setdefault(figure, {})[test_set] = human_metric(name, value)
    present = dict.fromkeys(each for row in rows.values() for each in row)
    sets = sorted(present, key=_place)
    header = ["", *(set_title(each) if each else "test" for each in sets)]
    body = [[figure_title(figure), *(row.get(each, "") for each in sets)] for figure, row in rows.items()]
    section.tables.append(Table(header, body))
    if over_clients:
        body = [[figure_title(figure), *(row.get(each, "") for each in over)] for figure, row in over_clients.items()]
        section.tables.append(Table(["over the clients' own test sets", *over], body))
    kinds = {"recall": "Recall of every class", "dice": "Dice of every class", "auroc": "AUROC of every label"}
    for kind, title in kinds.items():
        shown = {name: table for name, table in by_class.items() if kind != "auroc" or not table.get("recall")}
        tables = {name: table[kind] for name, table in shown.items() if table.get(kind)}
        if not tables:
            continue
        classes = list(dict.fromkeys(each for table in tables.values() for each in table))
        values = {name: [table.get(each) for each in classes] for name, table in tables.items()}
        series = [Series(set_title(name), y=scaled(each, 100)) for name, each in values.items()]
        missing = sum(all(table.get(each) is None for table in tables.values()) for each in classes)
        note = f"{missing} of {len(classes)} classes have no sample in any test set." if missing else ""
        section.charts.append(
            bars(f"class-{kind}", title, classes, series, axis=short_title(kind), unit="%", note=note)
        )
    return section


def _curves(run: Contents) -> Section:
    section, main = Section("curves", "Curves"), run.config.main
    points, galleries = main_points(run.records, main, run.tests)
    losses: dict[str, Points] = {}
    for record in run.records:
        for name, value in record.items():
            test_set, figure = run.split(name)
            if figure == "loss" and isinstance(value, (int, float)) and (test_set or main in record):
                add_point(losses, test_set, record["round"], value)
        if (loss := _training_loss(record, main)) is not None:
            add_point(losses, "training", record["round"], loss)
    among = {name: f" (among {gallery:,.0f})" for name, gallery in galleries.items()}
    shown, lost = (
        [Series((set_title(each) or "test") + sizes.get(each, ""), *by_set[each], soft=each == "validation")
         for each in sorted(by_set, key=_place)]
        for by_set, sizes in ((points, among), (losses, {}))
    )  # fmt: skip
    lines = chance.constants(run.records, main, run.counted, run.confusion, run.classes)
    drawn = accuracy_curves(run.records, main, tests=run.tests, chance=lines, stacked=True)
    if drawn is not None:
        title = f"{figure_title(main)} on every test set"
        title = f"{title[0].upper()}{title[1:]}"
        section.charts.append(of_rounds("main", title, drawn, shown, unit=scale(main)[1]))
    if lost:
        section.charts.append(curves("loss", "Loss over the rounds", lost, axis="loss", zero=False))
    return section


def _training_loss(record: Mapping[str, Any], main: str) -> float | None:
    losses = [info["loss"] for info in record.get("clients", {}).values() if isinstance(info.get("loss"), float)]
    if losses:
        return sum(losses) / len(losses)
    loss = record.get("loss")
    # Beside a main figure it is the loss on the only test set.
    return float(loss) if isinstance(loss, (int, float)) and main not in record else None


def clients(run: Contents) -> Section:
    """Who the clients are: sizes, label distribution, figures and losses of each."""
    section = Section("clients", "Clients")
    if run.private:
        section.texts.append("The records are private: nothing is told of single clients.")
        return section
    statistics = run.statistics
    if statistics is not None:
        count = len(statistics.counts)
        if len(statistics.classes) > 1:
            low, high = int(statistics.sizes.min()), int(statistics.sizes.max())
            sizes = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            skewed = int(np.argmax(statistics.skew))
            text = (
                f"{count:,} clients with {sizes} "
                f"training samples of {len(statistics.classes)} classes. The mean skew is "
                f"{float(statistics.skew.mean()):.2f}; the most skewed is {run.client(str(skewed))} "
                f"({float(statistics.skew[skewed]):.2f}). Skew is the total variation distance from all clients' "
                "class shares: 0 is the same, 1 shares no class."
            )
            section.texts.append(text)
            some = statistics.spread(DRAWN)
            which = "every client" if len(some) == count else f"{len(some)} of {count:,} clients"
            note = "" if len(some) == count else "Clients evenly spaced by number of samples, the largest first."
            title = f"Label distribution of {which} ({parse_partition(statistics.partition).title})"
            names = [run.client(str(k)) for k in some]
            table = counts_table(statistics.counts[some], names, statistics.classes, row="client", column="class")
            drawn = svg(partition_picture(statistics), "labels")
            section.charts.append(Chart("labels", title, text, drawn, [table], note))
    elif run.no_data:
        section.texts.append(f"The label distribution is not shown, as the data cannot be read: {run.no_data}")
        if (picture := _picture(run.folder / pictures.PICTURES["partition"])) is not None:
            alt = "How many training samples of each class every client holds."
            section.pictures.append(Picture("Label distribution when the run ended", alt, picture))
    section.tables += _client_table(run)
    figures = (run.summary or {}).get("client_metrics") or {}
    main = run.config.main
    name = next((each for each in (main, "loss") if any(each in one for one in figures.values())), None)
    if name is not None and len(figures) > 1:
        own = run.summary is not None and run.summary.get("client_test_set") == "own"
        where = "its own test set" if own else "its part of the test set"
        factor, unit = scale(name)
        y = scaled((one.get(name) for one in figures.values()), factor)
        labels = [run.client(k) for k in figures]
        title = f"Final {figure_title(name)} of every client on {where}"
        falls, series = name == main and run.config.better == "min", [Series(name, y=y)]
        section.charts.append(
            bars("client-final", title, labels, series, axis=figure_title(name), unit=unit, falls=falls)
        )
    if (curve := clients_picture(run.records, main)) is not None:
        points = client_points(run.records, main)
        title = f"{figure_title(main)}: every client, their mean and the worst on their own test sets"
        series = [Series(which, *each) for which, each in points.items()]
        title = f"{title[:1].upper()}{title[1:]}"
        section.charts.append(of_rounds("client-rounds", title, curve, series, unit=scale(main)[1]))
    for key, title, axis in (
        ("loss", "Training loss of the clients", "training loss"),
        ("drift", "Length of the clients' updates", "norm of the update"),
    ):
        series, note = _of_clients(run, key)
        if series:
            zero = key != "loss"
            section.charts.append(curves(f"client-{key}", title, series, axis=axis, note=note, zero=zero))
    return section


def _client_table(run: Contents) -> list[Table]:
    """A row for every client: size, skew, figures, bytes."""
    columns: dict[str, Callable[[str], str]] = {}
    statistics, summary = run.statistics, run.summary or {}
    known: dict[str, Mapping[str, Any]] = {}
    for record in run.records:
        known.update(record.get("clients", {}))
    keys = [str(k) for k in range(run.config.trained_clients)]
    if statistics is not None:
        columns["training samples"] = lambda k: f"{int(statistics.sizes[int(k)]):,}"
        if statistics.own_tests:
            columns["own test samples"] = lambda k: f"{statistics.own_tests[int(k)]:,}"
        if len(statistics.classes) > 1:
            columns["skew"] = lambda k: f"{float(statistics.skew[int(k)]):.2f}"
    elif any("samples" in info for info in known.values()):
        columns["training samples"] = lambda k: shown(known.get(k, {}).get("samples"), "images")
    metrics = summary.get("client_metrics") or {}
    for name in (run.config.main, "loss"):
        if any(name in one for one in metrics.values()):

            def figure(k: str, name: str = name) -> str:
                value = metrics.get(k, {}).get(name)
                return "" if value is None else human_metric(name, value)

            columns[figure_title(name)] = figure
    sent = (summary.get("bytes") or {}).get("clients") or {}
    if sent:
        columns["sent up"] = lambda k: shown(sent.get(k, {}).get("up"), "B")
        columns["sent down"] = lambda k: shown(sent.get(k, {}).get("down"), "B")
    if not columns or not keys:
        return []
    rows = [[run.client(k), *(make(k) for make in columns.values())] for k in keys[:LISTED]]
    if statistics is not None and statistics.held_out is not None:
        name, count = statistics.held_out
        rows.append([f"{name} (held out, {count:,} samples)", *("" for _ in columns)])
    caption = "" if len(keys) <= LISTED else f"The first {LISTED} of {len(keys)} clients; evaluation.csv has all."
    return [Table(["client", *columns], rows, caption)]


def _of_clients(run: Contents, key: str) -> tuple[list[Series], str]:
    """A figure's curve for every client, or for many clients of the lowest, middle and highest one; and a note."""
    found: dict[str, Points] = {}
    spread: dict[str, Points] = {}
    for record in run.records:
        told = record.get("clients", {}).items()
        known = {k: info[key] for k, info in told if isinstance(info.get(key), (int, float))}
        for k, value in known.items():
            add_point(found, k, record["round"], value)
        if known:
            three = {"highest": max(known.values()), "middle": float(np.median([*known.values()]))}
            for called, value in {**three, "lowest": min(known.values())}.items():
                add_point(spread, called, record["round"], value)
    if len(found) <= NAMED:
        return [Series(run.client(k), *found[k]) for k in sorted(found, key=int)], ""
    note = f"{len(found)} clients: the highest, the middle and the lowest value of each round."
    return [Series(called, *points) for called, points in spread.items()], note


def _weights(run: Contents) -> Section:
    section = Section("weights", "Client weights")
    drawn = weights_picture(run.records, by_samples=run.config.options.get("weighting") == "samples")
    if drawn is not None:
        series = {PANELS[key]: _of_clients(run, key)[0] for key in PANELS}
        title = f"{' and '.join(name for name, each in series.items() if each)} of every client".capitalize()
        note = "Dotted lines are the weights at the beginning."
        chart = of_rounds("weight", title, drawn, series[PANELS["weight"]], note=note)
        tables = [rounds_table(each, "", caption) for caption, each in series.items() if each]
        section.charts.append(replace(chart, tables=tables))
    return section


def _cost(run: Contents) -> Section:
    section = Section("cost", "Bytes and time")
    ways = {"bytes_up": "to the server (up)", "bytes_down": "to the clients (down)"}
    series = []
    for key, name in ways.items():
        known = [(int(r["round"]), float(r[key])) for r in run.records if isinstance(r.get(key), (int, float))]
        if known:
            series.append(Series(name, [at for at, _ in known], [value for _, value in known]))
    if series:
        section.charts.append(curves("bytes", "Sent since the start", series, axis="sent", unit="B"))
    phases = _phases(run)
    if phases:
        names = sorted(phases, key=lambda name: -phases[name])
        seconds_by = Series("time", y=[phases[name] for name in names])
        note = "A name with a slash is a part of the phase before the slash." if any("/" in n for n in names) else ""
        section.charts.append(bars("phases", "Time by phase", names, [seconds_by], axis="time", unit="s", note=note))
        by_round = []
        parts = [(int(record["round"]), merged(record.get("phases", {}))) for record in run.records]
        for name in names[: len(COLOURS)]:
            known = [(at, each[name]) for at, each in parts if name in each]
            if known:
                by_round.append(Series(name, [at for at, _ in known], [value for _, value in known]))
        if by_round and len(run.records) > 1:
            title = "Time of every round by phase"
            section.charts.append(curves("phase-rounds", title, by_round, axis="time", unit="s"))
    rows = []
    if run.summary is not None:
        rows = [[*row] for row in sent_rows(run.summary["bytes"]).items()]
    if (seconds := _seconds(run)) is not None:
        rounds = max(_rounds(run), 1)
        rows += [["time", human_time(seconds)], ["time per round", human_time(seconds / rounds)]]
    if rows:
        section.tables.append(Table(["", "whole run"], rows))
    return section


def _confusion(run: Contents) -> Section:
    from fedkern.report.figures.confusion_sheet import draw, mistakes

    section = Section("confusion", "Confusion matrix")
    if run.confusion is None or len(run.confusion.classes) < 2:
        return section
    classes = list(run.confusion.classes)
    for number, (name, matrix) in enumerate(run.confusion.matrices.items()):
        if not matrix.sum():
            continue
        right, count = int(np.trace(matrix)), int(matrix.sum())
        wrong = mistakes(matrix, classes)
        text = f"{100 * right / count:.1f} % of {count:,} samples are right."
        text += f" Most frequent mistakes: {'; '.join(wrong)}." if wrong else ""
        title = f"Which class was taken for which, {set_title(name)}"
        table = counts_table(matrix.tolist(), classes, classes, row="true class", column="predicted class")
        drawn = svg(draw(replace(run.confusion, matrices={name: matrix})), f"confusion-{number}")
        section.charts.append(Chart(f"confusion-{number}", title, text, drawn, [table], text))
    return section


def _pictures(run: Contents, undrawn: Sequence[str]) -> Section:
    section = Section("pictures", "Pictures")
    section.texts += undrawn
    fixed = {
        "gradcam": ("Grad-CAM of the global network", "Test images, and where the network looks for its answer."),
        "segmentation": ("Segmentation of the global network",
                         "Test images with their true masks and the masks that the network finds."),
    }  # fmt: skip
    found = [(run.folder / pictures.PICTURES[name], *texts) for name, texts in fixed.items()]
    names = list(dict.fromkeys(entry.name for entry in run.shown))
    for name in names:
        called = name.replace("_", " ")
        images = next(entry for entry in run.shown if entry.name == name).value.dim() == 4
        alt = f"Images that the method logged as {called}, a row for every round kept." if images else (
            f"Tables that the method logged as {called}, as heat maps of several rounds."
        )  # fmt: skip
        title = f"{called[:1].upper()}{called[1:]}, as the method logged it"
        found.append((pictures.artifact_path(run.folder, name), title, alt))
    for path, title, alt in found:
        if run.summary is not None and (source := _picture(path)) is not None:
            section.pictures.append(Picture(title, alt, source))
    if run.summary is None and names:
        failed: dict[str, str] = {}
        section.pictures += _drawn_now(run, {path.name: (title, alt) for path, title, alt in found}, failed)
        section.texts += [f"{name} is missing, as it cannot be drawn: {why}." for name, why in failed.items()]
    return section


def _drawn_now(run: Contents, texts: Mapping[str, tuple[str, str]], failed: dict[str, str]) -> list[Picture]:
    """The artifacts of a run that is not finished, whose folder has no pictures yet."""
    classes = () if run.data is None else run.data.classes
    with tempfile.TemporaryDirectory() as folder:
        title = f"{run.config.method} on {run.config.data}"
        drawn = pictures.draw_artifacts(run.shown, Path(folder), title, classes, failed)
        return [Picture(*texts[path.name], html_page.data_uri(path.read_bytes())) for path in drawn]


def _retrieval(run: Contents, model: nn.Module | None, trusted: Collection[str]) -> Section:
    section = Section("retrieval", "Retrieval examples")
    try:
        found, text = retrieval_examples(run.folder, run.config, run.data, model=model, trusted=trusted)
        section.examples = examples(found)
    except UserError as error:
        text = f"No examples: {error}"
    section.texts.append(text)
    return section


_ANSWERS: Mapping[str, Callable[..., Section]] = {"retrieval": _retrieval}
"""Sections that show a run's answers themselves rather than a picture of them, by the picture's name."""


def _settings(run: Contents, command: str) -> Section:
    section = Section("settings", "Configuration and versions")
    config = run.config
    if in_memory(config):
        section.texts.append("Data, network or method of this run were in the memory of a Python program.")
    else:
        section.texts.append("The command that repeats this run:")
        by_file = f"python -m fedkern.run --config {shlex.quote(str(run.folder / 'config.toml'))}"
        section.code.append(command or by_file)
    rows: list[list[str]] = []
    for name, value in {**config.to_dict(), "device": stored_device(run.folder)}.items():
        if isinstance(value, Mapping):
            rows += [[f"{name}.{key}", _word(one)] for key, one in value.items()]
        else:
            rows.append([name, _word(value)])
    section.tables.append(Table(["setting", "value"], rows, "Every setting, as in config.toml", words=2))
    built = {**run.built, "this report": f"fedkern {versions()['fedkern']}"}
    section.tables.append(Table(["package", "version"], [[k, str(v)] for k, v in built.items()], "Versions", words=2))
    return section


# -- pieces ------------------------------------------------------------------------------------------------------------


def _place(test_set: str) -> int:
    """Place of a test set among others, known ones first."""
    return _SETS.index(test_set) if test_set in _SETS else len(_SETS)


def _rounds(run: Contents) -> int:
    if run.summary is not None:
        return int(run.summary["rounds"])
    return int(run.records[-1]["round"]) if run.records else 0


def _sent(run: Contents) -> float | None:
    if run.summary is not None:
        return float(run.summary["bytes"]["total"])
    last = run.records[-1] if run.records else {}
    return float(last["bytes_up"] + last["bytes_down"]) if "bytes_up" in last else None


def _seconds(run: Contents) -> float | None:
    if run.summary is not None:
        return float(run.summary["seconds"])
    return float(run.records[-1]["seconds"]) if run.records else None


def merged(phases: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase, where the numbered parts of a phase (``train/images 3``) are one."""
    found: dict[str, float] = {}
    for name, value in phases.items():
        plain = re.sub(r" \d+$", "", name)
        found[plain] = found.get(plain, 0.0) + float(value)
    return found


def _phases(run: Contents) -> dict[str, float]:
    if run.summary is not None:
        return merged(run.summary.get("phases") or {})
    found: dict[str, float] = {}
    for record in run.records:
        for name, value in merged(record.get("phases", {})).items():
            found[name] = found.get(name, 0.0) + value
    return found


def _word(value: Any) -> str:
    return printable_name(as_typed(value), 1000)


def _picture(path: Path) -> str | None:
    """A picture of the run folder as a data URI; None where there is none, or it is no PNG."""
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
    except OSError:
        return None
    return html_page.data_uri(content) if content.startswith(_PNG) and len(content) <= _LARGEST else None
