"""Fifteen minutes on a GPU, line by line, and `again` for failed lines, started by `fifteen.sh`.

Every line has a time of its own, and all have one together.  Their output lies in a folder beside the checkout,
where `again` finds it, and after every line in an archive.  Figures measured before are of one kind of card: on another
they are not shown, and `again` plays no run twice, since that card came late.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import comparisons, gpu_figures
from benchmarks.gpu import beside, kernels, stages
from benchmarks.gpu.__main__ import ABSENT, code, gpu, pack
from benchmarks.gpu.playing import PASSED, RECORD, Playing
from benchmarks.gpu.stages import ROOT, Stage
from benchmarks.page import load, table

BESIDE = ROOT.parent / f"{ROOT.name}-fifteen"
ARCHIVE, TABLE = "fifteen.tar.gz", "table.md"
KINDS, MOST = {".json", ".jsonl", ".log", ".md", ".png", ".csv"}, 15_000_000
"""What the archive takes: no raw profiles, networks or checkpoints."""
FIRST, AGAIN = 550.0, 150.0
"""Seconds of either command; ten more are for what is around the lines."""
PATIENCE = 10.0
CHANGED = (
    "fuse_concat", "fuse_mean", "median", "trimmed_mean", "pairwise_distances", "krum", "geometric_median",
    "clip_by_norm", "keep_boxes", "kl_div", "dual_kl", "entropy", "ensemble_kl", "js_div", "consensus", "server_step",
    "weighted_mean",
)  # fmt: skip
"""Operators whose CUDA kernels have changed since a GPU last timed them."""
WITHOUT_TRITON = (
    "median", "trimmed_mean", "pairwise_distances", "krum", "geometric_median", "clip_by_norm", "clip_and_noise",
    "kl_div limit", "dual_kl limit", "ensemble_kl limit", "erase_boxes", "keep_boxes", "sgd_step", "adamw_step",
    "server_step", "weighted_mean", "contrastive",
)  # fmt: skip
"""Operators that the reference serves where there is no CUDA core."""
NETWORKS = {"lenet": (6, 50, 6), "cnn": (8, 50, 6), "resnet18": (64, 10, 3)}
"""Width, clients and rounds of what is played beside the lean loop."""
TRACED_CLIENTS = 10
RUNS = {"fedavg": ("nothing", "graphs", "lanes"), "fedgid": ("nothing", "graphs")}
"""Methods, and what they are played without: FedGID's clients work one after another."""
TWICE = ("fedgid", *stages.NETWORKS)
FLAGS = ("--rounds", "12", "--grad-cam", "0", "--workers", "1", "--device", "cuda", "--quiet")
TESTED = (stages.TESTED[0], "python_tests/engine/local/test_captured.py")
SIZE = "(4096, 1000)"
"""Of the losses beside torch.compile, as bench_distill.py names it."""


def lines(capability: str, out: Path) -> list[Stage]:
    """Return the ten kinds of lines in their order.

    Args:
        capability: the GPU's compute capability, for example "9.0".
        out: folder of their output.
    """
    results = str(out / "results")
    measured = ("--missing", "--results", results, "--backends")
    taken = (f"{name} large" for name in WITHOUT_TRITON)
    plan = [
        replace(stages.build(capability), seconds=105, ready=()),
        replace(stages.doctor(), seconds=20),
        _line("tests", 60, "pytest", "-q", "-n", "9", *stages.CHOSEN, *TESTED),
        _line("kernels", 65, "benchmarks.gpu.kernels", *CHANGED, *measured, "cuda"),
        _line("reference", 25, "benchmarks.gpu.kernels", *taken, *measured, "reference"),
    ]
    for method, parts in RUNS.items():
        for part in parts:
            name = method if part == "nothing" else f"{method} without {part}"
            folder = out / "runs" / name.replace(" ", "-")
            words = ("benchmarks.gpu.without", part, method, *FLAGS, "--out", str(folder))
            plan.append(_line(f"run {name}", 10, *words))
    for name, size in NETWORKS.items():
        words = ("benchmarks.gpu.beside", name, *map(str, size), "--out", str(out / "rounds"))
        plan.append(_line(f"rounds {name}", 30, *words))
    for name, (width, clients, _) in NETWORKS.items():
        size = (width, min(clients, TRACED_CLIENTS), 1)
        words = ("benchmarks.gpu.beside", name, *map(str, size), "--traced", "--out", str(out / "traces" / name))
        plan.append(_line(f"trace {name}", 20, *words))
    losses = [f"benchmarks/bench_distill.py::test_{name}[{SIZE}-1]" for name in ("kl_div", "dual_kl", "entropy")]
    plan.append(_line("compile", 45, "pytest", "-q", *losses, "--device", "cuda", "--record", "--results", results))
    return plan


def _line(name: str, seconds: int, *words: str) -> Stage:
    return Stage(name, (sys.executable, "-m", *words), seconds, goes_on=name == "kernels")


def checks(*, known: bool) -> list[Stage]:
    """Return the lines that `again` adds: the changed kernels under NVIDIA's checkers, and runs twice with one seed."""
    chosen = f"gives_the_reference_result and ({' or '.join(CHANGED)})"
    quick = []
    for stage in stages.sanitizers():
        words = [chosen if word == stages.SMALL else word for word in stage.command]
        quick.append(replace(stage, command=tuple(words), seconds=40))
    twice = [replace(stage, seconds=20) for stage in stages.repeats() if stage.name.split()[1] in TWICE]
    return [*quick, *(twice if known else [])]


