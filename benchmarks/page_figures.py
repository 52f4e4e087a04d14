"""Figures of the methods' pages, and the result file of each of them (`benchmarks.pages`)."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks import artefact, bench_methods, charts, comparisons, gpu_figures, method_gains, sources
from benchmarks.comparisons import read_results
from benchmarks.page import Page, by_seed, decimal, load, read_rows, spread, table
from benchmarks.report import left_out, our_time, present, ratio
from benchmarks.shown import nodes
from benchmarks.studies.page_commands import COMMANDS
from fedkern.comparison.seed_statistics import compare_pairs, interval_text
from fedkern.comparison.verdicts import NOT_PLAYED
from fedkern.methods import METHODS
from fedkern.report.tables import human_metric
from fedkern.settings.config import RunConfig

Lines = Sequence[str]
SPECIFIED = {"fedgid": 5, "fusefl": 5, "fedlpfm": 5, "fediod": 8, "feddra": 8}
"""The number of the section of options on each specification."""


def figures(study: str, cell: str, figure: str = "accuracy") -> list[float]:
    """Return a figure of a cell's runs, one per seed."""
    return [run["metrics"][figure] for run in read_rows(study)[cell]["runs"].values()]


def percent(values: float | Sequence[float], digits: int = 1) -> str:
    """Return fractions in per cent: one alone, several as mean ± standard deviation."""
    return spread([values] if isinstance(values, int | float) else values, 100.0, digits)


def nats(values: float | Sequence[float]) -> str:
    """Return losses, or other values that are no fractions, with two digits."""
    return spread([values] if isinstance(values, int | float) else values, 1.0, 2)


def points(difference: float, digits: int = 1) -> str:
    """Return a difference of fractions in points, without a sign if rounded to nothing."""
    return decimal(100 * difference, digits)


def megabytes(count: float, digits: int = 3) -> str:
    """Return bytes in MB."""
    return f"{count / 1e6:.{digits}f}"


def gap_share(row: Mapping[str, Any], start: Mapping[str, Any], goal: Mapping[str, Any]) -> str:
    """Return the share of the gap between ``start`` and ``goal`` that a row closes, over the seeds of all three.

    Empty where the gap's own 95 % interval, paired by seed, holds 0.
    """
    values = [by_seed(cell) for cell in (row, start, goal)]
    shared = set.intersection(*(set(cell) for cell in values))
    gap = compare_pairs(*({seed: cell[seed] for seed in shared} for cell in (values[2], values[1])))
    if gap is None or gap.low is None or gap.low <= 0:
        return ""
    own, low, high = (mean(cell[seed] for seed in sorted(shared)) for cell in values)
    return f"{100 * (own - low) / (high - low):.0f} %".replace("-", "−")


def list_cells(paper: str, *tables: str, goal: str = "", rates: bool = False) -> Lines:
    """Return the cells of a paper's tables as ``reproduce --json`` gave them: fractions in per cent, intervals of 95 %.

    ``goal`` names a cell of another table.  Rows then say what share of the gap from their baseline to it they close.
    ``rates``: add learning rates, and where they were chosen.
    """
    by_name = read_rows(paper)
    shown, rows = [row for row in by_name.values() if row["table"] in tables or row["name"] == goal], []
    for row in shown:
        seeds = [*by_seed(row).values()]
        name, baseline = without_table(row), without_table(row, "baseline")
        gap = "" if row["gap"] is None else f"{interval(row, 'gap', points)} to {baseline}"
        share = [gap_share(row, by_name[row["baseline"]], by_name[goal]) if row["baseline"] else ""] if goal else []
        cells_of_row = [percent(mean(seeds)) if seeds else NOT_PLAYED, ", ".join(map(percent, seeds)), gap, *share]
        rows.append([name, *cells_of_row, *([rate(row)] if rates else [])])
    header = [", ".join(tables), "mean", "seeds", "difference, paired by seed", *(["share of the gap"] if goal else []),
              *(["learning rate, chosen"] if rates else [])]  # fmt: skip
    return [*table(header, rows).split("\n"), *commits_of(paper, shown)]


def without_table(row: Mapping[str, Any], key: str = "name") -> str:
    """Return a cell's name without its table's at the beginning. Ensembles have the prefix of their students."""
    return row[key].removeprefix(f"{row['table'].removesuffix(' ensembles')}: ")


def rate(row: Mapping[str, Any]) -> str:
    """Return the learning rate of a row, and the study that chose it."""
    if chosen := chosen_rate(row):
        return f"{chosen}, here"
    return f"{row['command'].rpartition('--lr ')[2]}, in the older study at a tie of 0.5"


def commits_of(paper: str, rows: Sequence[Mapping[str, Any]]) -> Lines:
    """Return the commits and days of rows, below a blank line, or nothing where no row is played."""
    lines = [figure.made for row in rows if by_seed(row) and (figure := method_gains.read_sample(paper, row["name"]))]
    return ["", f"Commit and day: {'; '.join(dict.fromkeys(lines))}."] if lines else []


