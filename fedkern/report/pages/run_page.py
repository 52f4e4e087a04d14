"""The report of a run folder as a page."""

import shlex
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedkern.data import DATASETS
from fedkern.data.sources.arrays import NAME as ARRAYS
from fedkern.engine.figures.diagnostics import hardly_better, telling_area
from fedkern.engine.figures.final_figures import set_name
from fedkern.errors import UserError, join_words, printable_name
from fedkern.files.filesystem import open_regular
from fedkern.listeners.events import Record
from fedkern.methods import method_registry
from fedkern.report import tables
from fedkern.report.figures import curves, pictures, plots
from fedkern.report.figures.curves import Curve, Panel, by_name
from fedkern.report.figures.plots import COLOURS, DRAWN, partition_picture
from fedkern.report.names import CELL, capitalize
from fedkern.report.pages import charts, html_page
from fedkern.report.pages.html_page import Block, Code, Page, Picture, make_section, versions_table
from fedkern.report.run_contents import Contents, read_run_folder, sum_phases
from fedkern.report.tables import human_metric
from fedkern.settings.config import RunConfig, flatten_table, stored_settings
from fedkern.tasks.figure_names import (
    OVER_CLIENTS,
    direction,
    figure_and_set,
    figure_title,
    scale,
    set_noun,
    set_title,
    short_title,
)
from fedkern.tasks.partition_statistics import PartitionStatistics
from fedkern.text_table import Table
from fedkern.typed_option import as_typed
from fedkern.usercode.named_code import INSTANCE

