"""Command line of `all.sh`."""

import argparse
import hashlib
import math
import subprocess
import sys
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.playing import CUT, FAILED, RECORD, Playing
from benchmarks.gpu.stages import ROOT, Stage, plan
from benchmarks.recorded import recorded_commit

ABSENT = "there is no NVIDIA GPU here (nvidia-smi lists none): run it on a machine that has one"


def main(words: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 where all has passed, 1 where something failed or is left, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/all.sh", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages, or first words of them; all by default")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of logs and results, %(default)s")
    parser.add_argument("--minutes", type=float, help="time after which no more is begun, and what goes on is ended")
    parser.add_argument("--data-root", help="folder of CIFAR-10 and MNIST, for runs at published scale")
    parser.add_argument(
        "--packed",
        type=Path,
        metavar="FILE",
        help="also write everything into this .tar.gz; where the folder is new, begin with what the file has",
    )
    parser.add_argument("--again", action="store_true", help="play what has passed too")
    parser.add_argument("--list", action="store_true", help="print the stages and what became of them")
    args = parser.parse_args(words)
    out = args.out.resolve()
    facts = gpu()
    if facts is None and not args.list:
        parser.error(ABSENT)
    all_stages = plan(facts["capability"] if facts else "9.0", out, args.data_root)
    chosen = [stage for stage in all_stages if not args.stages or any(_means(stage, word) for word in args.stages)]
    unknown = [word for word in args.stages if not any(_means(stage, word) for stage in all_stages)]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}: --list names them")
    if args.packed is not None and args.packed.exists() and not (out / RECORD).exists():
        with tarfile.open(args.packed) as packed:
            packed.extractall(out, filter="data")
    if args.list:
        known = Playing(out, {}, "").done if (out / RECORD).exists() else {}
        for stage in chosen:
            print(f"{stage.name}: {known.get(stage.name, {}).get('outcome', 'not played')}")
        return 0
    playing = Playing(out, facts or {}, code(), None if args.minutes is None else 60 * args.minutes)
    try:
        left = playing.play(chosen, again=args.again)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    finally:
        if args.packed is not None:
            pack(out, args.packed)
    failed = [stage.name for stage in chosen if playing.done.get(stage.name, {}).get("outcome") == FAILED]
    left += [stage for stage in chosen if playing.done.get(stage.name, {}).get("outcome") == CUT and stage not in left]
    if failed:
        print(f"failed: {', '.join(failed)} (logs in {out / 'logs'})")
    if left:
        print(f"{len(left)} stages are left, from {left[0].name!r} on: the same command goes on")
    return int(bool(failed or left))


def _means(stage: Stage, word: str) -> bool:
    return stage.name == word or stage.name.startswith(f"{word} ")


def gpu() -> dict[str, Any] | None:
    """Return the first GPU, or None without one."""
    names = ("name", "compute_cap", "driver_version", "memory.total")
    try:
        asked = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    if not lines:
        return None
    name, capability, driver, memory = (word.strip() for word in lines[0].split(","))
    return {
        "gpu": name,
        "capability": capability,
        "driver": driver,
        "memory": memory,
        "python": sys.version.split()[0],
        "commit": recorded_commit(),
    }


def code() -> str:
    """Return a name of the code: a digest of all files that stages run, committed or not."""
    total = hashlib.sha256()
    for folder in ("csrc", "cmake", "fedkern", "benchmarks", "python_tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".txt", ".cmake"}:
                total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def pack(out: Path, target: Path, kinds: Collection[str] = (), room: float = math.inf) -> None:
    """Write the files of a folder into a .tar.gz: those of ``kinds`` alone, and no more than ``room`` bytes."""
    partial = target.with_name(f"{target.name}.partial")
    with tarfile.open(partial, "w:gz") as packed:
        for path in sorted(out.rglob("*")):
            if not path.is_file() or path.resolve() in (target.resolve(), partial.resolve()):
                continue
            size = path.stat().st_size
            if size <= room and (not kinds or path.suffix in kinds):
                room -= size
                packed.add(path, path.relative_to(out))
    partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