def verdicts(paper: str, *tables: str) -> Lines:
    """Return the table of published figures, ours, and the verdicts, of what was played of these tables or of all."""
    rows = []
    for row in read_rows(paper).values():
        if row["verdict"] == NOT_PLAYED or (tables and row["table"] not in tables):
            continue
        as_text = "{:,.0f}".format if row["figure"] == "rounds" else partial(human_metric, row["figure"])
        verdict = ": ".join(filter(None, (row["verdict"], row["detail"])))
        published = "" if row["published"] is None else as_text(row["published"])
        rows.append([row["name"], published, interval(row, "ours", as_text), row.get("swept") or "", verdict])
    return table(["cell", "published", "ours", "swept, first seed", "verdict"], rows).split("\n")


def command(method: str, digits: int = 1, scale: float = 100.0, unit: str = "%") -> Lines:
    """Return the page's command, its result, and how long it took."""
    text = COMMANDS[method].text()
    row = load("page_commands").get(method, {})
    lines = ["```bash", _wrap(text), "```"]
    if row.get("command") != text:
        return lines  # not run in these words
    gave = f"It gave {scale * row['figure']:.{digits}f} {unit}"
    if (seconds := row.get("processor_seconds")) is not None:
        gave += f" in {seconds / 60:.0f} minutes of one core" if seconds >= 90 else f" in {seconds:.0f} s of one core"
    return [*lines, "", f"{gave}."]


def _wrap(text: str, width: int = 112) -> str:
    lines = [""]
    for word in text.replace(" --", "\n--").split("\n"):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + word
    return " \\\n".join(lines)


def tables_side_by_side(study: str, *tables: str, forms: Sequence[Callable[[float], str]] = (percent, points)) -> Lines:
    """Return methods with means, differences to their baselines, with intervals, of several tables of a study."""
    rows_by_name: dict[str, dict[str, list[str]]] = {}
    shown = [row for row in read_rows(study).values() if row["table"] in tables]
    for row in shown:
        cells = rows_by_name.setdefault(without_table(row), {})
        cells[row["table"]] = [interval(row, "ours", forms[0]) or NOT_PLAYED, interval(row, "gap", forms[1])]
    heads = [text for name in tables for text in (name, "difference, paired by seed")]
    rows = [
        [name, *(text for part in tables for text in cells.get(part, ["", ""]))] for name, cells in rows_by_name.items()
    ]
    text = table(["method", *heads], rows)
    return [*text.split("\n"), *commits_of(study, shown)]


# -- FedGID ------------------------------------------------------------------------------------------------------------

GID_GAPS = {"strongly tied colours": "ColorMNIST 0.8", "weakly tied colours": "ColorMNIST 0.5", "slides": "slides 0.8"}


# -- FuseFL ------------------------------------------------------------------------------------------------------------

ALPHAS = ("0.1", "0.3", "0.5")


def fuse(cell: str, figure: str = "accuracy") -> list[str]:
    """Return a figure of FuseFL's older table at every heterogeneity, in per cent."""
    return [percent(figures("fusefl_calibration", f"Dirichlet {a}: {cell}", figure)) for a in ALPHAS]


def fuse_table() -> Lines:
    def traffic(cell: str, ways: Sequence[str] = ("bytes_up", "bytes_down"), parts: int = 5) -> list[str]:
        return [megabytes(figures("fusefl_calibration", f"Dirichlet 0.1: {cell}", way)[0] / parts) for way in ways]

    one_shot, ensemble, calibrated = "one-shot FedAvg", "ensemble", "ensemble calibrated"
    sent = traffic(ensemble)
    rows = [
        [one_shot, *fuse(one_shot), "1×", *traffic(one_shot)],
        [f"{one_shot}, calibrated", *fuse(f"{one_shot} calibrated"), "1×", *traffic(f"{one_shot} calibrated")],
        ["ensemble of five, mean logits", *fuse(ensemble), "5×", *sent],
        ["ensemble of five, vote", *fuse(calibrated, "vote_accuracy"), "5×", *sent],
        ["ensemble of five, mean probability", *fuse(calibrated, "probability_accuracy"), "5×", *sent],
        ["ensemble of five, calibrated", *fuse(calibrated), "5×", *traffic(calibrated)],
        ["FuseFL, before calibration", *fuse("FuseFL", "uncalibrated_accuracy"), "1×",
         *traffic("FuseFL", ("levels_up_bytes", "levels_down_bytes"), parts=1)],
        ["FuseFL", *fuse("FuseFL"), "1×", *traffic("FuseFL")],
        ["FedAvg, 8 rounds", *fuse("FedAvg in 8 rounds"), "1×", *traffic("FedAvg in 8 rounds")],
    ]  # fmt: skip
    return table(["method", *(f"Dirichlet {a}" for a in ALPHAS), "model", "MB up", "MB down"], rows).split("\n")