LISTED = 100
_LARGEST = 32 << 20
"""Bytes from which on a picture is left out."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PRIVATE = "The records are private: nothing is told of single clients."


def in_memory(config: RunConfig) -> bool:
    """Return whether data, network or method came from a Python program, so that no command repeats the run."""
    code = config.model.startswith(INSTANCE) or config.method.startswith(method_registry.CLASS)
    return code or config.data == ARRAYS or config.data not in DATASETS


def stored_device(run_dir: Path) -> str:
    """Return the device that a run was made with, which this machine may lack."""
    return str(stored_settings(run_dir).get("device", "cpu"))


def write_report(
    run_dir: Path,
    *,
    data: object = None,
    model: nn.Module | None = None,
    command: str = "",
    trusted: Collection[str] = (),
) -> Path:
    """Write ``report.html`` of a run, finished or not, into its folder, and return its path.

    Missing pictures of a finished run are drawn first, those of test samples only from in-memory ``data``. ``model`` is
    the run's network, if it was a module of a script, and ``command`` the command that repeats the run, may be empty.
    """
    html_page.check_target(run_dir)
    run = read_run_folder(run_dir, trusted=trusted)
    undrawn: list[str] = []
    if run.finished and not pictures.find_pictures(run_dir):
        try:
            samples = None if data is None else lambda: data
            pictures.draw_pictures(run, samples, model=model, trusted=trusted, warn=undrawn.append)
        except UserError as error:
            undrawn.append(f"The run's pictures could not be drawn: {str(error).rstrip('.')}.")
    return html_page.write_page(page(run, command=command, undrawn=undrawn), run_dir)


def page(run: Contents, *, command: str = "", undrawn: Sequence[str] = ()) -> Page:
    config, count, rounds = run.config, run.config.trained_clients, run.summary["rounds"]
    about = (
        f"seed {config.seed} · {count} client{'s' * (count != 1)} · {rounds} round{'s' * (rounds != 1)} · "
        f"{run.summary.get('model') or config.model} · {'finished' if run.finished else 'not finished'}"
    )
    return Page(
        title=printable_name(run.name, CELL),
        about=printable_name(about, CELL),
        headline=[*headline(run)],
        warnings=[*run.warnings.items()],
        tiles=[*_tiles(run)],
        sections=[
            make_section("figures", "Final figures", _figures(run)),
            make_section("curves", "Curves", _curves(run)),
            make_section("clients", "Clients", clients(run)),
            make_section("weights", "Client weights", _weights(run)),
            make_section("cost", "Bytes and time", _cost(run)),
            make_section("confusion", "Confusion matrix", _confusion(run)),
            make_section("pictures", "Pictures", _pictures(run, undrawn)),
            make_section("settings", "Configuration and versions", _settings(run, command)),
        ],
    )


# -- the headline ------------------------------------------------------------------------------------------------------


def headline(run: Contents) -> Iterator[str]:
    summary, rounds = run.summary, run.summary["rounds"]
    values = join_words(_values(run)) if run.main else ""
    if not run.finished:
        planned = "" if method_registry.get(run.config.method).one_shot else f" of {run.config.rounds}"
        yield f"This run is not finished: {rounds}{planned} rounds are done, so no figure is its result."
        if values:
            yield f"After round {summary['metrics']['round']} it has {values}."
    elif values:
        yield f"{printable_name(run.config.method, 60)} reaches {values} after {rounds} round{'s' * (rounds != 1)}."
    else:
        yield "The run has no main figure."
    if stopped := summary.get("stopped"):
        yield f"It ended before its {run.config.rounds} rounds were over: {stopped['reason']}."
    yield from describe_baseline(run)
    if not run.finished:
        python = f"fedkern.load({str(run.folder)!r}, ...).resume() in Python"
        command = f"python -m fedkern.run --resume {shlex.quote(str(run.folder))}"
        yield f"Go on with: {python if in_memory(run.config) else command}"
        return
    yield from _worst(run)
    yield from _certainty(run)
    if dropped := sum(bool(record.get("dropped")) for record in run.records):
        yield f"Clients were left out in {dropped} of {len(run.records)} rounds."
    if summary.get("privacy"):
        yield f"{capitalize(tables.describe_epsilon(summary['privacy']))}."


def _values(run: Contents) -> list[str]:
    """Return the main figures with their test sets: ``"an accuracy of 68.2 % out of distribution"``."""
    values: list[str] = []
    for name in run.main:
        test_set, figure = run.split(name)
        noun = {"accuracy": "an accuracy of ", "dice": "a Dice of ",
                  "i2t_r1": "a recall at 1 (image to text) of "}.get(figure, f"{figure_title(figure)} ")  # fmt: skip
        noun = "" if values and noun in values[0] else noun
        values.append(f"{noun}{human_metric(name, run.metrics[name])} {_on(test_set)}")
    return values


def _on(test_set: str) -> str:
    return set_title(test_set) if test_set in ("id", "ood") else f"on the {set_noun(test_set)}"


def describe_baseline(run: Contents, *, judged: bool = True) -> Iterator[str]:
    """Yield a sentence on the constant prediction and, if ``judged``, one on a network that is hardly better."""
    constants = run.chance([run.metrics])
    values = {name: constants[name] for name in run.main if name in constants}
    if not values:
        if run.finished and run.main and run.facts.classes:
            why = "the records are private" if run.private else "the run folder does not tell how common each class is"
            yield f"What predicting one class everywhere gives is not known: {why}."
        return
    prediction_words = {
        "accuracy": "Predicting the commonest class everywhere gives",
        "dice": "Predicting one class for every pixel gives",
        "macro_auroc": "Scoring all images alike gives",
        "i2t_r1": "Picking at random gives",
    }.get(run.config.main, "Predicting the same everywhere gives")
    texts = [f"{human_metric(name, value)} {_on(run.split(name)[0])}" for name, value in values.items()]
    figures = {name: run.split(name)[1] for name in values}
    near = [k for k, value in values.items() if hardly_better(figures[k], run.metrics[k], value, run.config)]
    areas = {name: telling_area(run.metrics, run.split(name)[0], run.config) for name in near if judged}
    poor, verdict = [name for name, area in areas.items() if not area], ""
    for name, area in areas.items():
        verdict += f" {area} {_on(run.split(name)[0])}: the network tells classes apart." if area else ""
    if poor:
        where = "" if len(poor) == len(values) else " " + join_words([_on(run.split(name)[0]) for name in poor])
        verdict += f" The network is hardly better{where}."
    yield f"{prediction_words} {join_words(texts)}.{verdict}"


def _worst(run: Contents) -> Iterator[str]:
    metrics = run.summary.get("client_metrics", {})
    if worst := run.summary.get("worst_client"):
        name = printable_name(run.client(str(worst["client"])), 60)
        value = human_metric(worst["metric"], worst["value"])
        yield f"The worst of {len(metrics)} clients is {name}, with {figure_title(worst['metric'])} {value}."
    elif run.private:
        yield _PRIVATE
    elif not metrics and run.config.trained_clients >= 2:
        yield "How the worst client fares is not known: the clients have no test sets of their own (--client-test)."


def _certainty(run: Contents) -> Iterator[str]:
    """Yield the uncertainty of the figures: the test set's size, and the number of seeds."""
    rows = {(row["set"], row["figure"]): row for row in run.summary.get("intervals", ()) if "client" not in row}
    texts, unit = [], "samples"
    for test_set, figure in map(run.split, run.main):
        row = rows.get((set_name(test_set), figure), {"low": None})
        if row["low"] is not None:
            (ends, counts), unit = tables.interval_texts(row), row["unit"]
            texts.append(f"{ends} {_on(test_set)} ({counts})")
    if texts:
        how = "take samples as independent" if unit == "samples" else f"draw {unit} anew, with all of their samples"
        yield f"The number of test {unit} alone leaves {join_words(texts)}: 95 % intervals, which {how}."
    yield "This is one run: how far another seed moves its figures is not known (compare --seeds 3 tells)."


