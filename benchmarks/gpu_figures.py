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


def _caption(machine: Mapping[str, Any]) -> Lines:
    return [f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}, {comparisons.dated(machine)}", ""]


def kernels() -> Lines:
    """The CUDA kernels at their large size: the share of a copy's bandwidth, and the reference's time over ours."""
    content = load(f"kernels_{GPU}", comparisons.RESULTS)
    found: dict[str, dict[tuple[str, bool, str], Mapping[str, Any]]] = {}
    for row in content["rows"]:
        if row["size"] == "large" and "seconds" in row and row["operator"] != "contrastive":  # which products bind
            found.setdefault(row["operator"], {})[row["dtype"], row["odd"], row["backend"]] = row
    lines = []
    for name, rows in found.items():
        ours, plain = rows.get(("fp32", False, "cuda")), rows.get(("fp32", False, "reference"))
        if ours is None:
            continue
        shares = [rows.get((dtype, odd, "cuda")) for dtype in ("fp32", "bf16") for odd in (False, True)]
        lines.append([
            f"`{name}`", f"{1e6 * ours['seconds']:.0f} µs",
            *("–" if one is None else f"{100 * one['share']:.0f} %" for one in shares),
            "–" if plain is None else f"{plain['seconds'] / ours['seconds']:.1f}×",
        ])  # fmt: skip
    header = ["operator", "fp32", "of a copy: fp32", "fp32, odd", "bf16", "bf16, odd", "over the reference"]
    return [*_caption(content["machine"]), *table(header, lines).split("\n")]


def beside_others() -> Lines:
    """The operators' benchmarks: others' times over ours by the GPU's clock, in brackets by the wall's."""
    recorded, newer = _recorded(), {row["operator"] for row in load(LOSSES, comparisons.RESULTS)["rows"]}
    lines = []
    for row in (row for one in recorded for row in one.rows if row.group not in newer):
        best = [name for name in row.speedup if name not in ("eager", "compile")]
        others = ", ".join(f"{_against(row, name)} {name}" for name in best)
        lines.append([f"`{row.group}`", row.case, _against(row, "eager"), _against(row, "compile"), others])
    header = ["operator", "size", "over eager", "over `torch.compile`", "over others"]
    return [*_caption(recorded[0].machine), *table(header, lines).split("\n")]


def _recorded() -> Sequence[Any]:
    """The results files of the operators' benchmarks on the GPU."""
    return [one for files in read_results().values() for one in files if one.name.endswith(f"cuda-{GPU}")]


def _over(ratio: float) -> str:
    """A ratio of times, theirs over ours; bold where ours is longer."""
    return f"**{ratio:.2f}×**" if ratio < 1 else f"{ratio:.2f}×"


def _against(row: Comparison, name: str) -> str:
    if name not in row.speedup:
        return ""
    return f"{_over(row.speedup[name])} ({row.wall_seconds[name] / row.wall_seconds[row.ours]:.2f}×)"


def losses() -> Lines:
    """Losses forward and backward by the GPU's clock: with the kernels before these, and others' times over ours."""
    content = load(LOSSES, comparisons.RESULTS)
    before = {(row.group, row.case): row for one in _recorded() for row in one.rows}
    lines = []
    for row in content["rows"]:
        known = before.get((row["operator"], row["case"]))
        if known is None:
            continue
        others = [known.seconds.get(name) for name in ("eager", "compile", "Liger-Kernel")]
        cells = ["" if other is None else _over(other / row["seconds"]) for other in others]
        lines.append([
            f"`{row['operator']}`", row["case"],
            *(f"{1e6 * seconds:.1f} µs" for seconds in (known.seconds[known.ours], row["seconds"])), *cells,
        ])  # fmt: skip
    header = ["loss", "size", "before", "now", "eager over now", "`torch.compile` over now", "Liger-Kernel over now"]
    return [*_caption(content["machine"]), *table(header, lines).split("\n")]


def whole_runs() -> Lines:
    """Whole commands on the GPU, plain and ours, and one round of each."""
    content = load(f"methods_{GPU}", comparisons.RESULTS)
    lines = []
    for row in (bench_methods.Row(**one) for one in content["cases"]):
        cells = []
        for seconds, digits in ((row.seconds, 1), (row.round_seconds, 2)):
            plain, ours = (median(seconds[name]) for name in (bench_methods.PLAIN, bench_methods.OURS))
            cells += [f"{plain:.{digits}f} s", f"{ours:.{digits}f} s", f"{plain / ours:.2f}×"]
        lines.append([f"`{row.method}`", *cells])
    header = ["run", "plain PyTorch", "fedkern", "over plain", "a round: plain", "fedkern", "over plain"]
    return [*_caption(content["machine"]), *table(header, lines).split("\n")]
