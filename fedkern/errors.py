"""Errors for the user, each with a message of one sentence."""

from __future__ import annotations

import difflib
import re
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

WORD, MESSAGE, TRACEBACK = 1000, 4000, 32_000
"""Longest word, message and traceback shown, in characters, because a name from a file can have any length."""


NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "Storage size calculation overflowed")
"""Words of the RuntimeError that torch raises for exhausted memory."""
RAISED = (Exception, SystemExit, GeneratorExit)
"""Exceptions that user code may raise by mistake. A KeyboardInterrupt is the user's own."""
SYNONYMS = {
    **dict.fromkeys(("learning_rate", "client_lr", "eta"), ("lr",)),
    **dict.fromkeys(("epochs", "num_epochs"), ("local_epochs", "rounds")),
    **dict.fromkeys(("gpu", "gpus", "use_cuda", "cuda"), ("device=cuda", "cuda")),
    **dict.fromkeys(("continue", "restart", "checkpoint"), ("resume",)),
    **dict.fromkeys(("resume", "resume_from"), ("fedkern.load(DIR).resume()",)),
    "quiet": ("progress=False",),
    **dict.fromkeys(("num_clients", "n_clients", "nodes", "num_nodes", "num_partitions"), ("clients",)),
    **dict.fromkeys(("noniid", "non_iid", "alpha", "dirichlet", "dirichlet_alpha"), ("partition=dirichlet:ALPHA",)),
    **dict.fromkeys(("loss", "loss_function", "criterion"), ("loss_fn",)),
    **dict.fromkeys(("net", "network"), ("model",)),
    **dict.fromkeys(("scheduler", "lr_scheduler"), ("lr_decay", "lr_end", "lr_steps")),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "log_dir", "folder"), ("out",)),
    **dict.fromkeys(("callback", "callbacks", "logger"), ("listener",)),
    **dict.fromkeys(("clients_per_round", "participation", "fraction", "fraction_fit"), ("sample_fraction",)),
    "iid": ("partition=iid",),
    "bs": ("batch_size",),
    "seeds": ("seed",),
    "tensorboard": ("listener=fedkern.listeners.TensorBoard()",),
    **dict.fromkeys(("on_epoch_end", "on_train_epoch_end", "on_round_end"), ("on_round",)),
    **dict.fromkeys(("on_train_begin", "on_train_start"), ("on_start",)),
    "on_train_end": ("on_end",),
}
"""Names of other programs or of the command line, and the names here that mean the same, some with a value."""

_LOSS = "A loss of your own is given in Python, fedkern.simulate(METHOD, data=..., loss_fn=FUNCTION)."
_ADAPTERS = "LoRA is the method fedlora, whose options are rank, alpha, scaling and layers (docs/models.md)."
_VOLUMES = "Volumes are read by your own code: --data FILE.py:NAME, as examples/papers/brats.py:brats (docs/data.md)."
_RULES = "FedAvgM, FedAdam, FedYogi and FedAdagrad are fedavg and --server-rule momentum, adam, yogi or adagrad."
ADVICE = {
    **dict.fromkeys(("loss", "criterion", "loss_fn"), _LOSS),
    **dict.fromkeys(("lora", "peft", "adapter", "lora_rank", "lora_r"), _ADAPTERS),
    **dict.fromkeys(("nifti", "nii", "dicom"), _VOLUMES),
    **dict.fromkeys(("fedopt", "fedadam", "fedavgm", "fedyogi", "fedadagrad"), _RULES),
    "fedbn": "FedBN is fedavg and the names of the batch norms, --personal NAMES (docs/uploads.md).",
    "method": "Give the method without a flag: fedkern METHOD.",
    "seeds": "For several seeds use compare --seeds N.",
    "task": "The task follows from the labels. For a csv file --data-option task=NAME decides (docs/data.md).",
}
"""Names that no setting, method, network or data set here has, and the way to what they mean."""


class UserError(Exception):
    """A mistake in the input (flag, path, file, value), not in fedkern.

    The message is one sentence that says what is wrong and what to do. The command line prints it on standard error and
    exits with ``exit_code``. A library caller sees an ordinary exception.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(make_printable(str(message)))


class NoEffect(UserError):
    """A mistake that shows during a run: a setting without effect, or state that no file holds. Nothing new is kept."""


class OtherFormat(UserError):
    """A stored file in a format that this version of fedkern does not read (see :func:`require_format`)."""


def require_format(path: object, found: object, read: int) -> None:
    """Raise OtherFormat unless a file's format number ``found`` (None: the file has none) equals ``read``."""
    if found == read:
        return
    found_format = "no format number" if found is None else f"format {found!r}"
    raise OtherFormat(
        f"{path} has {found_format}, and this version of fedkern reads format {read}: use the version that wrote it, "
        "or make it again."
    )


