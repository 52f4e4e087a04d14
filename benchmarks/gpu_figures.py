"""Figures of a GPU for docs/speed.md, and the table of kernels for gpu/fifteen.py."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks import bench_methods, comparisons, sources
from benchmarks.comparisons import Comparison, read_results
from benchmarks.page import load, table
from benchmarks.report import present

GPU = "nvidia-h200"
Lines = Sequence[str]
BOUND = {"accumulator exact": "bound by its digits", "clip_and_noise": "bound by its generator"}
"""Operators that arithmetic binds, whose share of a copy would say nothing."""
ROWS = ("weighted_mean stack", "blend index", "blend index gradient")
"""Operators that start at rows, which two more 16-bit elements move to odd addresses."""
MEAN = "mean round with the first"
"""What there is of rounds that were recorded before the first one was told apart."""


def _caption(machine: Mapping[str, Any]) -> Lines:
    return [f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}, {comparisons.name_date(machine)}", ""]


def kernel_table(rows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the table of kernels at the large size.

    It has the share of a copy's bandwidth (in brackets that of ``before``), and the reference's time.
    """
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
            was = f" ({100 * old['share']:.0f} %)" if (old := earlier.get(name, {}).get(key)) else ""
            shares.append(f"{100 * by_backend[key]['share']:.0f} %{was}" if key in by_backend else "–")
        lines.append([
            f"`{name}`", f"{1e6 * ours['seconds']:.0f} µs", *shares,
            "–" if plain is None else f"{plain['seconds'] / ours['seconds']:.1f}×",
        ])  # fmt: skip
    return table(header, lines)


def _large(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[str, bool, str], Mapping[str, Any]]]:
    """Return rows of the large size by operator, and by dtype, alignment and backend."""
    operators: dict[str, dict[tuple[str, bool, str], Mapping[str, Any]]] = {}
    for row in rows:
        if row["size"] == "large" and "seconds" in row and row["operator"] != "contrastive":  # which products bind
            operators.setdefault(row["operator"], {})[row["dtype"], row["odd"], row["backend"]] = row
    return operators


def last_run() -> Lines:
    """Return when a GPU last computed, with which kernels, and how many recorded timings measured today's kernels."""
    stages, cores = load(f"stages_{GPU}", comparisons.RESULTS), sources.hashes(sources.CSRC)
    machine, built = stages["machine"], stages["stages"]["tests"]["core"]
    files = [load(f"{name}_{GPU}", comparisons.RESULTS) for name in ("kernels", "losses")]
    recorded = [file for group in read_results().values() for file in group if file.name.endswith(f"cuda-{GPU}")]
    valid = [present(row, cores) for file in recorded for row in file.rows]
    valid += [
        file["machine"]["core"] == cores["_cuda"]
        for file in files
        for row in file["rows"]
        if row.get("backend", "cuda") == "cuda"
    ]
    return [
        f"fedkern last ran on a GPU on {machine['date']}: an {machine['gpu']}, commit {machine['commit']}, CUDA "
        f"sources of hash `{built}`. Of {len(valid)} kernel timings from there, {sum(valid) or 'none'} are of today's."
    ]


def _over(ratio: float) -> str:
    """Return a ratio of times, theirs over ours, bold where ours is longer."""
    return f"**{ratio:.2f}×**" if ratio < 1 else f"{ratio:.2f}×"


def against(row: Comparison, name: str) -> str:
    """Return another's time over ours by the GPU's clock, and in brackets by the wall's."""
    if name not in row.speedup:
        return ""
    return f"{_over(row.speedup[name])} ({row.wall_seconds[name] / row.wall_seconds[row.ours]:.2f}×)"


def whole_runs() -> Lines:
    """Return whole commands on the GPU, plain and ours, with first round and median of later ones if recorded."""
    content = load(f"methods_{GPU}", comparisons.RESULTS)
    rows = [bench_methods.Row(**case) for case in content["cases"]]
    has_rounds = all(row.later_seconds for row in rows)
    parts = {"first round": "first_seconds", "later ones": "later_seconds"} if has_rounds else {MEAN: "round_seconds"}
    lines = []
    for row in rows:
        cells = []
        for of, digits in (("seconds", 1), *((of, 2) for of in parts.values())):
            plain, ours = (median(getattr(row, of)[name]) for name in (bench_methods.PLAIN, bench_methods.OURS))
            cells += [f"{plain:.{digits}f} s", f"{ours:.{digits}f} s", f"{plain / ours:.2f}×"]
        lines.append([f"`{row.method}`", *cells])
    header = []
    for name in ("whole run", *parts):
        header += [f"{name}: plain PyTorch", f"{name}: fedkern", f"{name}: times as fast as plain PyTorch"]
    header = ["run", *header]
    return [*_caption(content["machine"]), *table(header, lines).split("\n")]
