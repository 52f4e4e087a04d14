"""Check that the CUDA core is built from the present csrc/ for one architecture, so that no build is needed.

python -m benchmarks.gpu.built 90
"""

import sys

from fedkern.ops._core.loading import Unavailable, load_core, stale_cores


def main(architecture: str) -> int:
    """Return the exit code: 0 where no build is needed."""
    try:
        core = load_core("_cuda")
    except Unavailable:
        return 1
    return int(core.__name__ in stale_cores() or int(architecture) not in core.architectures())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