# -- Fed-LPFM ----------------------------------------------------------------------------------------------------------

SPLITS = {"two classes a client": "two classes", "Dirichlet 0.1": "Dirichlet"}


def lpfm_table() -> Lines:
    def row(label: str, cell: str, figure: str = "accuracy") -> list[str]:
        return [label, *(percent(figures("fedlpfm_changes", f"{split}: {cell}", figure)) for split in SPLITS.values())]

    def gain(split: str) -> str:
        values = (figures("fedlpfm_changes", f"{split}: {name}") for name in ("Fed-LPFM", "FedAvg"))
        gap = compare_pairs(*(dict(enumerate(of_seeds)) for of_seeds in values))
        return interval_text(gap.mean, gap.low, gap.high, points).replace("-", "−") if gap else ""

    rows = [
        *(row(name, name) for name in ("FedAvg", "FedProx", "FML", "Fed-LPFM")),
        ["Fed-LPFM minus FedAvg, paired", *map(gain, SPLITS.values())],
        row("the same network on the public images alone", "Fed-LPFM", "public_proxy_accuracy"),
        row("the teacher", "Fed-LPFM", "teacher_accuracy"),
        row("local training only, one seed", "local"),
        row("centralised, one seed", "centralised"),
    ]
    return table(["method", *SPLITS], rows).split("\n")


def interval(row: Mapping[str, Any], key: str, form: Callable[[float], str]) -> str:
    """Return a value of a row with its interval, or nothing where the value is missing."""
    if row[key] is None:
        return ""
    return interval_text(row[key], row[f"{key}_low"], row[f"{key}_high"], form).replace("-", "−")


def lpfm_inference() -> Lines:
    rows = [
        [name, f"{cost['side']}", f"{cost['parameters']:,}", f"{cost['flops'] / 1e6:,.1f}"]
        for name, cost in load("inference_cost")["networks"].items()
    ]
    header = ["network at inference", "pixels a side", "parameters", "million operations an image"]
    return table(header, rows).split("\n")


def lpfm_stored() -> Lines:
    """Return disk and error by the number of stored classes."""
    content = load("stored_teachers")
    rows = [
        ["all, in fp32" if kept == "0" else kept, f"{row['bytes']:.0f}", *(f"{x:.4f}" for x in row["apart"])]
        for kept, row in content["kept"].items()
    ]
    header = ["stored classes", "bytes an image on disk", *(f"error at T={t:g}" for t in content["temperatures"])]
    return table(header, rows).split("\n")


# -- FedIOD ------------------------------------------------------------------------------------------------------------


EPSILONS = ("10", "5", "2")
TEACHERS = ("accuracy", "mean_teacher", "ensemble_uniform")


def iod_privacy() -> Lines:
    kinds = {
        "nothing covered": ("nothing", "∞"),
        **{f"discriminators: epsilon {e}.0": ("gradients through the discriminators alone", e) for e in EPSILONS},
        **{f"everything: epsilon {e}.0": ("those, and the teachers (DP-SGD)", e) for e in EPSILONS},
    }
    rows = []
    for name, words in kinds.items():
        run = read_rows("fediod_privacy")[name]["runs"]["0"]
        m, attack = run["metrics"], next(iter(run.get("after", {}).values()), None)
        accuracies = [percent(m[name]) if name in m else "–" for name in TEACHERS]
        area = "" if attack is None else f"{attack['auc']:.3f} ({attack['low']:.3f}–{attack['high']:.3f})"
        spread_of_images = f"{m['image_spread']:.2f}" if "image_spread" in m else "–"  # private records tell less
        rows.append([*words, *accuracies, spread_of_images, area])
    header = ["covered", "epsilon", "student", "mean teacher", "teachers' ensemble", "spread of the images",
              "attack on the student: AUC (95 %)"]  # fmt: skip
    return table(header, rows).split("\n")


IOD_CHANGES = {
    "defaults": "FedIOD", "`w_real=0`": "without realism", "`w_balance=0`": "without the balance term",
    "`class_weights=uniform`": "without importance weights", "`disc_weight=true`": "with discriminators' weights",
    "`critic_layers=2`": "discriminators of 10 x 10 pixels", "`warmup=0`": "without the warm-up",
    "`mode=public`": "outputs on public images",
    "the paper's `w_real=1`, `w_balance=0`, `critic_layers=2`, `disc_weight=true`, `warmup=0`": "the paper's preset",
    "gone: no clarity": "without clarity", "gone: no diversity": "without diversity",
    "gone: diversity minimised": "diversity minimised (the code's sign)",
    "gone: mutual information as diversity": "diversity: mutual information",
    "gone: an adversarial term": "with the adversarial term", "gone: mean of logits": "teachers mixed as logits",
    "gone: mean of probabilities": "teachers mixed as probabilities",
    "gone: average of the generator": "average of the generator",
}  # fmt: skip
"""Rows of the study of FedIOD's terms, by the options that were changed."""


