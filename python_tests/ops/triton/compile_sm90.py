"""Compiler of the Triton kernels for sm_90, without a GPU, that reports ptxas' words about each.

``python python_tests/ops/triton/compile_sm90.py [--full]`` calls the Triton launchers of ``fedkern/ops`` as
:mod:`sm90_cases` lists, with a driver that names a target but has no device: Triton specialises and compiles every
launch as it would on that GPU, and launches nothing.  Prints one line of JSON per compiled kernel.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from typing import Any

# Decided when the kernels are decorated.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget

from python_tests.ops.triton import sm90_cases

TARGET = GPUTarget("cuda", 90, 32)
PROCESSORS = 132


class Driver:
    """Driver of a device that can be compiled for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


class Recorder:
    """Stand-in for ``launch``: compiles each launch, each specialisation once."""

    def __init__(self, registers: int | None) -> None:
        self.case = ""
        self.more = {} if registers is None else {"maxnreg": registers}
        self.seen: set[str] = set()

    def __call__(self, kernel: Any, programs: int, device: torch.device, *arguments: Any, **meta: Any) -> None:
        if not programs:
            return
        begin = time.perf_counter()
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = kernel.run(
                *arguments, grid=(programs,), warmup=True, enable_fp_fusion=False, **{**meta, **self.more}
            )
            compiled = compiled.result() if hasattr(compiled, "result") else compiled
        if compiled.hash in self.seen:
            return
        self.seen.add(compiled.hash)
        line = {"kernel": kernel.fn.__name__, "case": self.case, **spills(log.getvalue())}
        print(json.dumps({**line, "seconds": round(time.perf_counter() - begin, 2)}), flush=True)


def spills(log: str) -> dict[str, int]:
    """Return registers and spilled bytes, from the output of ``ptxas -v``."""
    bytes_ = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not bytes_ or not registers:
        raise RuntimeError(f"ptxas says nothing about spills: {log}")
    return {
        "registers": max(int(n) for n in registers),
        "spill_stores": sum(int(stores) for stores, _ in bytes_),
        "spill_loads": sum(int(loads) for _, loads in bytes_),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every dtype with every size class")
    parser.add_argument("--family", help="one family of sm90_cases only")
    parser.add_argument("--registers", type=int, help="give a thread no more than these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True  # Triton itself runs ptxas -v
        triton.runtime.driver.set_active(Driver())
        recorder = Recorder(options.registers)
        with sm90_cases.record_launches(recorder, PROCESSORS):
            for name, run in sm90_cases.cases(options.full):
                if options.family in (None, name.partition(" ")[0]):
                    recorder.case = name
                    run()


if __name__ == "__main__":
    sys.exit(main())
