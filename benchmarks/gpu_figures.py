"""What docs/speed.md says of a GPU in figures (`benchmarks.pages`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks import bench_methods, comparisons
from benchmarks.comparisons import Comparison, read_results
from benchmarks.page import load
from benchmarks.studies.study import table

GPU = "nvidia-h200"
Lines = Sequence[str]
LOSSES = f"losses_{GPU}"
"""Losses whose kernels are newer than what was recorded beside others."""
BOUND = {"accumulator exact": "bound by its digits", "clip_and_noise": "bound by its generator"}
"""Operators that arithmetic binds, whose share of a copy would say nothing."""
ROWS = ("weighted_mean stack", "blend index", "blend index gradient")
"""Operators that start at rows, which two more 16-bit elements move to odd addresses."""
MEAN = "mean round with the first"
"""What there is of rounds that were recorded before the first one was told apart."""


def _caption(machine: Mapping[str, Any]) -> Lines:
    return [f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}, {comparisons.dated(machine)}", ""]


def kernels() -> Lines:
    """The CUDA kernels at their large size."""
    content = load(f"kernels_{GPU}", comparisons.RESULTS)
    return [*_caption(content["machine"]), *kernel_table(content["rows"]).split("\n")]


def kernel_table(rows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] = ()) -> str:
    """At the large size: the share of a copy's bandwidth (in brackets that of ``before``), and the reference's time."""
    header = ["operator", "fp32", "of a copy: fp32", "fp32, odd", "bf16", "bf16, odd", "over the reference"]
    earlier, lines = _large(before), []
    for name, by_backend in _large(rows).items():
        ours, plain = by_backend.get(("fp32", False, "cuda")), by_backend.get(("fp32", False, "reference"))
        if ours is None:
            continue
        shares = []
        for key in ((dtype, odd, "cuda") for dtype in ("fp32", "bf16") for odd in (False, True)):
            if name in BOUND:
                shares.append("" if shares else BOUND[name])
                continue
            if name in ROWS and key[:2] == ("bf16", True):
                shares.append("4-byte loads")
                continue
            was = f" ({100 * one['share']:.0f} %)" if (one := earlier.get(name, {}).get(key)) else ""
            shares.append(f"{100 * by_backend[key]['share']:.0f} %{was}" if key in by_backend else "–")
        lines.append([
            f"`{name}`", f"{1e6 * ours['seconds']:.0f} µs", *shares,
            "–" if plain is None else f"{plain['seconds'] / ours['seconds']:.1f}×",
        ])  # fmt: skip
    return table(header, lines)


def _large(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[str, bool, str], Mapping[str, Any]]]:
    """Rows of the large size by operator, and by dtype, alignment and backend."""
    operators: dict[str, dict[tuple[str, bool, str], Mapping[str, Any]]] = {}
    for row in rows:
        if row["size"] == "large" and "seconds" in row and row["operator"] != "contrastive":  # which products bind
            operators.setdefault(row["operator"], {})[row["dtype"], row["odd"], row["backend"]] = row
    return operators


def beside_others() -> Lines:
    """The operators' benchmarks: others' times over ours by the GPU's clock, in brackets by the wall's."""
    recorded, newer = _recorded(), {row["operator"] for row in load(LOSSES, comparisons.RESULTS)["rows"]}
    lines = []
    for row in (row for one in recorded for row in one.rows if row.group not in newer):
        best = [name for name in row.speedup if name not in ("eager", "compile")]
        others = ", ".join(f"{against(row, name)} {name}" for name in best)
        lines.append([f"`{row.group}`", row.case, against(row, "eager"), against(row, "compile"), others])
    header = ["operator", "size", "over eager", "over `torch.compile`", "over others"]
    return [*_caption(recorded[0].machine), *table(header, lines).split("\n")]


def _recorded() -> Sequence[Any]:
    """The results files of the operators' benchmarks on the GPU."""
    return [one for files in read_results().values() for one in files if one.name.endswith(f"cuda-{GPU}")]


