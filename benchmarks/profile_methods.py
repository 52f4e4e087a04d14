"""Seconds of default runs by part: every method's run, shortened, under torch.profiler.

    python -m benchmarks.profile_methods                  # writes results/profile_<cpu>.json
    python -m benchmarks.profile_methods --methods fedgid --dry

A run is a process of its own, on one thread, with all clients in that process.  Every event's own time belongs to one
part: that of the region it lies in (evaluation, batches, optimiser ...), else that of its operator (convolutions, batch
norm ...), else "other tensor operators".  Time that no event covers is Python's.  The profiler itself makes runs of
many small operators longer, so the same run's seconds without it stand beside.
"""

import argparse
import functools
import importlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_methods, comparisons, machines, processes
from benchmarks.bench_methods import CASES, METHODS, Case

START, LOAD, EVALUATE, BATCHES, STEP, OURS, KEEP = (
    "start-up, imports", "loading data", "evaluation", "gathering batches", "optimiser", "our operators", "checkpoints",
)  # fmt: skip
FORWARD, BACKWARD, NORM, PRODUCTS = "convolutions forward", "convolutions backward", "batch norm", "matrix products"
OTHER, PYTHON = "other tensor operators", "Python, other"
PARTS = (FORWARD, BACKWARD, NORM, PRODUCTS, OTHER, OURS, BATCHES, STEP, EVALUATE, KEEP, LOAD, START, PYTHON)
WHOLE = "whole run"  # the region around all others

REGIONS = {
    "fedkern.settings.run_data:load_data": LOAD,
    "fedkern.data.images.pixels:Pixels.take": BATCHES,
    "fedkern.tasks.retrieval:Retrieval.targets": BATCHES,
    "fedkern.engine.parts.evaluation:Evaluation._evaluate": EVALUATE,
    "fedkern.engine.parts.checkpointing:Checkpointing.round_end": KEEP,
    "fedkern.engine.rounds.round_log:ClientStates._write": KEEP,
    "fedkern.engine.local.training:stepper": STEP,
    "fedkern.models.networks.conv_norm_layers:run_conv_norm": OURS,
}
"""Functions whose time is one part, as module:name, where a run looks them up; of `stepper` it is the step."""
OPERATORS = (
    "Accumulator.add", "Accumulator.mean", "FlatParameters.load_vectors", "blend", "consensus",
    "contrastive", "dual_kl", "ensemble_kl", "entropy", "fuse_concat", "fuse_mean", "js_div", "kl_div", "server_step",
    "weighted_mean",
)  # fmt: skip
"""What of fedkern.ops a method calls."""
SHORTER: Mapping[str, Mapping[str, Any]] = {
    "fedlpfm": {"rounds": 6}, "fusefl": {"local_epochs": 4}, "fediod": {"rounds": 2, "local_epochs": 5},
}  # fmt: skip
ROUNDS = 2


# -- regions -----------------------------------------------------------------------------------------------------------


def mark_function(function: Callable[..., Any], region: str) -> Callable[..., Any]:
    """Return the function as a region of the profile."""
    from torch.profiler import record_function

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"fedkern/{region}"):
            return function(*args, **kwargs)

    return inside


def mark(path: str, region: str) -> None:
    """Put :func:`mark_function` in the place of the function at "module:name" or "module:Class.name".

    Raises:
        AttributeError: there is no such function any more.
    """
    module, _, name = path.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    function = getattr(holder, last)
    if region == STEP:  # a function that makes the one that counts

        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> Any:
            steps = function(*args, **kwargs)
            return steps._replace(step=mark_function(steps.step, region))

        setattr(holder, last, make)
    else:
        setattr(holder, last, mark_function(function, region))


def mark_all() -> None:
    """Mark every region and operator."""
    for path, region in REGIONS.items():
        mark(path, region)
    for name in OPERATORS:
        mark(f"fedkern.ops:{name}", OURS)


def functions_of_ours() -> set[str]:
    """Return the names of the backward passes of fedkern's operators in a profile."""
    import torch

    def below(kind: type) -> Iterator[type]:
        for subclass in kind.__subclasses__():
            yield subclass
            yield from below(subclass)

    kinds = below(torch.autograd.Function)
    return {f"{kind.__name__}Backward" for kind in kinds if kind.__module__.startswith("fedkern.")}


# -- events ------------------------------------------------------------------------------------------------------------


