"""Readable numbers (bytes, durations, metrics) and tables, such as the closing table of a run."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedkern.engine.figures.intervals import LEAST, Row
from fedkern.errors import MESSAGE, printable_name
from fedkern.listeners.events import Summary
from fedkern.privacy.guarantee import EPSILON, PART
from fedkern.report.names import CELL, TICK, label
from fedkern.tasks.figure_names import RECALLS, TEST_SETS, figure_title, scale, set_title, short_title, split_metric
from fedkern.tasks.partition_statistics import SKEW, PartitionStatistics
from fedkern.text_table import Table

_ORDER = (
    "accuracy", "balanced_accuracy", "macro_auroc", "mean_average_precision", "macro_f1", "exact_match", "auroc",
    *RECALLS, "dice", "iou", "hd95", "confidence", "ece",
    "gradcam_in_object", "loss",
)  # fmt: skip
CLIENTS = 12
_OF_A_CLIENT = ("t2i_r1", "iou", "loss")
"""Figures of a client in the closing table, beside the main one. evaluation.csv has all."""


def human_bytes(count: float) -> str:
    """Format bytes in decimal units with three significant digits: 44695848 -> ``44.7 MB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        # From 999.5 on, a value would be printed with four digits.
        if abs(value) < 999.5 or unit == "PB":
            break
        value /= 1000
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{max(0, 2 - (len(str(int(abs(value)))) - 1))}f} {unit}"


