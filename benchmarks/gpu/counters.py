"""Nsight Compute's counters of the kernels of a few calls, which show the kernels' limits.

python -m benchmarks.gpu.counters CSV "OPERATOR SIZE" ...     # as benchmarks.gpu.kernels names them; fp32, aligned
"""

import csv
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.playing import wait
from fedkern import ops

METRICS = {
    "µs": "gpu__time_duration.sum",
    "% of memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "% of issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "% of warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
INSIDE = "--inside"


def main(words: Sequence[str]) -> int:
    """Call the operators under ncu, and return its exit code."""
    if words[0] == INSIDE:
        return call(words[1:])
    asked = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    asked += ["--print-units", "base", "--print-kernel-base", "demangled", "--metrics", ",".join(METRICS.values())]
    inner = [sys.executable, "-m", "benchmarks.gpu.counters", INSIDE, *words[1:]]
    try:
        code = wait(subprocess.Popen([*asked, "--log-file", words[0], *inner]))
    except OSError as error:
        print(f"ncu does not start: {error.strerror}")
        return 1
    rows = read(Path(words[0]))
    print(f"{len(rows)} kernels" if rows else "ncu counted nothing: its log says why")
    return code or int(not rows)


def call(words: Sequence[str]) -> int:
    """Call each operator twice, the second time with the counters on."""
    made = [make()[0] for row, make in kernels.list_rows(words, ["cuda"]) if row["dtype"] == "fp32" and not row["odd"]]
    with ops.use_backend("cuda"):
        for counted in (False, True):
            torch.cuda.synchronize()
            if counted:
                torch.cuda.profiler.start()
            for launch in made:
                launch()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def read(path: Path) -> list[list[str]]:
    """Return name and counters, as :data:`METRICS` names them, of fedkern's kernels in ncu's log."""
    text = path.read_text(errors="replace") if path.exists() else ""
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    table = []
    for row in rows[1:]:  # the first has the units
        name = row.get("Kernel Name", "")
        if "fedkern" in name:
            values = [float(row[metric].replace(",", "")) for metric in METRICS.values()]
            short = re.split(r"[<(]", name.replace("(anonymous namespace)::", ""))[0].rpartition("::")[2]
            table.append([short, f"{values[0] / 1e3:.1f}", *(f"{value:.0f}" for value in values[1:])])
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