def iod_options() -> Lines:
    terms = ((text, load("fediod_mnist_terms")[name]) for text, name in IOD_CHANGES.items())
    rows = [[text, percent(term["accuracy"]), percent(term["ensemble_weighted"])] for text, term in terms]
    return table(["changed", "student", "its ensemble"], rows).split("\n")


# -- operators ---------------------------------------------------------------------------------------------------------

MACHINE, OTHER_MACHINE = "intel-xeon", "amd-epyc"


def operators(machine: str, marked: str = "", *, folder: Path = comparisons.RESULTS) -> Lines:
    """Return the operators' table: rows of shown.py recorded with the present kernels on a machine (others marked).

    Below those of a test stand its other rows, of one thread, in which an alternative is faster.  Where no such row has
    been measured with the present kernels, the row of earlier ones stays, marked.
    """
    shown = [(node, case) for node, case, _ in nodes()]
    named = {node for node, _ in shown}
    cores = sources.hashes(sources.CSRC)
    rows = [
        (row, mark)
        for name, mark in ((marked, " †"), (machine, ""))
        for files in read_results(folder).values()
        for recorded in files
        if name and name in recorded.name
        for row in recorded.rows
    ]
    present_rows = {row.test: (row, mark) for row, mark in rows if present(row, cores)}
    behind = {
        row.test: (row, mark if row.test in present_rows else f"{mark} ‡")
        for row, mark in rows
        if row.threads == 1
        and row.group != "overhead"  # beside a call of PyTorch's that does something else
        and row.test not in named
        and min(row.speedup.values(), default=1.0) < 1
        and (present(row, cores) or row.test not in present_rows)
    }
    lines: list[list[str]] = []
    operator, above, count = "", "", 0
    for i, (node, case) in enumerate(shown):
        operator, test = case.operator or operator, node.partition("[")[0]
        picked = [(case.size, *present_rows[node])] if node in present_rows else []
        count += len(picked)
        if not any(later.startswith(f"{test}[") for later, _ in shown[i + 1 :]):
            picked += [(row.case, row, mark) for row, mark in behind.values() if row.test.startswith(f"{test}[")]
        for size, row, mark in picked:
            compiled = [name for name in row.speedup if name.startswith("compile")]
            rivals = [name for name in row.speedup if name not in (case.against, *compiled)]
            best = min(rivals, key=lambda name: row.speedup[name], default="")
            lines.append([
                operator if operator != above else "", size, str(row.threads), our_time(row) + mark,
                ratio(row, case.against), ratio(row, compiled[0]) if compiled else "",
                f"{ratio(row, best)} {best}" if best else "",
            ])  # fmt: skip
            above = operator
    told_left = left_out(len(shown) - count)[:1]
    if not lines:
        return told_left
    header = ["operator", "size", "threads", "time", "times as fast as PyTorch", "times as fast as `torch.compile`",
              "times as fast as the best other"]  # fmt: skip
    return [*table(header, lines).split("\n"), *(["", *told_left] if told_left else [])]


# -- what a user waits for ---------------------------------------------------------------------------------------------

RUNS, MANY_CLIENTS = f"methods_{OTHER_MACHINE}", f"many_clients_{OTHER_MACHINE}"


def caption(machine: Mapping[str, Any]) -> Lines:
    """Return when, where and of which commit a table was measured, and a blank line."""
    return [f"{comparisons.name_machine(machine)}, {comparisons.name_date(machine)}", ""]


def mark_undated(make: Callable[[], Lines]) -> Lines:
    """Return the table of a study, below a line that says what its results do not."""
    return ["Date and commit of the studies: unrecorded.", "", *make()]


def make_run_row(row: bench_methods.Row) -> dict[str, str]:
    """Return a whole run's seconds, and the shares of kernels, processes and start-up in its lead, by column."""
    plain, ours, one_core = bench_methods.PLAIN, bench_methods.OURS, bench_methods.ONE_CORE
    usual = RunConfig.make(row.method)
    lengths = (f"{n} of {getattr(usual, name)} {name.replace('_', ' ')}" for name, n in row.settings.items())

    def seconds(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f} s"

    def times(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}×"

    return {
        "run": f"`{row.method}`",
        "of the default": ", ".join(lengths),
        "plain PyTorch": seconds(median(row.seconds[plain])),
        "fedkern": seconds(median(row.seconds[ours])),
        TIMES: times(row.speedup(plain)),
        f"{TIMES}, processor seconds": times(row.speedup(plain, of="cpu_seconds")),
        f"{TIMES}, one core": times(row.speedup(one_core[plain], one_core[ours])),
        "times as fast as the operators' references": times(row.speedup("reference")),
        "times as fast as in one process": times(row.speedup(one_core[ours])),
        "outside of rounds: plain PyTorch": seconds(row.outside_seconds(plain)),
        "outside of rounds: fedkern": seconds(row.outside_seconds(ours)),
        "ends at: plain PyTorch": f"{percent(row.figure[plain])} %",
        "ends at: fedkern": f"{percent(row.figure[ours])} %",
    }


