"""The command line: ``python -m fedkern.run METHOD [flags]``, ``--resume DIR``, ``list`` and ``doctor``."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence

OK, USAGE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 2, 130, 141, 143
_FULL = (errno.ENOSPC, errno.EDQUOT)
LOADAVG, LOOKS = "/proc/loadavg", 4
_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "Storage size calculation overflowed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after ``python -m fedkern.run``; None takes them from ``sys.argv``.

    Returns:
        0; 2 for anything the user can put right and 1 for a run that failed, such as one whose model is not finite (one
        sentence on standard error); 130 after Ctrl-C, 143 after SIGTERM, 141 when the reader of standard output has
        gone.
    """
    from fedkern.interrupts import in_order

    _wait_without_spinning()
    words = list(sys.argv[1:] if argv is None else argv)
    with in_order(to_the_end=argv is None):
        return _guarded(words)


def _guarded(words: list[str]) -> int:
    """Runs one command and says in a sentence what ended it."""
    from fedkern.errors import UserError
    from fedkern.interrupts import Terminated, ended

    try:
        code = _dispatch(words)
        sys.stdout.flush()  # a reader that has gone shows here, not at exit
        return code
    except UserError as error:
        print(getattr(error, "traceback", ""), end="", file=sys.stderr)  # of a client's part of a method
        return _say(str(error), error.exit_code)
    except BrokenPipeError:
        # The interpreter flushes both once more at exit, which must not fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno in _FULL:
            where = f" while writing {error.filename}" if error.filename else ""
            return _say(f"the disk is full{where}; free some space, then try again, or go on with --resume")
        if error.filename is None:
            raise
        return _say(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt as stop:
        ended()
        asked = isinstance(stop, Terminated)
        print("terminated" if asked else "interrupted", file=sys.stderr)
        return TERMINATED if asked else INTERRUPTED
    except MemoryError as error:
        why = f" ({error})" if str(error) else ""
        return _say(
            f"the machine has not enough memory{why}; use fewer --train-samples, smaller images (--data-option size=N, "
            "where the data set has it), or a smaller --batch-size, --model or --width"
        )
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_MEMORY):
            return _say("the machine has not enough memory; use a smaller --batch-size, --model or --width")
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _say("the GPU has not enough memory; use a smaller --batch-size or --model, or --device cpu")


def _wait_without_spinning() -> None:
    """Lets OpenMP's threads sleep between parallel regions, or spin for a moment before, unless the user has said how.

    By default they spin for milliseconds.  With two threads on two cores and anything else running, a small network
    then trains several times slower than on one thread (20 s against more than a minute was seen), and nothing is said.
    Asleep at once, they take longer to wake: where nothing else runs, a round of FedIOD with two threads takes 1.4
    times as long.  So on an idle machine they spin for a tenth of a millisecond, which costs at most a factor of two
    should the machine become busy.  The OpenMP runtime reads this once, when torch is loaded.
    """
    if "torch" in sys.modules or "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    if _others_leave_cores():
        os.environ["GOMP_SPINCOUNT"] = "10000"
    else:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _others_leave_cores() -> bool:
    """Whether as many cores are idle as this process may use; no where the system does not tell.

    A process that runs for a moment, as the one that started this one does, is not what was meant: one idle look of
    several is enough.
    """
    try:
        for _ in range(LOOKS):
            with open(LOADAVG, encoding="ascii") as file:  # noqa: PTH123 (pathlib takes milliseconds to import)
                running = int(file.read().split()[3].partition("/")[0])
            if len(os.sched_getaffinity(0)) + running - 1 <= (os.cpu_count() or 1):
                return True
            time.sleep(0.003)
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    return False


def _dispatch(words: list[str]) -> int:
    # Imported here so that Ctrl-C during the second that torch takes to load ends in a line, not in a traceback.
    from fedkern.cli import commands, downstream, flags, tuning
    from fedkern.files import check_text

    for word in words:
        check_text(word, "the argument")
    request = downstream.parse(words) or tuning.parse(words) or flags.parse(words)
    if request.command == "help":
        print(request.help)
        return OK
    return commands.COMMANDS[request.command](request)


def _say(text: str, code: int = USAGE) -> int:
    from fedkern.errors import printable

    text = printable(" ".join(text.split()))
    print(f"error: {text}" + ("" if text.endswith((".", "?", "!")) else "."), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