class Malformed(ValueError):
    """Bytes or values from outside that fedkern would not write.

    The text gives the reason, as the end of a sentence.
    """


class RunFailed(UserError):
    """A run that failed without a result to keep, although every input was valid. Exit code 1."""

    exit_code = 1


class CodeFailed(RunFailed):
    """An exception from a method's code that would look like an error of fedkern or of the machine."""

    def __init__(self, where: str, error: BaseException, code: object) -> None:
        description = f"{describe_error(error)}{error_origin(error, code)}"
        super().__init__(f"{where}: {description}; the traceback names the file to mend.")
        self.traceback = format_traceback(error)
        self.__cause__ = error


class ClientFailed(RunFailed):
    """A client's part of a method raised an exception.

    Attributes:
        what: the exception, in one line.
        traceback: the exception's traceback as text, empty for a UserError, whose sentence is enough.
    """

    def __init__(
        self, client: int, description: str, traceback: str = "", when: str = "", label: str = "", exit_code: int = 1
    ) -> None:
        way = "; mend the code that failed, or leave such clients out with --on-error skip" if exit_code == 1 else ""
        super().__init__(f"Client {label or client} failed{f' {when}' if when else ''}: {description}{way}.")
        self.what, self.traceback = make_printable(description), make_printable(traceback, TRACEBACK)
        self.client, self.when, self.label, self.exit_code = client, when, label, exit_code

    def __reduce__(self) -> tuple[type, tuple[int, str, str, str, str, int]]:
        return ClientFailed, (self.client, self.what, self.traceback, self.when, self.label, self.exit_code)

    @staticmethod
    def of(client: int, error: BaseException, code: object) -> ClientFailed:
        """Return the error of a client whose part of a method, the class ``code``, has raised ``error``."""
        sentence = user_message(error)
        description = (describe_error(error) if sentence is None else sentence.rstrip(".")) + error_origin(error, code)
        trace, exit_code = (format_traceback(error), 1) if sentence is None else ("", error.exit_code)  # type: ignore[attr-defined]
        failed = ClientFailed(client, description, trace, exit_code=exit_code)
        failed.__cause__ = error
        return failed

    def at(self, when: str, label: str = "") -> ClientFailed:
        """Return the same error with the round ``when`` and the client's number and name ``label`` in the message."""
        return ClientFailed(self.client, self.what, self.traceback, when, label, self.exit_code)


def user_message(error: BaseException) -> str | None:
    """Return the sentence of a UserError, None for another exception or where the text cannot be made."""
    return str(error) if isinstance(error, UserError) and has_short_text(error) else None