TIMES = "times as fast as plain PyTorch"


def whole_runs() -> Lines:
    """Return the table of default runs, and the rows that end at other accuracies."""
    content = load(RUNS, comparisons.RESULTS)
    runs = [bench_methods.Row(**row) for row in content["cases"] if row["setting"] == "default"]
    rows = [make_run_row(row) for row in runs]
    unequal = [
        f"{cells['run']} compares runs that end at different accuracies: {cells['ends at: plain PyTorch']} in plain "
        f"PyTorch, {cells['ends at: fedkern']} in fedkern."
        for row, cells in zip(runs, rows, strict=True)
        if abs(mean(row.figure[bench_methods.PLAIN]) - mean(row.figure[bench_methods.OURS]))
        > 2 * stdev(row.figure[bench_methods.OURS])
    ]
    header = [name for name in rows[0] if any(row[name] != "–" for row in rows)]  # some variants may be missing
    lines = table(header, [[row[name] for name in header] for row in rows]).split("\n")
    return [*caption(content["machine"]), *(line for text in unequal for line in (text, "")), *lines]


PROGRAMS_OF_ROUNDS = {
    "fedkern serial": "fedkern, one process", "fedkern auto": "fedkern, two workers", "lean loop": "lean loop",
    "fluke": "fluke", "pfl": "pfl", "FedLab": "FedLab", "Flower": "Flower, two processes",
    "BlazeFL": "BlazeFL, two processes",
}  # fmt: skip
"""Names in the table of rounds; who trains in one process has a thread for every core."""
GUESTS = f"guest-{OTHER_MACHINE}-2"


def rounds_of_fedavg(machine: str) -> Lines:
    """Return milliseconds a round of FedAvg in every program, and how many times as fast fedkern's best is."""
    (recorded,) = (file for file in read_results(comparisons.RESULTS)["rounds"] if file.name.endswith(machine))
    played = [name for name in PROGRAMS_OF_ROUNDS if any(name in row.seconds for row in recorded.rows)]
    lines = []
    for row in sorted(recorded.rows, key=lambda row: row.threads):
        times = (row.speedup.get(name) for name in played)
        against = (f" ({gain:.2f}×)" if gain is not None else "" for gain in times)
        milliseconds = (f"{1e3 * row.seconds[name]:.0f}" if name in row.seconds else "–" for name in played)
        cells = (ms + gain for ms, gain in zip(milliseconds, against, strict=True))
        lines.append([row.case, str(row.threads), *cells])
    header = ["milliseconds a round (fedkern: times as fast)", "cores", *(PROGRAMS_OF_ROUNDS[name] for name in played)]
    return [*caption(recorded.machine), *table(header, lines).split("\n")]


def rounds_on_datasets(machine: str) -> Lines:
    """Return milliseconds a round of FedAvg on Datasets, ours and the other program's."""
    (recorded,) = (file for file in read_results(comparisons.RESULTS)["datasets"] if file.name.endswith(machine))
    lines = []
    for row in recorded.rows:
        ((rival, gain),) = row.speedup.items()
        times = (f"{1e3 * row.seconds[name]:.0f}" for name in (row.ours, rival))
        lines.append([row.case, *times, rival, f"{gain:.2f}×"])
    header = ["milliseconds a round", "fedkern", "other", "the other is", "fedkern: times as fast as the other"]
    return [*caption(recorded.machine), *table(header, lines).split("\n")]


def speed_in_short() -> Lines:
    """Return the least and the most that default runs gain over plain PyTorch, as a sentence."""
    cases = load(RUNS, comparisons.RESULTS)["cases"]
    gains = [bench_methods.Row(**row).speedup(bench_methods.PLAIN) or 0 for row in cases if row["setting"] == "default"]
    return [f"On two CPU cores, fedkern's default runs are {min(gains):.1f} to {max(gains):.1f} times as fast as the "
            "same methods in plain PyTorch. On one core they gain more."]  # fmt: skip