def part_of(name: str, ours: Iterable[str] = ()) -> str | None:
    """Return the part of a run to which an event of this name belongs, or None for its parent's part."""
    name = name.rpartition("autograd::engine::evaluate_function: ")[2]
    if name.startswith("fedkern/"):
        return name.partition("/")[2]
    if name.startswith("fedkern::") or name in ours:
        return OURS
    if name.startswith("Optimizer.step#"):
        return STEP
    operator = name.removeprefix("aten::").lower()
    if "batch_norm" in operator or "batchnorm" in operator:
        return NORM
    if "conv" in operator:
        return BACKWARD if "backward" in operator else FORWARD
    products = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "einsum")
    if operator in products or operator.startswith(tuple(f"{product}backward" for product in products)):
        return PRODUCTS
    return None


def divide(events: Iterable[Any], ours: Iterable[str] = ()) -> dict[str, float]:
    """Return seconds by part: every event's own time, of the thread of the whole run.

    Args:
        events: torch.profiler's, with ``name``, ``cpu_parent``, ``self_cpu_time_total`` in microseconds and ``thread``.
    """
    events, ours = list(events), set(ours)
    thread = next(event.thread for event in events if event.name == f"fedkern/{WHOLE}")
    known: dict[int, str] = {}
    regions = {*REGIONS.values(), OURS, STEP}

    def part(event: Any) -> str:
        stack = []
        while event is not None and id(event) not in known:
            stack.append(event)
            event = event.cpu_parent
        above = WHOLE if event is None else known[id(event)]
        for entry in reversed(stack):
            region = part_of(entry.name, ours)
            if above in (EVALUATE, LOAD, KEEP) or (above in regions and region not in regions):
                region = above  # a region keeps what happens in it
            above = known[id(entry)] = above if region is None else region
        return above

    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.thread == thread:
            name = part(event)
            # An operator below the whole run alone has no part yet; the whole run's own time is Python's.
            if name == WHOLE:
                name = PYTHON if event.name == f"fedkern/{WHOLE}" else OTHER
            seconds[name] += event.self_cpu_time_total / 1e6
    return seconds


# -- a run -------------------------------------------------------------------------------------------------------------


def child(words: Sequence[str], started: float, out: Path) -> int:
    """Run ``python -m fedkern.run`` with these words under the profiler, and write seconds by part."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    import fedkern.cli.commands.run
    import fedkern.engine.run  # noqa: F401
    from fedkern import run

    mark_all()
    begun = time.time()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        code = mark_function(run.main, WHOLE)(list(words))
    ended = time.time()
    if code == 0:
        seconds = divide(profiler.events(), functions_of_ours())
        seconds[START] += begun - started
        out.write_text(json.dumps({"seconds": ended - started, "parts": seconds, "torch": torch.__version__}))
    return code


def shorten(case: Case) -> Case:
    """Return the case with fewer rounds: events take memory."""
    settings = {**case.settings, **({} if case.method == "fusefl" else {"rounds": ROUNDS})}
    return Case(case.method, case.setting, {**settings, **SHORTER.get(case.method, {})}, case.options)


def profile_case(case: Case) -> dict[str, Any]:
    """Return seconds of a run, in all, by part, and without the profiler."""
    environment = {**bench_methods.environment(bench_methods.OURS, None), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory(prefix="profile-") as made:
        folder = Path(made)
        plain, watched = folder / "plain", folder / "watched"
        for out in (plain, watched):
            (out / "empty").mkdir(parents=True)
        words = {out: [*bench_methods.run_words(case, out, None, 0, 1), "--workers", "1"] for out in (plain, watched)}
        cost = processes.run([sys.executable, "-m", "fedkern.run", *words[plain]], environment, plain / "empty")
        command = [sys.executable, "-m", "benchmarks.profile_methods", "--child", str(folder / "parts.json")]
        command += [str(time.time()), *words[watched]]
        processes.run(command, environment, watched / "empty")
        parts = json.loads((folder / "parts.json").read_text())
    return {"method": case.method, "settings": dict(case.settings), "unwatched_seconds": cost.seconds, **parts}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--child"]:
        return child(words[3:], float(words[2]), Path(words[1]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_methods", description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--results", type=Path, default=comparisons.RESULTS, help="folder to write to")
    parser.add_argument("--dry", action="store_true", help="print the results and write nothing")
    args = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the run that is measured ends too
    machine = machines.machine("cpu")
    path = args.results / f"profile_{comparisons.slug(machine)}.json"
    runs = [profile_case(shorten(case)) for case in CASES if case.setting == "default" and case.method in args.methods]
    content = json.dumps({"machine": machine, "runs": runs}, indent=1)
    if not args.dry:
        args.results.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    print(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