def human_time(seconds: float) -> str:
    """Format seconds as ``0.42 s``, ``12.3 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds_left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds_left:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def in_unit(value: float | None, unit: str) -> str:
    """Format a value, None or a non-finite one as a dash.

    ``unit`` is ``"%"`` (one decimal), ``"B"``, ``"s"``, ``"images"`` (whole numbers), or ``""`` (three digits).
    """
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "%":
        return f"{value:.1f} %"
    if unit in ("B", "s"):
        return human_bytes(value) if unit == "B" else human_time(value)
    return f"{value:,.0f}" if unit == "images" else f"{value:.3g}"


def human_metric(name: str, value: float) -> str:
    """Format a metric: shares in per cent, bytes and operations with their unit, large integers in full."""
    figure, (factor, unit) = split_metric(name)[1], scale(name)
    if unit:
        return f"{factor * value:.1f} {unit}"
    if figure.endswith("_bytes"):
        return human_bytes(value)
    if figure.endswith("_mflops"):
        return f"{value:,.1f} MFLOP"
    return f"{value:,.0f}" if abs(value) >= 1000 and float(value).is_integer() else f"{value:.3g}"


def _rank(name: str, sets: Collection[str], main: str) -> tuple[int, int, str, int]:
    test_set, figure = split_metric(name, sets)
    # Numbered figures are sorted by number.
    stem, _, number = name.rpartition("_")
    plain, place = (stem, int(number)) if number.isdecimal() else (name, 0)
    column = TEST_SETS.index(test_set) if test_set in TEST_SETS else len(TEST_SETS)
    order = (main, *_ORDER)
    return (order.index(figure) if figure in order else len(order), column, plain, place)


def sort_metrics(metrics: Mapping[str, object], sets: Collection[str] = (), main: str = "") -> list[str]:
    """Return the names of numeric ``metrics``: the main figure first, in distribution before out of distribution."""
    names = (name for name, value in metrics.items() if isinstance(value, (int, float)))
    return sorted(names, key=lambda name: _rank(name, sets, main))


def describe_epsilon(private: Mapping[str, Any]) -> str:
    """Describe what a run's epsilon covers, so that nobody takes a partial epsilon for the whole release's.

    ``private`` is the entry ``privacy`` of summary.json, before the run only ``covers`` and ``leaves_uncovered``.
    """
    covers, leaves = (", ".join(private.get(name, ())) or "nothing" for name in ("covers", "leaves_uncovered"))
    name = PART if private.get("leaves_uncovered") else EPSILON
    value = private.get(name, ...)  # missing before the run
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    figure = f" {value:.3g} at delta {private['delta']:g}" if finite else ""
    if finite and "rounds" in private:
        figure += f" after {private['rounds']} round{'s' * (private['rounds'] != 1)}"
    if name == PART:
        return f"NO epsilon of the whole release: a partial epsilon{figure} covers {covers} alone, not {leaves}"
    if value is not ... and not finite:
        return "no finite epsilon: a release had no noise"
    releaser = "the server releases" if private.get("unit") == "client" else "clients release"
    return f"{name}{figure} covers everything that {releaser}: {covers}"


def figures_table(
    title: str, metrics: Mapping[str, float], sets: Collection[str], main: str, *, by_name: bool = False
) -> Table:
    """Return a row for each figure and a column for each test set, without the validation set.

    ``by_name`` leaves out the Dice of single classes, which a table of the classes has.
    """
    figures: dict[str, dict[str, str]] = {}
    for name in sort_metrics(metrics, sets, main):
        test_set, figure = split_metric(name, sets)
        if test_set != "validation" and not (by_name and figure.startswith("dice_")):
            figures.setdefault(figure, {})[test_set] = human_metric(name, metrics[name])
    present = {test_set for row in figures.values() for test_set in row}
    columns = [test_set for test_set in dict.fromkeys((*TEST_SETS, *sets)) if test_set in present] or [""]
    rows = [[figure_title(figure), *(row.get(test_set, "") for test_set in columns)] for figure, row in figures.items()]
    header = ["", *(set_title(test_set) or "test" for test_set in columns)]
    return Table(header, rows, title, bold=True, bare=columns == [""])


def final_table(summary: Summary, main: str) -> Table:
    """Return the closing table of a run: figures by test set, the ``main`` one first, then bytes and times.

    The validation set chooses settings, so its figures are no results and are not shown.
    """
    rounds = max(int(summary.get("rounds", 1)), 1)
    rounds_ = f"{rounds} round{'s' * (rounds > 1)}"
    title = printable_name(f"{summary['method']} on {summary['data']}, seed {summary['seed']}, {rounds_}", CELL)
    if summary.get("privacy"):
        title += f"\n{printable_name(describe_epsilon(summary['privacy']), MESSAGE)}"
    by_class = summary.get("per_class", {})
    by_name = any("dice" in class_table for class_table in by_class.values())
    table = figures_table(title, summary["metrics"], by_class, main, by_name=by_name)
    blank = [""] * (len(table.header) - 2)
    rows = [*table.rows, *([text, value, *blank] for text, value in cost_rows(summary).items())]
    return replace(table, rows=rows, breaks=[len(table.rows)])


def cost_rows(summary: Summary) -> dict[str, str]:
    """Return bytes and time of a ``summary.json`` by title. An unfinished run has no bytes by direction."""
    ways, sent = {"up": "sent to the server (up)", "down": "sent to the clients (down)"}, summary["bytes"]
    rows = {text: human_bytes(sent[way]) for way, text in ways.items() if way in sent}
    for way in ways:
        if sent.get(f"one_off_{way}"):
            rows[f"sent once, before training ({way})"] = human_bytes(sent[f"one_off_{way}"])
    if "seconds" in summary:
        rows["time per round"] = human_time(summary["seconds"] / max(summary.get("rounds", 1), 1))
        rows["time"] = human_time(summary["seconds"])
    return rows


ALL, LOWEST = 6, 3
"""Classes up to which a terminal shows all, and the number shown of more."""


def class_figures(summary: Summary) -> dict[str, dict[str, Mapping[str, float | None]]]:
    """Return recall, Dice or AUROC by kind, test set and class. A set with recall has no AUROC."""
    tables = {name: table for name, table in summary.get("per_class", {}).items() if name != "validation"}
    figures = {
        kind: {name: table[kind] for name, table in tables.items() if table.get(kind)}
        for kind in ("recall", "dice", "auroc")
    }
    figures["auroc"] = {name: table for name, table in figures["auroc"].items() if name not in figures["recall"]}
    return {kind: by_set for kind, by_set in figures.items() if by_set}


def class_title(kind: str) -> str:
    return f"{short_title(kind)} of every {'label' if kind == 'auroc' else 'class'}"


def class_table(summary: Summary) -> Table | None:
    """Return :func:`class_figures` of the first kind, of many classes those with the lowest figures.

    A note names classes of which a test set has no sample.
    """
    figure, tables = next(iter(class_figures(summary).items()), ("", {}))
    if not tables:
        return None
    names = list(dict.fromkeys(key for table in tables.values() for key in table))
    by_class = {key: [value for table in tables.values() if (value := table.get(key)) is not None] for key in names}
    rows = names
    if len(names) > ALL:
        rows = sorted((key for key in names if by_class[key]), key=lambda key: min(by_class[key]))[:LOWEST]
    labels, title = figure == "auroc", class_title(figure)
    if len(rows) < len(names):
        count_words = f"{len(names)} {'labels' if labels else 'classes'}"
        title = f"lowest {short_title(figure)} among {count_words} (all of them: per_class in summary.json)"
    gaps = []
    for name, table in tables.items():
        missing = [f'"{printable_name(key, TICK)}"' for key in names if table.get(key) is None]
        if missing:
            shown_names = ", ".join(missing[:LOWEST]) + (" ..." if len(missing) > LOWEST else "")
            only = "" if len(tables) == 1 else f" ({set_title(name)})"
            kind_words = "labels that all images have, or none" if labels else "classes without samples"
            gaps.append(f"means leave out {len(missing)} of {len(names)} {kind_words}{only}: {shown_names}")
    texts = []
    for key in rows:
        values = [table.get(key) for table in tables.values()]
        texts.append([label(key), *("none" if value is None else human_metric(figure, value) for value in values)])
    header = ["", *(label(set_title(name)) for name in tables)]
    return Table(header, texts, title, notes=["; ".join(gaps)] if gaps else [], bold=True, bare=len(tables) == 1)


def partition_table(statistics: PartitionStatistics, limit: int = CLIENTS) -> Table:
    row_words = "client and class" if statistics.classes else "client"
    header = statistics.header()
    # More than twelve classes do not fit a terminal.
    columns = len(header) - (len(statistics.classes) if len(statistics.classes) > 12 else 0)
    header, *rows = [[*map(label, row[:columns])] for row in (header, *statistics.rows(limit))]
    title = printable_name(f"training samples per {row_words} ({statistics.partition})", CELL)
    words = 2 if statistics.names is not None else 0
    return Table(header, rows, title, words=words, notes=[SKEW] if statistics.classes else [], breaks=[len(rows) - 1])


def own_tests_table(summary: Summary, main: str) -> Table:
    clients = summary["client_metrics"]
    own_sets = summary.get("client_test_set") == "own"
    title = "own test sets of the clients" if own_sets else "the clients' parts of the test set"
    has_names = any("name" in figures for figures in clients.values())
    columns = [name for name in (main, *_OF_A_CLIENT) if any(name in figures for figures in clients.values())]
    header, rows = ["client", *(["name"] if has_names else []), *map(figure_title, columns)], []
    for k in list(clients)[:CLIENTS]:
        figures = clients[k]
        cells = [human_metric(name, figures[name]) if figures.get(name) is not None else "" for name in columns]
        rows.append([k, *([label(figures.get("name", ""))] if has_names else []), *cells])
    more_notes = [f"... {len(clients) - CLIENTS} more"] if len(clients) > CLIENTS else []
    return Table(header, rows, title, words=2 if has_names else 0, notes=more_notes)


def interval_texts(row: Row) -> list[str]:
    unit = row["unit"]
    counts = {unit: row["units"], "samples": row["samples"]}
    ends = f"none: {'too few' if row['units'] < LEAST else 'equal'} {unit}"
    if row["low"] is not None:
        ends = " to ".join(human_metric(row["figure"], row[end]) for end in ("low", "high"))
    return [ends, ", ".join(f"{count:,} {noun if count != 1 else noun[:-1]}" for noun, count in counts.items())]


def intervals_tables(rows: Sequence[Row], limit: int = CLIENTS) -> list[Table]:
    """Return the table of intervals in a list, empty without any, test sets before clients."""
    texts = []
    for row in rows[:limit]:
        name, client = set_title(row["set"]), label(row.get("client", ""))
        place = client if client and row["set"] in ("own", "test") else f"{client} {name}".strip()
        texts.append([place, human_metric(row["figure"], row["value"]), *interval_texts(row)])
    notes = [f"... {len(rows) - limit} more: intervals in summary.json"] if len(rows) > limit else []
    return [Table(["", figure_title(row["figure"]), "95 % interval", "of"], texts, notes=notes) for row in rows[:1]]


def worst_client_line(summary: Summary) -> str:
    worst = summary.get("worst_client")
    if worst is None:
        return ""
    name = f" ({worst['name']})" if "name" in worst else ""
    metric = figure_title(worst["metric"])
    return f"worst client: {worst['client']}{name}, {metric} {human_metric(worst['metric'], worst['value'])}"


def attack_table(attack: Mapping[str, Any], name: str) -> Table:
    unit, groups = attack["independent"], (attack["member_groups"], attack["other_groups"])
    interval = f"none: too few {unit}s" if attack["low"] is None else f"{attack['low']:.3f} to {attack['high']:.3f}"
    rows = {
        "area under the ROC curve (0.5: members cannot be told)": f"{attack['auc']:.3f}",
        "its 95 % interval": interval,
        f"members found, {100 * attack['fpr']:.2g} % of the others taken for members": f"{100 * attack['tpr']:.1f} %",
        "its 95 % interval at that threshold": f"{100 * attack['tpr_low']:.1f} to {100 * attack['tpr_high']:.1f} %",
        "mean loss of the members": f"{attack['member_loss']:.3g}",
        "mean loss of others": f"{attack['other_loss']:.3g}",
        "members, others": f"{attack['members']}, {attack['others']}",
        f"taken as independent: {unit}s of members, of others": f"{groups[0]}, {groups[1]}",
    }
    if attack.get("left_out"):
        rows["images left out, without a known pixel"] = str(attack["left_out"])
    if attack.get("untrained"):
        rows["images left out, which the method kept from the training"] = str(attack["untrained"])
    title = printable_name(f"membership attack on {name}", CELL)
    return Table(["", ""], [[*row] for row in rows.items()], title, bold=True, bare=True)


def downstream_table(result: Mapping[str, Any]) -> Table:
    network_count = result["networks"]
    mean = f", mean over {network_count} networks" if network_count > 1 else ""
    columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
    header = [{"set": "test set", "auc": "AUC"}.get(name, figure_title(name)) for name in columns]
    rows = [[_cell(name, row.get(name, "")) for name in columns] for row in result["rows"]]
    title = printable_name(f"{result['task']}: {result['method']} on {result['data']}{mean}", CELL)
    return Table(header, rows, title)


def _cell(name: str, value: object) -> str:
    if isinstance(value, float):
        return human_metric(name, value)
    return set_title(str(value)) if name == "set" else str(value)