def networks_of_your_own() -> Lines:
    """Return how many times as fast as in PyTorch accelerated training steps of networks are, on one thread."""
    recorded = next(file for file in read_results(comparisons.RESULTS)["guest"] if file.name == GUESTS)
    ways = {"eager PyTorch": "eager", "in `channels_last`": "channels_last", "under `torch.compile`": "compile"}
    cases = {row.case.rpartition(", B=")[0]: row for row in recorded.rows}  # the last row of a network is of 32
    rows = [[name, *(ratio(row, way) for way in ways.values())] for name, row in cases.items()]
    header = [f"`accelerate`: times as fast as {text}" for text in ways]
    return [*caption(recorded.machine), *table(["network, batches of 32", *header], rows).split("\n")]


def ten_thousand_clients() -> Lines:
    """Return the runs with many clients: the cost of a round over the rounds."""
    content, rows = load(MANY_CLIENTS, comparisons.RESULTS), []
    for method, run in content["runs"].items():
        for row in run["rounds"]:
            memory, written, folder = (row[f"{name}_bytes"] / 1e6 for name in ("resident", "written", "folder"))
            cells = [f"{row['round']:,}", f"{1000 * row['cpu_seconds']:.0f} ms", f"{memory:.0f} MB"]
            rows.append([f"`{method}`", *cells, f"{written:.2f} MB", f"{row['files']:,}", f"{folder:.0f} MB"])
    names = ["run", "after round", "processor time of a round", "memory", "written in a round", "files", "run folder"]
    return [*caption(content["machine"]), *table(names, rows).split("\n")]


# -- Flower ------------------------------------------------------------------------------------------------------------

FLOWER, MESSAGES = f"flower-{OTHER_MACHINE}", f"flower_messages_{OTHER_MACHINE}"
LOW_MEMORY = "fedkern low memory"


def over_flower() -> Lines:
    """Return the table of strategies: the rows that were recorded with the present kernels."""
    recorded = next(file for file in read_results(comparisons.RESULTS)["flower"] if file.name == FLOWER)
    one_thread, cores = [row for row in recorded.rows if row.threads == 1], sources.hashes(sources.CSRC)
    rows = []
    for row in [row for row in one_thread if present(row, cores)]:
        models = dict(part.rsplit(" ", 1) for part in row.note.removeprefix("peak memory in models: ").split(", "))
        low = LOW_MEMORY in row.seconds
        rows.append([
            row.case, our_time(row), f"{row.speedup['Flower']:.2f}×",
            f"{row.speedup['Flower'] / row.speedup[LOW_MEMORY]:.2f}×" if low else "",
            models[row.ours], models[LOW_MEMORY] if low else "", models["Flower"],
        ])  # fmt: skip
    header = [
        "strategy", "time", "times as fast as Flower", "the same with `low_memory`", "memory, models",
        "memory with `low_memory`", "memory of Flower",
    ]  # fmt: skip
    note = left_out(len(one_thread) - len(rows))
    return [*caption(recorded.machine), *note, *table(header, rows).split("\n")]


def messages(method: str) -> tuple[str, ...]:
    """Return seconds in process, with a resident and without, of a round or an iteration."""
    seconds = load(MESSAGES, comparisons.RESULTS)["seconds"][method]
    return tuple(f"{median(values):.2g}" for values in seconds.values())


def message_seconds() -> Lines:
    rows = [["a round of FedAvg", "1", *messages("fedavg")], ["an iteration of FedIOD", "3", *messages("fediod")]]
    header = ["", "messages to a client", "in process, s", "on SuperNodes, s", "with `flower.resident=0`, s"]
    return [*caption(load(MESSAGES, comparisons.RESULTS)["machine"]), *table(header, rows).split("\n")]


# -- Compressed uploads ------------------------------------------------------------------------------------------------

COMPRESSIONS = {"int8": "int8", **{f"topk:share={share}": f"topk {share}" for share in ("0.1", "0.05", "0.01")}}
WHOLE = "none"


def compressed_uploads() -> Lines:
    """Return accuracy against bytes of all clients, with differences seed by seed, and the commit of the runs."""
    fewer = {f"{WHOLE}, {text}": f"{WHOLE} in {text}" for text in ("6 rounds of 5 epochs", "3 rounds of 10 epochs")}
    lines = []
    for buffers in ("average", "drop"):
        plain_runs = read_rows("compress")[f"{buffers}: {WHOLE}"]["runs"]
        for label, name in {WHOLE: WHOLE, **COMPRESSIONS, **fewer}.items():
            row = read_rows("compress")[f"{buffers}: {name}"]
            runs, traffic = row["runs"], row["runs"]["0"]["bytes"]
            gaps = [run["metrics"]["accuracy"] - plain_runs[seed]["metrics"]["accuracy"] for seed, run in runs.items()]
            lines.append([
                label, buffers, chosen_rate(row), *(megabytes(traffic[way], 2) for way in ("up", "down")),
                percent([run["metrics"]["accuracy"] for run in runs.values()]),
                "" if label == WHOLE else percent(gaps),
                "" if label in fewer else percent([run["late"] for run in runs.values()]),
                find_accuracy(plain_runs, traffic["up"]) if label in COMPRESSIONS else "",
            ])  # fmt: skip
    header = ["uploads", "buffers", "lr", "MB up", "MB down", "accuracy", "minus none", "last rounds", "as many bytes"]
    return [*table(header, lines).split("\n"), *commits_of("compress", [*read_rows("compress").values()])]


