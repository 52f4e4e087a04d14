"""The command line: ``fedkern METHOD [flags]``, ``--resume DIR``, ``list`` and ``doctor``.

``python -m fedkern.run`` is the same command.
"""

import atexit
import errno
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn

OK, FAILED, USAGE, BROKEN_PIPE = 0, 1, 2, 141
_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``fedkern`` (None: of ``sys.argv``).

    Returns:
        The exit code (1 and 2 with one sentence on standard error):

        - 0: success.
        - 1: a failed run, for example because the model is not finite, or a failed write to standard output, as on a
          full disk.
        - 2: an error that the user can correct.
        - 130: Ctrl-C.
        - 141: the reader of standard output has gone.
        - 143: SIGTERM.
    """
    from fedkern.process.interrupts import in_order
    from fedkern.process.launcher import without_leftovers
    from fedkern.process.standard_streams import open_closed, tolerate_lost_output

    tolerate_lost_output() if argv is None else open_closed()
    # OpenMP threads spin for about 0.1 ms between parallel regions, unless the user has chosen otherwise. By default
    # they spin for milliseconds, and two threads on two busy cores train a small network over 3 times slower. If they
    # slept at once, a FedIOD round with two threads would take 1.4 times as long on an idle machine. The OpenMP runtime
    # reads the setting once, when torch is loaded.
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    words = list(sys.argv[1:] if argv is None else argv)
    with in_order(to_the_end=argv is None), without_leftovers() as leftover:
        return _run_guarded(words, leftover)


def command() -> int:
    """Run the command of this process, as ``python -m fedkern.run`` and ``fedkern`` do, and end the process.

    With torch loaded the interpreter takes 0.4 seconds to take all modules apart, so this function ends the process
    itself.

    Returns:
        The exit code of :func:`main` if the interpreter has to end the process: torch is not loaded, work follows the
            command, or foreign code may count on how the interpreter ends.
    """
    code = main()
    if _nothing_follows() and _modules_need_no_end():
        _end_process(code)
    return code


def _nothing_follows() -> bool:
    """Return whether nothing runs after :func:`command` returns to a module that ``python`` was started with.

    A profiler or a debugger that runs the module still has work to do, as has ``python -i``.
    """
    if sys.flags.inspect or "PYTHONINSPECT" in os.environ:
        return False
    above = sys._getframe(2).f_back
    while above is not None and above.f_globals.get("__name__") == "runpy":  # python -m
        above = above.f_back
    return above is None


def _modules_need_no_end() -> bool:
    """Return whether torch is loaded, and no module has work left for the interpreter's end.

    Libraries of a plugin, such as HDF5, and profilers of CUDA write their data when the C library ends the process.
    """
    torch, plugins = sys.modules.get("torch"), sys.modules.get("fedkern.usercode.plugins")
    if torch is None or torch.cuda.is_initialized():
        return False
    return plugins is None or not plugins.loaded_plugins()


def _end_process(code: int) -> NoReturn:
    """End the process as the interpreter does, but without taking modules apart and without C's exit handlers."""
    with suppress(KeyboardInterrupt):  # as in the interpreter, Ctrl-C only ends the wait
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads, those of executors as well
    atexit._run_exitfuncs()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End the process at once, after flushing its output."""
    from fedkern.process.standard_streams import flush_c_streams

    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]
    flush_c_streams()
    os._exit(code)


def _run_guarded(words: list[str], leftover: bool) -> int:
    """Run one command and turn the exception that ended it into a sentence and an exit code."""
    from fedkern.errors import NO_MEMORY, UserError
    from fedkern.files.filesystem import check_working_folder
    from fedkern.process.interrupts import end_by
    from fedkern.process.standard_streams import has_lost_output, results_alone

    try:
        check_working_folder()
        with results_alone() if "--json" in words else nullcontext():
            code = _dispatch(words, leftover)
        sys.stdout.flush()  # a reader that has gone shows here, not at exit
        return FAILED if code == OK and has_lost_output() else code
    except UserError as error:
        print(getattr(error, "traceback", ""), end="", file=sys.stderr)  # ClientFailed and CodeFailed have one
        return _say(str(error), error.exit_code)
    except BrokenPipeError:
        # The interpreter flushes both streams once more at exit, which must not fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return BROKEN_PIPE
    # Errors of the machine that the user can do something about. Others keep their traceback.
    except OSError as error:
        if error.errno in _FULL:
            where = f" while writing {error.filename}" if error.filename else ""
            return _say(f"the disk is full{where}; free some space, then try again, or go on with --resume")
        if error.filename is None:
            raise
        way_out = "; choose a shorter name" if error.errno == errno.ENAMETOOLONG else ""
        return _say(f"{error.filename}: {error.strerror}{way_out}")
    except SystemExit as error:  # sys.exit in user code must not pass for success
        return _say(f"code that the command runs called sys.exit({error.code!r}): let it raise an exception", FAILED)
    except KeyboardInterrupt as stop:
        word, code = end_by(stop)
        if _first():
            print(word, file=sys.stderr)
        return code
    except MemoryError as error:
        why = f" ({error})" if str(error) else ""
        return _say(
            f"the machine has not enough memory{why}; use fewer --train-samples, smaller images (--data-option size=N, "
            "where the data set has it), or a smaller --batch-size, --model or --width"
        )
    except RuntimeError as error:
        if any(words in str(error) for words in NO_MEMORY):
            return _say("the machine has not enough memory; use a smaller --batch-size, --model or --width")
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _say("the GPU has not enough memory; use a smaller --batch-size or --model, or --device cpu")


def _dispatch(words: list[str], leftover: bool) -> int:
    if words == ["--version"]:
        from fedkern import __version__

        print(f"fedkern {__version__}")
        return OK
    if words in (["--help"], ["-h"]):
        from fedkern.cli import extensions, front_page

        extensions.load_plugins(words)
        if _first():
            print(front_page.front_page())
        return OK
    from fedkern.cli import extensions, flag_cache
    from fedkern.errors import UserError
    from fedkern.files.filesystem import check_text
    from fedkern.process.garbage import without_collection
    from fedkern.process.standard_streams import print_result

    for word in words:
        check_text(word, "the argument")
    answer, keep_flags = flag_cache.consult(words)
    if answer is not None:
        print_result(answer)
        return OK
    # Imported here so that Ctrl-C during the second that torch takes to load prints one line, not a traceback.
    with _show_waiting("loading torch ..."), without_collection():
        from fedkern.cli import command_parser, torchrun

        command_parser.load_command(command_parser.find_command(words))
    extensions.load_plugins(words)
    request = None
    try:
        request = command_parser.parse_words(words)
    finally:
        if request is None or request.command in ("help", "list"):
            keep_flags()
    if leftover and request.command in torchrun.RUNS:
        raise UserError(
            "torchrun's variables are set, but torchrun did not start this process: unset TORCHELASTIC_RUN_ID for a "
            "run of its own, or, in the script that torchrun starts, write `exec fedkern ...`."
        )
    return torchrun.play_on_ranks(request, words, command_parser.play_request)


@contextmanager
def _show_waiting(text: str) -> Iterator[None]:
    if "torch" in sys.modules or not sys.stderr.isatty() or not _first():
        yield
        return
    print(text, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(" " * len(text), end="\r", file=sys.stderr, flush=True)


def _say(text: str, code: int = USAGE) -> int:
    from fedkern.errors import make_printable

    if _reported_by_other_rank():
        return code
    text = make_printable(" ".join(text.split()))
    print(f"error: {text}" + ("" if text.endswith((".", "?", "!")) else "."), file=sys.stderr)
    return code


def _first() -> bool:
    """Return whether this process is torchrun's rank 0, which alone prints common messages, or not under torchrun."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def _reported_by_other_rank() -> bool:
    """Return whether another rank reports this error.

    Before ranks meet, all have the error, and the first of a machine reports it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    ranks = sys.modules.get("fedkern.engine.transport.torchrun_group")
    return ranks is None or not ranks.is_connected()


if __name__ == "__main__":
    sys.exit(command())