def _tiles(run: Contents) -> Iterator[tuple[str, str]]:
    for name in run.main[:3]:
        yield figure_and_set(name, run.facts.tests), human_metric(name, run.metrics[name])
    if worst := run.summary.get("worst_client"):
        yield f"worst client, {figure_title(worst['metric'])}", human_metric(worst["metric"], worst["value"])
    if "total" in run.summary["bytes"]:
        yield "sent, both directions", tables.in_unit(run.summary["bytes"]["total"], "B")
    if "seconds" in run.summary:
        yield "time", tables.human_time(run.summary["seconds"])


# -- the sections ------------------------------------------------------------------------------------------------------


def _figures(run: Contents) -> Iterator[Block]:
    if not run.finished:
        return
    by_class = tables.class_figures(run.summary)
    metrics = {name: value for name, value in run.metrics.items() if not name.startswith(OVER_CLIENTS)}
    yield tables.figures_table("", metrics, run.facts.tests, run.config.main, by_name=bool(by_class))
    over_clients = dict.fromkeys(name.partition("_client_")[2] for name in run.metrics if name not in metrics)
    columns = [statistic for statistic in OVER_CLIENTS if any(name.startswith(statistic) for name in run.metrics)]
    rows = [[figure_title(name), *(human_metric(name, run.metrics[statistic + name]) for statistic in columns)]
            for name in over_clients]  # fmt: skip
    if rows:
        titles = [statistic.removesuffix("_client_").replace("_", " ") for statistic in columns]
        yield Table(["over the clients' own test sets", *titles], rows)
    yield from tables.intervals_tables(run.summary.get("intervals", ()), LISTED)
    for kind, by_set in by_class.items():
        classes = list(dict.fromkeys(class_name for table in by_set.values() for class_name in table))
        missing = sum(all(table.get(class_name) is None for table in by_set.values()) for class_name in classes)
        note = f"{missing} of {len(classes)} classes have no sample in any test set." if missing else ""
        series = {set_title(name): _scale_values(map(table.get, classes), 100) for name, table in by_set.items()}
        title = tables.class_title(kind)
        yield charts.bars(f"class-{kind}", title, classes, series, axis=short_title(kind), unit="%", note=note)


def _curves(run: Contents) -> Iterator[Block]:
    main = run.config.main
    if panels := curves.accuracy_panels(run.records, main, tests=run.facts.tests, chance=run.chance(run.records)):
        yield charts.curves("main", f"{figure_title(main)} on every test set", panels)
    # Beside a main figure of the same record the loss is that on the only test set.
    losses = by_name(
        (test_set, record["round"], value) for record in run.records for name, value in record.items()
        for test_set, figure in [run.split(name)] if figure == "loss" and (test_set or main in record)
    ) | by_name(("training", record["round"], _training_loss(record, main)) for record in run.records)  # fmt: skip
    if losses:
        panels = [Panel("loss", [*curves.set_curves(losses).values()], zero=False)]
        yield charts.curves("loss", "Loss", curves.over_clock(run.records, panels))


def _training_loss(record: Record, main: str) -> float | None:
    losses = [info["loss"] for info in record.get("clients", {}).values() if isinstance(info.get("loss"), float)]
    return sum(losses) / len(losses) if losses else None if main in record else record.get("loss")


def clients(run: Contents) -> Iterator[Block]:
    if run.private:
        yield _PRIVATE
        return
    main, statistics = run.config.main, run.facts.statistics
    if statistics is not None and len(statistics.classes) > 1:
        yield from _label_distribution(run, statistics)
    figures = run.summary.get("client_metrics") or {}
    name = next((key for key in (main, "loss") if any(key in table for table in figures.values())), None)
    if name is not None and len(figures) > 1:
        where = "its own test set" if run.summary.get("client_test_set") == "own" else "its part of the test set"
        factor, unit = scale(name)
        yield charts.bars(
            "client-final", f"Final {figure_title(name)} of every client on {where}", [*map(run.client, figures)],
            {name: _scale_values((table.get(name) for table in figures.values()), factor)}, axis=figure_title(name),
            unit=unit, falls=direction(name, {main: run.config.better}) == "min",
        )  # fmt: skip
    if panels := curves.client_panels(run.records, main):
        title = f"{figure_title(main)}: every client, their mean and the worst on their own test sets"
        yield charts.curves("client-rounds", title, panels)
    for key, title, axis in (
        ("loss", "Training loss of the clients", "training loss"),
        ("drift", "Length of the clients' updates", "norm of the update"),
    ):
        if drawn_curves := curves.client_curves(run.records, key):
            is_spread = {curve.name for curve in drawn_curves} == {*curves.SPREAD}
            note = "The highest, the middle and the lowest value of each round." if is_spread else ""
            panels = [Panel(axis, drawn_curves, zero=key != "loss")]
            yield charts.curves(f"client-{key}", title, curves.over_clock(run.records, panels), note=note)
    yield from _client_table(run)