def client_choices() -> Lines:
    """Return rounds to an accuracy of 80 %, and the accuracy of the worst tenth of clients, by choice of clients."""
    lines = []
    for name, row in read_rows("choose").items():
        curves = [run["curve"] for run in row["runs"].values()]
        pairs = (zip(curve["round"], curve["accuracy"], strict=True) for curve in curves)
        reached = [next((f"{number}" for number, value in pair if value >= 0.8), "never") for pair in pairs]
        best = percent([max(curve["accuracy"]) for curve in curves])
        lines.append([f"`{name}`", ", ".join(reached), best, percent([*by_seed(row).values()])])
    header = ["`--choose`", "rounds to 80 %, by seed", "best accuracy", "worst tenth of clients"]
    return [*table(header, lines).split("\n"), *commits_of("choose", [*read_rows("choose").values()])]


def chosen_rate(row: Mapping[str, Any]) -> str:
    """Return the learning rate that a row's sweep chose."""
    found = re.search(r"lr ([\d.]+): [^;]*\(chosen\)", row["swept"])
    return found[1] if found else ""


def find_accuracy(runs: Mapping[str, Mapping[str, Any]], sent: float) -> str:
    """Return the accuracy of runs in the first round that has uploaded so many bytes, the same for every seed."""
    curves = [run["curve"] for run in runs.values()]
    at = next(place for place, count in enumerate(curves[0]["bytes_up"]) if count >= sent)
    return f"{percent([curve['accuracy'][at] for curve in curves])}, round {curves[0]['round'][at]}"


# -- README ------------------------------------------------------------------------------------------------------------


NETWORKS = ("McMahan's CNN", "VGG-11/16, batch norm", "ResNet-8/16", "ResNet-18/16", "MobileNetV2")


def list_accelerated(machine: str) -> Lines:
    """Return five networks' training steps beside plain PyTorch, on one core."""
    (recorded,) = (file for file in read_results(comparisons.RESULTS)["guest"] if file.name.endswith(machine))
    times = {row.case: row.speedup["eager"] for row in recorded.rows}
    rows = [[name, *(f"{times[f'{name}, B={batch}']:.1f}×" for batch in (8, 32))] for name in NETWORKS]
    header = ["times as fast as PyTorch on one CPU core", "batches of 8", "batches of 32"]
    return [*caption(recorded.machine), *table(header, rows).split("\n")]


def privacy_audit() -> Lines:
    """Return the lower bound on mu of every private channel beside the claimed one, and that of a defect."""
    rows = load("privacy_audit")["mechanisms"]
    cells = [[row["mechanism"], *(f"{value:.2f}" for value in (row["claimed"], row["lower"], row["caught"]["lower"])),
              row["caught"]["defect"]] for row in rows]  # fmt: skip
    header = ["mechanism", "claimed μ", "lower bound of μ", "lower bound with a defect", "defect"]
    note = f"{rows[0]['repeats']:,} repeats on each of the two data sets, every bound at 99 % confidence."
    return [*table(header, cells).split("\n"), "", note]


# -- Specifications ----------------------------------------------------------------------------------------------------


def options_of(method: str) -> Lines:
    """Return the options of a method as its help lists them."""
    rows = [
        [f"`{opt.name}`", "" if opt.default is None else f"{opt.default}", opt.range, opt.help.replace("|", r"\|")]
        for opt in METHODS[method].Options.list_options()
    ]
    return table(["option", "default", "values", "meaning"], rows).split("\n")


FIRST_TABLE = ("IID, B = 10", "IID, one batch", "non-IID, B = 10", "non-IID, one batch")
WATCH = ("own persons", "worst person", "held-out person")

