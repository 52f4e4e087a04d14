"""One round under PyTorch's profiler, which shows idle times of the GPU while the host waits.

python -m benchmarks.gpu.trace METHOD [FLAG ...] --out DIR

The flags are those of ``python -m fedkern.run``.  DIR gets the run (``run``), ``trace.json`` (the figures) and
``trace.png`` (some milliseconds out of the middle: host and GPU side by side).
"""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.playing import wait
from benchmarks.recorded import recorded_commit
from fedkern.engine.store.run_folder import TRACE

HOST, RUNTIME = "cpu_op", {"cuda_runtime", "cuda_driver"}
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
WAITING = ("Synchronize", "cudaMemcpy")
"""What names of the CUDA runtime's calls hold that return when the GPU has done something."""
QUEUED = "Async"
WINDOW = 8e3  # microseconds of the picture
Event = Mapping[str, Any]


def read(path: Path) -> list[Event]:
    """Return the events of a trace that lasted, in the order in which they began."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    lasted = [event for event in events if event.get("ph") == "X" and event.get("cat") in {HOST, *RUNTIME, *DEVICE}]
    return sorted(lasted, key=lambda one: one["ts"])


def waits(events: Iterable[Event]) -> list[Event]:
    """Return the calls of the CUDA runtime in which the host waits for the GPU."""
    return [
        event
        for event in events
        if event["cat"] in RUNTIME and any(word in event["name"] for word in WAITING) and QUEUED not in event["name"]
    ]


def measure_cover(events: Iterable[Event], begin: float, end: float) -> float:
    """Return the microseconds of [begin, end] in which an event went on, for events sorted by their beginnings."""
    total, reached = 0.0, begin
    for event in events:
        start, stop = max(event["ts"], reached), min(event["ts"] + event["dur"], end)
        if stop > start:
            total += stop - start
            reached = stop
    return total


def around(events: Sequence[Event], chosen: Iterable[Event]) -> list[str]:
    """Return for each of the chosen events the innermost operator of PyTorch around it, in the trace's order."""
    wanted = {id(event) for event in chosen}
    open_here: dict[Any, list[Event]] = {}  # by thread, the outermost operator first
    operators = []
    for event in events:
        stack = open_here.setdefault(event.get("tid"), [])
        if id(event) in wanted:
            while stack and stack[-1]["ts"] + stack[-1]["dur"] < event["ts"] + event["dur"]:
                stack.pop()
            operators.append(stack[-1]["name"] if stack else "no operator")
        elif event["cat"] == HOST:
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
                stack.pop()
            stack.append(event)
    return operators


def figures(events: Sequence[Event]) -> dict[str, Any]:
    """Return the figures of a trace.

    Returns:
        ``seconds`` from the first to the last event; ``busy``, the share of them in which the GPU did something, or
        None without a GPU; ``kernels``, how many were launched; and ``waits``, by the operator in which the host
        waited: how often, and seconds in all, the longest first.

    Raises:
        ValueError: the trace has no events.
    """
    if not events:
        raise ValueError("the trace is empty")
    begin, end = events[0]["ts"], max(event["ts"] + event["dur"] for event in events)
    device = [event for event in events if event["cat"] in DEVICE]
    counts: dict[str, list[float]] = {}
    waited = waits(events)
    for event, operator in zip(waited, around(events, waited), strict=True):
        pair = counts.setdefault(operator, [0, 0.0])
        pair[0] += 1
        pair[1] += event["dur"] / 1e6
    return {
        "seconds": (end - begin) / 1e6,
        "busy": measure_cover(device, begin, end) / (end - begin) if device else None,
        "kernels": sum(event["cat"] == "kernel" for event in events),
        "waits": dict(sorted(counts.items(), key=lambda item: -item[1][1])),
    }


def draw(events: Sequence[Event], path: Path, title: str) -> None:
    """Draw the middle of a trace: a row for the host's operators, one for its waits, and one for every GPU stream."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    begin, end = events[0]["ts"], events[-1]["ts"]
    start = max(begin, (begin + end - WINDOW) / 2)
    shown = [event for event in events if event["ts"] < start + WINDOW and event["ts"] + event["dur"] > start]
    waited = {id(event) for event in waits(shown)}
    rows: dict[str, list[Event]] = {"host": [event for event in shown if event["cat"] == HOST]}
    rows["host waits"] = [event for event in shown if id(event) in waited]
    for event in shown:
        if event["cat"] in DEVICE:
            rows.setdefault(f"GPU, stream {event.get('args', {}).get('stream', event.get('tid'))}", []).append(event)
    names = sorted({event["name"] for row in rows.values() for event in row})
    colours = {name: colormaps["tab20"](number % 20) for number, name in enumerate(names)}
    figure = Figure(figsize=(12, 1.2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows.values()):
        axes.broken_barh(
            [((event["ts"] - start) / 1e3, max(event["dur"], 1) / 1e3) for event in row],
            (number - 0.4, 0.8),
            facecolors=[colours[event["name"]] for event in row],
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlim(0, WINDOW / 1e3)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("milliseconds; every colour is an operator or a kernel")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(words: Sequence[str]) -> int:
    """Play the run, write its trace's figures, and return the run's exit code."""
    place = words.index("--out")
    out, method = Path(words[place + 1]), words[0]
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)  # what an end of time has left of an earlier one
    asked = [*words[:place], *words[place + 2 :]]
    code = wait(subprocess.Popen([sys.executable, "-m", "fedkern.run", *asked, "--profile", "--out", str(run)]))
    if code:
        return code
    print(conclude(method, asked[1:], run / TRACE, out))
    return 0


def conclude(name: str, flags: Sequence[str], path: Path, out: Path) -> str:
    """Write the figures of the trace in ``path`` into ``out``, and return them in one line."""
    events = read(path)
    facts = {"commit": recorded_commit(), "method": name, "flags": list(flags), **figures(events)}
    (out / "trace.json").write_text(json.dumps(facts, indent=1) + "\n")
    busy = "no GPU" if facts["busy"] is None else f"GPU busy {100 * facts['busy']:.0f} %"
    count, seconds = (
        (sum(column) for column in zip(*facts["waits"].values(), strict=True)) if facts["waits"] else (0, 0)
    )
    title = f"{name}: {facts['seconds']:.2f} s under the profiler, {busy}, {count:.0f} waits of {seconds:.2f} s in all"
    draw(events, out / "trace.png", title)
    return title


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