def _label_distribution(run: Contents, statistics: PartitionStatistics) -> Iterator[Block]:
    count = len(statistics.counts)
    low, high = int(statistics.sizes.min()), int(statistics.sizes.max())
    skewed = int(np.argmax(statistics.skew))
    text = (
        f"{count:,} clients with {f'{low:,}' if low == high else f'{low:,} to {high:,}'} training samples of "
        f"{len(statistics.classes)} classes. The mean skew is {float(statistics.skew.mean()):.2f}; the most skewed is "
        f"{run.client(str(skewed))} ({float(statistics.skew[skewed]):.2f}). Skew is the total variation distance from "
        "all clients' class shares: 0 is the same, 1 shares no class."
    )
    yield text
    rows = statistics.spread(DRAWN)
    clients_words = "every client" if len(rows) == count else f"{len(rows)} of {count:,} clients"
    note = "" if len(rows) == count else "Clients evenly spaced by number of samples, the largest first."
    title = f"Label distribution of {clients_words} ({statistics.title})"
    names = [run.client(str(k)) for k in rows]
    counts = statistics.counts[rows].tolist()
    table = charts.counts_table(counts, names, statistics.classes, row="client", column="class")
    yield charts.chart("labels", title, text, partition_picture(statistics), [table], note)


def _client_table(run: Contents) -> Iterator[Block]:
    columns: dict[str, list[str]] = {}
    statistics, keys = run.facts.statistics, [str(k) for k in range(run.config.trained_clients)]
    latest: dict[str, Mapping[str, Any]] = {}
    for record in run.records:
        latest |= record.get("clients", {})
    if statistics is not None:
        columns["training samples"] = [f"{int(size):,}" for size in statistics.sizes]
        if statistics.own_tests:
            columns["own test samples"] = [f"{size:,}" for size in statistics.own_tests]
        if len(statistics.classes) > 1:
            columns["skew"] = [f"{float(skew):.2f}" for skew in statistics.skew]
    elif any("samples" in info for info in latest.values()):
        columns["training samples"] = [tables.in_unit(latest.get(k, {}).get("samples"), "images") for k in keys]
    metrics = run.summary.get("client_metrics") or {}
    for name in (run.config.main, "loss"):
        if any(name in table for table in metrics.values()):
            values = [metrics.get(k, {}).get(name) for k in keys]
            columns[figure_title(name)] = ["" if value is None else human_metric(name, value) for value in values]
    sent = run.summary["bytes"].get("clients") or {}
    for way in ("up", "down") if sent else ():
        columns[f"sent {way}"] = [tables.in_unit(sent.get(k, {}).get(way), "B") for k in keys]
    if not columns or not keys:
        return
    rows = [[*row] for row in zip(map(run.client, keys[:LISTED]), *columns.values(), strict=False)]
    if statistics is not None and statistics.held_out is not None:
        name, count = statistics.held_out
        rows.append([f"{name} (held out, {count:,} samples)", *("" for _ in columns)])
    caption = "" if len(keys) <= LISTED else f"The first {LISTED} of {len(keys)} clients; evaluation.csv has all."
    yield Table(["client", *columns], rows, caption)


def _weights(run: Contents) -> Iterator[Block]:
    if panels := curves.weight_panels(run.records, by_samples=run.config.options.get("weighting") == "samples"):
        title = f"{' and '.join(panel.axis for panel in panels)} of every client"
        yield charts.curves("weight", title, panels, note="Dotted lines are the weights at the beginning.")