PAGES: tuple[Page, ...] = (
    *(Page(f"docs/methods/{name}.md", {"options": partial(options_of, name)}, part=f"{number}. Options")
      for name, number in SPECIFIED.items()),
    Page("README.md", {"accelerate": partial(list_accelerated, GUESTS)}, part="The five methods"),
    Page("docs/speed.md", {
        "in short": speed_in_short,
        "whole runs beside plain PyTorch": whole_runs,
        "training steps of your networks": networks_of_your_own,
        "rounds of FedAvg beside other frameworks": partial(rounds_of_fedavg, MACHINE),
        "rounds of your networks beside a plain loop": partial(rounds_of_fedavg, f"{MACHINE}-2"),
        "rounds on your Dataset": partial(rounds_on_datasets, OTHER_MACHINE),
        "runs with ten thousand clients": ten_thousand_clients,
        "operators beside PyTorch": partial(operators, MACHINE, OTHER_MACHINE),
        "last run on a GPU": gpu_figures.last_run,
        "whole runs on a GPU": gpu_figures.whole_runs}),
    Page("docs/fedgid.md", {
        **{f"fedgid {name}": partial(list_cells, "fedgid", cells, goal=f"FedAvg without a tie: {cells.split()[0]}",
                                     rates=True) for name, cells in GID_GAPS.items()},
        "fedgid drawings": partial(list_cells, "openclipart_scenes", "scenes", rates=True),
        "fedgid command": partial(command, "fedgid")}),
    Page("docs/fusefl.md", {
        "fusefl upload and memory": partial(list_cells, "fusefl", "upload and memory"),
        "fusefl as published and calibrated": partial(mark_undated, fuse_table),
        "fusefl command": partial(command, "fusefl")}),
    Page("docs/fedlpfm.md", {
        "fedlpfm teacher from elsewhere": partial(tables_side_by_side, "fedlpfm", *SPLITS, "IID"),
        "fedlpfm corrected teachers": partial(tables_side_by_side, "fedlpfm_teachers", *SPLITS),
        "fedlpfm corrected teachers for longer": partial(
            tables_side_by_side, "fedlpfm_teachers", *(f"{split} for 100 rounds" for split in SPLITS)),
        "fedlpfm cost at inference": lpfm_inference,
        "fedlpfm stored teachers": lpfm_stored,
        "fedlpfm drawings by artist": partial(
            tables_side_by_side, "openclipart_classes", "own artists", "balanced accuracy"),
        "fedlpfm teacher of public images": partial(mark_undated, lpfm_table),
        "fedlpfm command": partial(command, "fedlpfm")}),
    Page("docs/fediod.md", {
        "fediod MNIST with class counts": partial(list_cells, "fediod_teachers", "MNIST 0.1"),
        "fediod MNIST with mixed classes": partial(list_cells, "fediod_teachers", "MNIST 1.0"),
        "fediod CIFAR with class counts": partial(list_cells, "fediod_teachers", "CIFAR-10 0.1"),
        "fediod ensembles of teachers": partial(
            tables_side_by_side, "fediod_teachers", *(f"{name} ensembles" for name in method_gains.IOD_TABLES)),
        "fediod options changed alone": iod_options, "fediod privacy": iod_privacy,
        "fediod command": partial(command, "fediod")}),
    Page("docs/reproducing.md", {
        "FedAvg rounds to an accuracy on MNIST": partial(verdicts, "mcmahan2017"),
        "FedAvg rounds with one change": partial(verdicts, "mcmahan_turns", "IID, B = 10", "pixels in -0.5 to 0.5"),
        "FedAvg rounds at one rate": partial(verdicts, "mcmahan_turns", *(f"{cell}, one rate" for cell in FIRST_TABLE)),
        "accuracies on FCUBE": partial(verdicts, "fcube"),
        "accuracies on MNIST of two digits": partial(verdicts, "niidbench2022"),
        "accuracies of pFedMe": partial(verdicts, "pfedme"),
        "accuracies of qFFL": partial(verdicts, "qffl", "1")}, "Tables run here"),
    Page("docs/feddra.md", {
        "feddra minority of a tenth": partial(
            tables_side_by_side, "feddra", "10 %: worst loss", "10 %: mean loss", forms=(nats, nats)),
        "feddra minority of a fifth": partial(
            tables_side_by_side, "feddra", "20 %: worst loss", "20 %: mean loss", forms=(nats, nats)),
        "feddra loss on drawings": partial(
            tables_side_by_side, "openclipart", "worst loss", "mean loss", forms=(nats, nats)),
        "feddra recall on drawings": partial(tables_side_by_side, "openclipart", "worst recall", "mean recall"),
        "feddra command": partial(command, "feddra", 2, 1.0, "nats")}),
    Page("docs/flower-reference.md", {
        "aggregation beside Flower": over_flower, "messages over Flower": message_seconds}, "Speed"),
    Page("docs/uploads.md", {
        "accuracy against uploaded bytes": compressed_uploads, "choices of clients": client_choices}, "Compression"),
    Page("docs/privacy.md", {"privacy audit": privacy_audit}, part="Audit"),
    Page("docs/methods/baselines.md", {
        f"watch {name}".replace("-", " "): partial(list_cells, "watch", name, rates=True) for name in WATCH}),
    Page("docs/methods/README.md", {"which method when": method_gains.in_use}),
    Page("docs/results.md", {"paired differences": method_gains.differences}),
    Page("docs/artefact.md", {"tables and charts": lambda: artefact.list_artefacts(
        PAGES[:-1], [Path(chart.path).name for chart in charts.all_charts()])}),
)  # fmt: skip
