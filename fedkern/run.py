"""The command line: ``python -m fedkern.run METHOD [flags]``, ``--resume DIR``, ``list`` and ``doctor``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

OK, USAGE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 0, 2, 130, 141, 143
_FULL = (errno.ENOSPC, errno.EDQUOT)
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
    """Lets OpenMP's threads sleep between parallel regions unless the user has said otherwise.

    They spin by default.  With two threads on two cores and anything else running, a small network then trains several
    times slower than on one thread (20 s against more than a minute was seen), and nothing is said.  The OpenMP runtime
    reads this once, when torch is loaded.
    """
    if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
