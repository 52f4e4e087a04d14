"""Run at published scale, begun or resumed, which reports its progress when it or its time ends.

python -m benchmarks.gpu.published METHOD FLAG ... --out DIR
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.playing import wait
from fedkern.engine.store.record_files import METRICS, read_metrics
from fedkern.settings.config import NAME

PAPERS = {"fusefl": "85.92 %", "fediod": "82.78 %"}
"""Accuracies in the papers; FedGID's are of another colouring."""
FIGURES = ("accuracy", "ood_accuracy", "id_accuracy")


def main(words: Sequence[str]) -> int:
    """Play the run and return its exit code."""
    out = Path(words[words.index("--out") + 1])
    asked = ["--resume", str(out)] if (out / NAME).exists() else list(words)
    code = wait(subprocess.Popen([sys.executable, "-m", "fedkern.run", *asked]))
    print(describe(words[0], out))
    return code


def describe(method: str, out: Path) -> str:
    """Return one line on how far a run has come."""
    records = read_metrics(out) if (out / METRICS).exists() else []
    if not records:
        return f"{method}: no round is done"
    parts = [f"{method}: {records[-1]['round']} rounds"]
    parts += [f"{name} {100 * best:.2f} %" for name in FIGURES if (best := _latest(records, name)) is not None]
    if method in PAPERS:
        parts.append(f"in the paper {PAPERS[method]}")
    return ", ".join(parts)


def _latest(records: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((record[name] for record in reversed(records) if name in record), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