def _over(ratio: float) -> str:
    """A ratio of times, theirs over ours; bold where ours is longer."""
    return f"**{ratio:.2f}×**" if ratio < 1 else f"{ratio:.2f}×"


def against(row: Comparison, name: str) -> str:
    """Another's time over ours by the GPU's clock, and in brackets by the wall's."""
    if name not in row.speedup:
        return ""
    return f"{_over(row.speedup[name])} ({row.wall_seconds[name] / row.wall_seconds[row.ours]:.2f}×)"


def losses() -> Lines:
    """Losses forward and backward, with the kernels before these, and others' times over ours by both clocks."""
    content = load(LOSSES, comparisons.RESULTS)
    before = {(row.group, row.case): row for one in _recorded() for row in one.rows}
    lines, ratios, times = [], [], []
    for row in content["rows"]:
        known = before.get((row["operator"], row["case"]))
        if known is None:
            continue
        cells = []
        for name in ("eager", "compile", "Liger-Kernel"):
            if name not in known.seconds:
                cells.append("")
                continue
            ratio, wall = known.seconds[name] / row["seconds"], known.wall_seconds[name] / row["wall"]
            cells.append(f"{_over(ratio)} ({_over(wall)})")
            if row["operator"] == "kl_div" and name != "compile":
                ratios.append((name, row["case"], ratio, wall))
        times.append(known.time)
        lines.append([
            f"`{row['operator']}`", row["case"],
            *(f"{1e6 * seconds:.1f} µs" for seconds in (known.seconds[known.ours], row["seconds"])), *cells,
        ])  # fmt: skip
    eager = [f"{wall:.2f}× at {case} (GPU: {ratio:.2f}×)" for name, case, ratio, wall in ratios if name == "eager"]
    liger = [(ratio, wall) for name, _, ratio, wall in ratios if name == "Liger-Kernel"]
    (least, lowest), (most, highest) = (tuple(map(f, zip(*liger, strict=True))) for f in (min, max))
    missing = (
        "Missing: a sitting in which all took turns. The present kernels were timed at "
        f"{content['machine']['time'][11:16]}, those before and all others from {min(times)[11:16]} to "
        f"{max(times)[11:16]}. By the wall clock of calls in a row `kl_div` gains over eager {', '.join(eager)}; "
        f"Liger-Kernel takes {lowest:.1f} to {highest:.1f} times as long (GPU: {least:.0f} to {most:.0f})."
    )
    header = ["loss", "size", "before", "now", "eager over now", "`torch.compile` over now", "Liger-Kernel over now"]
    return [missing, "", *_caption(content["machine"]), *table(header, lines).split("\n")]


def whole_runs() -> Lines:
    """Whole commands on the GPU, plain and ours; of their rounds the first and the median of later ones, where told."""
    content = load(f"methods_{GPU}", comparisons.RESULTS)
    rows = [bench_methods.Row(**one) for one in content["cases"]]
    apart = all(row.later_seconds for row in rows)
    parts = {"first round": "first_seconds", "later ones": "later_seconds"} if apart else {MEAN: "round_seconds"}
    lines = []
    for row in rows:
        cells = []
        for of, digits in (("seconds", 1), *((of, 2) for of in parts.values())):
            plain, ours = (median(getattr(row, of)[name]) for name in (bench_methods.PLAIN, bench_methods.OURS))
            cells += [f"{plain:.{digits}f} s", f"{ours:.{digits}f} s", f"{plain / ours:.2f}×"]
        lines.append([f"`{row.method}`", *cells])
    header = ["run", "plain PyTorch", "fedkern", "over plain"]
    for name in parts:
        header += [f"{name}: plain", "fedkern", "over plain"]
    return [*_caption(content["machine"]), *table(header, lines).split("\n")]
