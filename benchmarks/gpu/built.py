"""Succeeds where the CUDA core is built from the present csrc/ for one architecture, so that nothing is to be built.

python -m benchmarks.gpu.built 90
"""

from __future__ import annotations

import sys

from benchmarks import sources
from fedkern.ops._core.loading import Unavailable, load_core


def main(architecture: str) -> int:
    """The exit code: 0 where nothing is to be built."""
    try:
        core = load_core("_cuda")
    except Unavailable:
        return 1
    fresh = core.source_hash() == sources.hashes(sources.CSRC)["_cuda"]
    return int(not (fresh and int(architecture) in core.architectures()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