def error_origin(error: BaseException, code: object) -> str:
    """Return file and line of ``code`` where an exception passed, as ``" (FILE, line N)"``, or "".

    ``code`` is a function, or a class, whose bases are searched after it. A :class:`UserError` raised by fedkern has no
    origin, as it explains itself.
    """
    frames = [
        (str(frame.f_globals.get("__name__")), frame, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    if isinstance(error, UserError) and frames and frames[-1][0].startswith("fedkern."):
        return ""
    installed = sysconfig.get_paths()
    outside = [
        where
        for where in frames
        if not where[0].startswith(("fedkern.", "torch."))
        and not where[1].f_code.co_filename.startswith((installed["stdlib"], installed["purelib"], "<"))
    ]
    for owner in code.__mro__ if isinstance(code, type) else (code,):
        module_of_code = str(getattr(owner, "__module__", None))
        # What a method of fedkern calls of a user, such as the network, is what has to be mended.
        called = outside if module_of_code.startswith("fedkern.") else []
        for module, frame, line in reversed(called or frames):
            if called or module == module_of_code:
                return f" ({frame.f_code.co_filename.rpartition('/')[2]}, line {line})"
    return ""


@contextmanager
def locate_errors(where: str, code: object) -> Iterator[None]:
    """Name the part of a method or data set in every exception that the part's code raises.

    A UserError keeps its type, with ``where`` before its sentence. Other exceptions get a note. An exception becomes a
    :class:`CodeFailed` if it would be taken for an error of the machine or the command (a broken pipe, a full disk,
    ``sys.exit()``), or if its text is missing or too long.

    ``where`` begins the sentence: ``"`server_update` of the method fedavg failed in round 2"``. ``code``: see
    :func:`error_origin`.
    """
    try:
        yield
    except MemoryError:
        raise
    except RAISED as error:
        if (sentence := user_message(error)) is not None:
            error.args = (f"{where}: {sentence.rstrip('.')}{error_origin(error, code)}.",)
            raise
        if isinstance(error, UserError | OSError) or not isinstance(error, Exception) or not has_short_text(error):
            raise CodeFailed(where, error, code) from error
        error.add_note(f"{where}{error_origin(error, code)}.")
        raise


@contextmanager
def warn_instead(tell: Callable[[str], object]) -> Iterator[None]:
    """Turn an error in an optional picture into a warning by ``tell``.

    UserError and errors of exhausted memory are still raised.
    """
    try:
        yield
    except Exception as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in NO_MEMORY)
        if isinstance(error, (UserError, MemoryError)) or out_of_memory:
            raise
        tell(describe_error(error))


def describe_error(error: BaseException) -> str:
    """Return an exception as one short line: its type and its text, which may itself raise."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "its text cannot be shown"
    name = type(error).__name__
    return make_printable(f"{name}: {text}" if text else name).rstrip(".")


def has_short_text(error: BaseException) -> bool:
    try:
        return len(str(error)) <= MESSAGE
    except Exception:
        return False


def format_traceback(error: BaseException) -> str:
    return make_printable("".join(traceback.format_exception(error)), TRACEBACK)


def traceback_of(error: BaseException) -> str:
    """Return the traceback that an exception carries, or else its own, empty for a UserError without one."""
    return str(getattr(error, "traceback", "" if isinstance(error, UserError) else format_traceback(error)))


def format_value(value: object) -> str:
    """Return a wrong argument for a message: a short value, or its type."""
    try:
        text = repr(value)
    except Exception:  # whatever it is, its type is known
        text = " " * WORD
    return text if len(text) <= 60 else f"an object of type {type(value).__name__}"


def quote_value(value: object) -> str:
    """Return a wrong setting for a message: words and numbers in quotes, others as :func:`format_value`."""
    return f'"{value}"' if isinstance(value, (str, int, float)) else format_value(value)


def make_printable(text: str, limit: int = MESSAGE) -> str:
    """Make a message safe for a terminal: cut long words and messages in the middle, escape control characters.

    Line ends and tabs are kept. Words are cut at `WORD` characters, messages at ``limit``.
    """
    if len(text) > WORD:
        text = re.sub(rf"\S{{{WORD + 1},}}", lambda word: _cut(word[0], WORD), text)
        text = _cut(text, limit)
    return _escape_text(text, "\n\t")


def printable_name(text: str, limit: int) -> str:
    """Return a name as one line of at most ``limit`` characters, cut in the middle, with control characters escaped."""
    return _cut(_escape_text(text), limit)


def _escape_text(text: str, kept: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, limit: int) -> str:
    """Shorten ``text`` to ``limit`` characters: three quarters from the beginning, "...", one quarter from the end."""
    tail = limit // 4
    return text if len(text) <= limit else f"{text[: limit - tail - 3]}...{text[-tail:]}"


def first_of(words: Sequence[str], limit: int, between: str = ", ") -> str:
    """Return at most ``limit`` of the words and how many more there are: ``"a, b and 3 more"``."""
    return between.join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def join_words(parts: Sequence[str]) -> str:
    """Join parts of a sentence, at least one, with commas and "and"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def unknown_method(name: str, methods: Collection[str], commands: Iterable[str] = ()) -> UserError:
    """Return the error for a name that is none of ``methods``, with the nearest of these and of ``commands``."""
    hint, known = suggest_name(name, [*methods, *commands]), ", ".join(sorted(methods))
    return UserError(f'Unknown method "{name}".{hint} Known methods: {known}; --plugin FILE.py adds others.')


def hint_owners(option: str, owners: Mapping[str, Sequence[str]]) -> str:
    """Return a hint on the methods with an option, if any."""
    return f" It is a method option of {first_of(owners[option], 3)}." if option in owners else ""


def suggest_name(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``' Did you mean "x"?'`` for the candidates that ``word`` means, or else for the most similar one.

    Dashes before a word and upper case make no difference. Empty where no similarity reaches ``cutoff``, from 0 to 1.
    Among settings, methods, networks and data sets the text may come from `ADVICE`.
    """
    if len(word) > WORD:
        return ""
    names = {_plain(name): name for name in candidates}
    meant = [entry.partition("=") for entry in SYNONYMS.get(_plain(word), ())]
    meanings = [names[_plain(name)] + equals + value for name, equals, value in meant if _plain(name) in names]
    way = "" if names.keys().isdisjoint(("lr", "fedavg", "mlp", "csv")) else ADVICE.get(_plain(word), "")
    if not (meanings or way):
        meanings = [names[name] for name in difflib.get_close_matches(_plain(word), names, n=1, cutoff=cutoff)]
    hint = f""" Did you mean {" or ".join(f'"{name}"' for name in meanings)}?""" if meanings else ""
    return f"{hint} {way}" if way and "loss_fn" not in meanings else hint


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
