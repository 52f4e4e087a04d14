"""Comparison of two runs of a method, or of FedAvg of a network, with one seed: models bit by bit, and all metrics.

python -m benchmarks.gpu.repeats METHOD|NETWORK [--device cuda]
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import bench_methods, processes
from benchmarks.gpu import stages
from fedkern.engine.store.record_files import read_metrics

MODEL = "model.safetensors"
MEASURED = ("phases", "device")
"""Fields of a round that hold times and the GPU's load; so do all whose names end in "seconds"."""


def main(words: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 where both runs are alike, 1 where they differ or one fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.repeats", description=__doc__.split("\n")[0])
    parser.add_argument("name", metavar="METHOD|NETWORK", choices=(*bench_methods.METHODS, *stages.NETWORKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; give --device cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the run that is compared ends too
    networks = [bench_methods.Case("fedavg", name, settings) for name, settings in stages.NETWORKS.items()]
    case = next(
        case for case in (*bench_methods.CASES, *networks)
        if args.name == (case.method if case.setting == "default" else case.setting)
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="repeats-") as made:
        folders = [Path(made) / name for name in ("first", "second")]
        try:
            runs = [play(case, args.device, folder) for folder in folders]
        except processes.Failed as failure:
            print(failure)
            return 1
        sentences = differences(*runs)
    if sentences:
        print(f"{args.name}: two runs on {args.device} with one seed differ: {'; '.join(sentences)}")
        return 1
    print(f"{args.name}: two runs on {args.device} with one seed have the same model and metrics")
    return 0


def play(case: bench_methods.Case, device: str, folder: Path) -> Path:
    """Run a case with seed 0 in a new folder, and return the run folder.

    Raises:
        processes.Failed: the run failed.
    """
    working = folder / "empty"  # python -m looks for modules in the working folder first
    working.mkdir(parents=True)
    if case.boxes:
        bench_methods.write_boxes(folder / "boxes.json")
    words = [*bench_methods.run_words(case, folder, None, 0, 0), "--device", device]
    environment = bench_methods.environment(bench_methods.OURS, None)
    processes.run([sys.executable, "-m", "fedkern.run", *words], environment, working)
    return folder / "run"


def differences(first_folder: Path, second: Path) -> list[str]:
    """Return differences of two run folders that deterministic runs must not have: one of models, one of metrics."""
    sentences = []
    own, repeat = (load_file(folder / MODEL) for folder in (first_folder, second))
    if (first_folder / MODEL).read_bytes() != (second / MODEL).read_bytes():
        names = [name for name in own if name not in repeat or not _same_bits(own[name], repeat[name])]
        names += [name for name in repeat if name not in own]
        sentences.append(f"{len(names)} of the model's {len(own)} tensors, {names[0]} first" if names else f"{MODEL}")
    rounds = [[repeatable(record) for record in read_metrics(folder)] for folder in (first_folder, second)]
    if len(rounds[0]) != len(rounds[1]):
        sentences.append(f"{len(rounds[0])} and {len(rounds[1])} rounds")
    for one_round, again in zip(*rounds, strict=False):
        if one_round != again:
            names = sorted(name for name in one_round.keys() | again.keys() if one_round.get(name) != again.get(name))
            sentences.append(f"metrics from round {one_round['round']} on: {', '.join(names)}")
            break
    return sentences


def repeatable(record: Any) -> Any:
    """Return a round's record without measured values, also in its tables."""
    if not isinstance(record, dict):
        return record
    kept = {name: value for name, value in record.items() if name not in MEASURED and not name.endswith("seconds")}
    return {name: repeatable(value) for name, value in kept.items()}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether dtype, shape and memory are equal, so that a NaN equals itself and 0 is not -0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


if __name__ == "__main__":
    sys.exit(main())