class Lines(Playing):
    """Player of lines, which writes the table and the archive after each."""

    archive: Path

    def _note(self, stage: Stage, entry: dict[str, Any]) -> None:
        super()._note(stage, entry)
        (self.out / TABLE).write_text("\n".join(make_tables(self.out, self.facts, self.done)) + "\n")
        pack(self.out, self.archive, KINDS, MOST)


def main(words: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 where all has passed, 1 where something has not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/fifteen.sh", description=__doc__)
    parser.add_argument("again", nargs="?", choices=("again",), help="what failed, and checks of it")
    parser.add_argument("--out", default=os.environ.get("OUT"), metavar="DIR", help="of the archive; by default $OUT")
    args = parser.parse_args(words)
    facts = gpu()
    if not args.out:
        parser.error("name the archive's folder with --out DIR or in the variable OUT")
    if facts is None:
        parser.error(ABSENT)
    if args.again and not (BESIDE / RECORD).exists():
        parser.error(f"{BESIDE} has no {RECORD}, so nothing was played here: leave 'again' out")
    if not args.again:
        shutil.rmtree(BESIDE, ignore_errors=True)
    known = comparisons.slug(facts) == gpu_figures.GPU
    asked = all_lines = lines(facts["capability"], BESIDE)
    playing = Lines(BESIDE, facts, code(), AGAIN if args.again else FIRST, PATIENCE)
    playing.archive = Path(args.out).resolve() / ARCHIVE
    if args.again:
        failed = [line for line in all_lines if playing.done.get(line.name, {}).get("outcome") != PASSED]
        asked = [*failed, *checks(known=known)]
        playing.play([stages.build(facts["capability"])])  # nothing to do but where that failed, or kernels were mended
        playing.play([line for line in failed if line.name != "build"], again=True)
        playing.play(checks(known=known), again=True)
    else:
        playing.play(all_lines, again=True)
    print((BESIDE / TABLE).read_text() if (BESIDE / TABLE).exists() else "no line was played")
    return int(any(playing.done.get(line.name, {}).get("outcome") != PASSED for line in asked))


# -- the table ---------------------------------------------------------------------------------------------------------


def make_tables(out: Path, facts: Mapping[str, Any], done: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return all findings of the lines, as tables."""
    rows = [[name, entry["outcome"], f"{entry['seconds']:.0f}", entry["last"]] for name, entry in done.items()]
    text = [", ".join(map(str, facts.values())), "", table(["line", "outcome", "s", "said last"], rows)]
    for part in (_kernels, _rounds, _runs, _traces, _losses):
        try:
            text += [line for paragraph in part(out, facts) for line in ("", paragraph)]
        except Exception as error:  # what a line has left half written must not end the others
            text += ["", f"no table of{part.__name__.replace('_', ' ')}: {type(error).__name__}: {error}"]
    return text


def _kernels(out: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    path = out / "results" / kernels.FILE
    if path.exists():
        known = comparisons.slug(facts) == gpu_figures.GPU
        before = load(f"kernels_{gpu_figures.GPU}", comparisons.RESULTS)["rows"] if known else ()
        yield gpu_figures.kernel_table(json.loads(path.read_text())["rows"], before)


def _rounds(out: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    cases = [json.loads(path.read_text()) for path in sorted((out / "rounds").glob("*.json"))]
    if cases:
        columns = [(name, part) for name in (beside.LEAN, beside.OURS) for part in ("first", "later")]
        rows = [
            [case["case"], *(f"{1e3 * case[part][name]:.1f} ms" for name, part in columns),
             f"{case['later'][beside.LEAN] / case['later'][beside.OURS]:.2f}×"] for case in cases
        ]  # fmt: skip
        yield table(["rounds", *(f"{name}: {part}" for name, part in columns), "later over"], rows)


def _runs(out: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for path in sorted((out / "runs").glob("*/metrics.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if len(records) > 1:
            first_round, *later = (row["round_seconds"] for row in records)
            phases = {name: median(row["phases"].get(name, 0) for row in records[1:]) for name in records[1]["phases"]}
            longest = sorted(phases.items(), key=lambda item: -item[1])[:4]
            operators = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in longest)
            rows.append([path.parent.name, f"{1e3 * first_round:.0f} ms", f"{1e3 * median(later):.1f} ms", operators])
    if rows:
        yield table(["run", "first round", "later ones", "phases of later ones, ms"], rows)


def _traces(out: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    traces = [json.loads(path.read_text()) for path in sorted((out / "traces").glob("*/trace.json"))]
    if traces:
        rows = [
            [case["method"], "–" if case["busy"] is None else f"{100 * case['busy']:.0f} %", f"{case['kernels']:,}",
             ", ".join(f"{count} {name}" for name, (count, _) in list(case["waits"].items())[:3])] for case in traces
        ]  # fmt: skip
        yield table(["one round traced", "GPU busy", "kernels", "most waits"], rows)


def _losses(out: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    recorded = comparisons.read_results(out / "results")
    if rows := [row for files in recorded.values() for file in files for row in file.rows]:
        names = ("eager", "compile", "Liger-Kernel")
        cells = [
            [row.group, row.case, *(f"{1e6 * clock[row.ours]:.1f} µs" for clock in (row.seconds, row.wall_seconds)),
             *(gpu_figures.against(row, name) for name in names)] for row in rows
        ]  # fmt: skip
        yield table(["loss", "size", "GPU's clock", "wall clock", *(f"over {name}" for name in names)], cells)


if __name__ == "__main__":
    sys.exit(main())
