"""Variables of torchrun in processes that torchrun has not started: children of a rank, and shells with leftovers.

Such a process would take itself for a rank. With the variables of rank 3 of 8, ``fedkern list`` and a mistaken flag
print nothing, as only the first rank speaks, and a run waits 600 seconds for the other ranks before it fails.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

JOB = "TORCHELASTIC_RUN_ID"


def _started_by_launcher() -> bool:
    """Return whether the parent has PyTorch loaded and has set torchrun's variables itself, or is unknown.

    A process in between, such as a rank or a shell, has inherited the variables, or has no PyTorch.
    """
    if not os.path.exists("/proc/self/environ"):  # noqa: PTH110 (pathlib takes milliseconds to import)
        return True
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/environ", "rb") as file:  # noqa: PTH123
            inherited = dict(line.partition(b"=")[::2] for line in file.read().split(b"\0"))
        with open(f"/proc/{parent}/maps", "rb") as file:  # noqa: PTH123
            has_torch = b"/libtorch" in file.read()
    except OSError:  # another user's, or gone
        return False
    names = (JOB, "RANK", "TORCHELASTIC_RESTART_COUNT")
    are_same = all(inherited.get(name.encode()) == os.environb.get(name.encode()) for name in names)
    return has_torch and not are_same


@contextmanager
def without_leftovers() -> Iterator[bool]:
    """Hide a job of torchrun that has not started this process, and yield whether one was hidden."""
    if JOB not in os.environ or _started_by_launcher():
        yield False
        return
    job = os.environ.pop(JOB)
    try:
        yield True
    finally:
        os.environ[JOB] = job
