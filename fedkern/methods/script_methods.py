"""Unregistered method classes from scripts.

A run stores such a class as ``class:MODULE:NAME`` with a hash of its source, and a resuming script gives the class
again. The module may differ then: ``__main__`` becomes a module when another script imports it.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping

from fedkern.errors import UserError
from fedkern.methods.base import Method
from fedkern.methods.method_registry import CLASS, GIVEN, METHODS, short_name
from fedkern.methods.options import Options
from fedkern.typed_option import Value
from fedkern.usercode import named_code
from fedkern.usercode.code_identity import PLAIN, digest, find_changes, fold_table, identity_table, is_unchanged
from fedkern.usercode.registry import check_hooks

_MISSING = object()


def name_of(kind: type[Method]) -> str:
    """Return the registered name of a class, or ``class:MODULE:NAME``."""
    if METHODS.get(kind.name) is kind:
        return kind.name
    return f"{CLASS}{kind.__module__}:{kind.__qualname__}"


def give_class(kind: type[Method]) -> str:
    """Make a class known to the runs of this process, and return its name."""
    name = name_of(kind)
    if name.startswith(CLASS):
        _check(kind)
        GIVEN[name] = kind
    return name


def give_class_again(kind: type[Method], name: str, folder: str | os.PathLike[str]) -> None:
    """Make the class of a stored run known, or raise UserError if the run has another method."""
    if name.startswith(CLASS):
        _check(kind)
        if kind.__name__ != short_name(name):
            raise UserError(
                f"The method of the run in {folder} is {short_name(name)}, not {kind.__name__}: give that class."
            )
        GIVEN[name] = kind
    elif METHODS.get(name) is not kind:
        raise UserError(
            f"The run in {folder} is one of the method {name}, not of {short_name(name_of(kind))}: leave method out."
        )


def check_class(
    name: str,
    sha256: str | None,
    stored: Mapping[str, str],
    folder: str | os.PathLike[str],
    trusted: Collection[str] = (),
) -> None:
    """Raise UserError if a stored run's class was not given, or has changed since the run began.

    ``trusted`` contains ``"method"`` if the class may have changed.
    """
    if not name.startswith(CLASS):
        return
    if name not in GIVEN:
        module = name.removeprefix(CLASS).rpartition(":")[0]
        raise UserError(
            f"The method of the run in {folder} is {short_name(name)}, a class of the script or module {module}: go on "
            f"with it in Python, fedkern.load({str(folder)!r}, method={short_name(name)})."
        )
    table = identity_table({"method": GIVEN[name]})
    if not is_unchanged(sha256 or "", digest(table)) and "method" not in trusted:
        words, again = find_changes(stored, fold_table(table)), 'trusted=["method"] to fedkern.load'
        raise named_code.refuse_changed(f"the class {GIVEN[name].__name__}", folder, words, again)


def options_of(method: Method) -> dict[str, Value]:
    """Return the options that an object was made with, by published name.

    UserError for values beside the options, as a run makes its method anew from the options alone.
    """
    kind = type(method)
    options = getattr(method, "options", None)
    if not isinstance(options, kind.Options):
        raise UserError(
            f"{kind.__name__} has no options of its own class: let its __init__ take options=None and call "
            "super().__init__(options)."
        )
    fresh = _make(kind, options)
    for name in dict.fromkeys([*vars(method), *vars(fresh)]):
        mine, new = vars(method).get(name, _MISSING), vars(fresh).get(name, _MISSING)
        if type(mine) is not type(new) or (isinstance(mine, PLAIN) and mine != new):
            raise UserError(
                f"{kind.__name__} has {name} beside its options, and a run makes its method anew from the options "
                f"alone: declare {name} in class Options."
            )
    return options.given_values()


def fingerprint(kind: type[Method]) -> str:
    """Return the hash of a class, of its bases outside fedkern and of the code that they name."""
    return digest(identity_table({"method": kind}))


def _check(kind: type[Method]) -> None:
    name = kind.__name__
    check_hooks(kind)
    if not issubclass(kind.Options, Options):
        base = kind.__mro__[1].__name__
        raise UserError(f"{name}.Options must derive from the options of its base: class Options({base}.Options).")
    bare = [field for field, value in vars(kind.Options).items() if isinstance(value, dataclasses.Field)]
    if bare:
        raise UserError(f"{name}.Options declares {bare[0]} without effect: put @dataclass(frozen=True) above it.")
    _make(kind, kind.Options())


def _make(kind: type[Method], options: Options) -> Method:
    try:
        return kind(options)
    except UserError:
        raise
    except Exception as error:  # a user's __init__ may raise anything
        raise UserError(
            f"{kind.__name__} cannot be made from its options, as a run makes it ({type(error).__name__}: {error}): "
            "let its __init__ take options=None, and declare what else it takes in class Options."
        ) from None