def _cost(run: Contents) -> Iterator[Block]:
    ways = {"bytes_up": "to the server (up)", "bytes_down": "to the clients (down)"}
    sent = by_name((name, r["round"], r.get(key)) for key, name in ways.items() for r in run.records)
    if sent:
        panel = Panel("sent", [Curve(k, *v) for k, v in sent.items()], "B")
        yield charts.curves("bytes", "Sent since the start", [panel])
    if phases := sum_phases(run.summary.get("phases") or {}):
        names = sorted(phases, key=lambda name: -phases[name])
        note = "A name with a slash is a part of the phase before the slash." if any("/" in n for n in names) else ""
        seconds = {"time": [phases[name] for name in names]}
        yield charts.bars("phases", "Time by phase", names, seconds, axis="time", unit="s", note=note)
        parts = [(int(record["round"]), sum_phases(record.get("phases", {}))) for record in run.records]
        by_round = by_name((name, at, part.get(name)) for name in names[: len(COLOURS)] for at, part in parts)
        if by_round and len(run.records) > 1:
            panel = Panel("time", [Curve(name, *points) for name, points in by_round.items()], "s")
            yield charts.curves("phase-rounds", "Time of every round by phase", [panel])
    if rows := tables.cost_rows(run.summary):
        yield Table(["", "whole run"], [[*row] for row in rows.items()])


def _confusion(run: Contents) -> Iterator[Block]:
    if run.confusion is None or len(run.confusion.classes) < 2:
        return
    classes = list(run.confusion.classes)
    for number, (name, matrix) in enumerate(run.confusion.matrices.items()):
        if count := int(matrix.sum()):
            wrong = plots.list_mistakes(matrix, classes)
            text = f"{100 * int(np.trace(matrix)) / count:.1f} % of {count:,} samples are right."
            text += f" Most frequent mistakes: {'; '.join(wrong)}." if wrong else ""
            title = f"Which class was taken for which, {set_title(name)}"
            table = charts.counts_table(matrix.tolist(), classes, classes, row="true class", column="predicted class")
            figure = plots.draw_confusions(replace(run.confusion, matrices={name: matrix}))
            yield charts.chart(f"confusion-{number}", title, text, figure, [table], text)


def _pictures(run: Contents, undrawn: Sequence[str]) -> Iterator[Block]:
    yield from undrawn
    texts = {pictures.PICTURES[name]: text for name, text in {
        "gradcam": ("Grad-CAM of the global network", "Test images, and where the network looks for its answer."),
        "segmentation": ("Segmentation of the global network",
                         "Test images with their true masks and the masks that the network finds."),
        "retrieval": ("Retrieval examples",
                      "Test images and the captions that the network finds nearest; ✓ marks a caption of the image. "
                      "Where none is among the nearest, its place is told."),
    }.items()}  # fmt: skip
    for entry in {entry.name: entry for entry in run.artifacts}.values():
        text = entry.name.replace("_", " ")
        alt = f"Images that the method logged as {text}, a row for every round kept." if entry.value.dim() == 4 else (
            f"Tables that the method logged as {text}, as heat maps of several rounds."
        )  # fmt: skip
        title = f"{capitalize(text)}, as the method logged it"
        texts[pictures.artifact_path(run.folder, entry.name).name] = title, alt
    if run.finished:
        for name, (title, alt) in texts.items():
            yield from _picture(run.folder / name, title, alt)
        is_missing = not (run.folder / pictures.PICTURES["retrieval"]).exists()
        if "retrieval" in run.facts.pictures and not undrawn and is_missing:
            yield "There are no retrieval examples: they need a complete network with an image and a text encoder."
    elif run.artifacts:  # the folder has no pictures yet
        failed: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder:
            for path in pictures.draw_artifacts(run.artifacts, Path(folder), run.name, run.facts.classes, failed):
                yield from _picture(path, *texts[path.name])
        yield from (f"{name} is missing, as it cannot be drawn: {why}." for name, why in failed.items())


def _settings(run: Contents, command: str) -> Iterator[Block]:
    if in_memory(run.config):
        yield "Data, network or method of this run were in the memory of a Python program."
    else:
        yield "The command that repeats this run:"
        yield Code(command or f"python -m fedkern.run --config {shlex.quote(str(run.folder / 'config.toml'))}")
    settings = flatten_table({**run.config.to_dict(), "device": stored_device(run.folder)})
    rows = [[name, printable_name(as_typed(value), 1000)] for name, value in settings.items()]
    yield Table(["setting", "value"], rows, "Every setting, as in config.toml", words=2)
    yield versions_table([run.built])


# -- pieces ------------------------------------------------------------------------------------------------------------


def _scale_values(values: Iterable[float | None], factor: float) -> list[float | None]:
    return [None if value is None else factor * value for value in values]


def _picture(path: Path, title: str, alt: str) -> Iterator[Picture]:
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
    except OSError:
        return
    if content.startswith(_PNG) and len(content) <= _LARGEST:
        yield Picture(title, alt, html_page.data_uri(content))
