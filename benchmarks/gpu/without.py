"""Run with a part of the engine switched off, to compare seconds, while the bits stay the same.

python -m benchmarks.gpu.without PART METHOD FLAG ... --workers 1 --out DIR    # PART: graphs, lanes, or nothing
"""

import shutil
import sys
from collections.abc import Sequence
from typing import Any

from fedkern.engine.local import lanes, training
from fedkern.run import main as play

PARTS: dict[str, tuple[Any, str, Any]] = {
    "graphs": (training, "is_replayable", lambda *_: False), "lanes": (lanes, "MOST", 1),
}  # fmt: skip
"""What to put in whose place."""


def main(words: Sequence[str]) -> int:
    """Play the run in this process and return its exit code."""
    shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)  # what an end of time has left of an earlier one
    if words[0] != "nothing":
        setattr(*PARTS[words[0]])
    return play(words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
