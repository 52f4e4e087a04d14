"""Plugins: files and modules that register methods, models, data sets, metrics, parts of runs and so on.

The user names a plugin, as ``--plugin FILE.py|MODULE`` or with :func:`load`, or an installed package does, as an entry
point of the group ``fedkern.plugins``.  A run stores its plugins in ``config.toml`` with identities: the SHA-256 of a
file and of its imports from its own folder, or the version, SHA-256 and origin of a module.

A run folder may come from anyone.  :func:`restore` therefore executes a stored plugin only if its identity is unchanged
and this user has started a run with it on this machine before (:func:`remember`), or if the user names it again.
"""

import hashlib
import importlib
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from fedkern.errors import UserError, first_of
from fedkern.files.filesystem import cache_folder, check_text, expand, is_own
from fedkern.usercode import named_code
from fedkern.usercode.code_identity import find_changes, module_identity
from fedkern.usercode.named_code import module_name, refuse_changed, refuse_untrusted, trust
from fedkern.usercode.registry import REGISTRIES, Registry, read_docstring

GROUP = "fedkern.plugins"
"""Group of the entry points that name plugins of installed packages."""

COMMANDS = (
    "attack", "compare", "doctor", "evaluate", "export", "extend", "flower", "help", "import", "list", "partition",
    "predict", "report", "reproduce", "resume", "run",
)  # fmt: skip
"""Names that must not be registered, because the command line would read them as commands."""

_REGISTERED = ("fedkern.methods", "fedkern.data", "fedkern.models", "fedkern.tasks", "fedkern.engine.setup.order")
"""Modules that fill the registries with built-in entries, before a plugin does."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Plugin:
    """Loaded plugin.

    Attributes:
        name: absolute path of the file, or name of the module.
        source: content of the file; None for a module.
        given: whether the user named the plugin, rather than an entry point or a run folder.
        installed: whether an entry point names the plugin.
        added: names that the plugin has registered, by kind.
        modules: names of modules that a file imports from its folder.
    """

    name: str
    identity: str
    source: bytes | None = field(default=None, repr=False)
    given: bool = True
    installed: bool = False
    added: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


_LOADED: dict[str, Plugin] = {}
_installed = False


# -- loading -----------------------------------------------------------------------------------------------------------


def load(name: str) -> Plugin:
    """Execute a plugin, so that everything that it registers is known by name.

    A module is executed once in a process, and so is a file until the file changes.  A changed file replaces the
    entries that its former content registered.

    Args:
        name: path of a Python file (with a folder or the ending ``.py``), or name of a module that can be imported.

    Raises:
        UserError: there is no such plugin, it raises an exception, it registers nothing, or it registers a name that is
            taken.  Nothing that it registered is kept then.
    """
    name, path = _locate_plugin(name)
    plugin = _LOADED.get(name)
    if path is None:
        plugin = plugin or _execute(Plugin(name, _module_identity(name)))
    else:
        code = named_code.read_code(path, f"The plugin {path}")
        if plugin is None or plugin.identity != code.identity:
            unload(name)
            named_code.forget_changed(path, code, module_name(name, code.source))
            plugin = _execute(Plugin(name, code.identity, code.source, modules=code.modules))
    _LOADED[name] = plugin = replace(plugin, given=True)
    return plugin


def load_installed(warn: Callable[[str], None] = warnings.warn) -> None:
    """Load the plugins of installed packages once in a process, and ``warn`` of those that fail."""
    global _installed
    if _installed:
        return
    _installed = True
    try:
        points = sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    except Exception as error:  # damaged metadata of any package
        warn(f"The installed plugins cannot be listed ({type(error).__name__}: {error}).")
        return
    for point in points:
        try:
            name, _ = _locate_plugin(point.module)
            if name not in _LOADED:
                _LOADED[name] = _execute(Plugin(name, _module_identity(name), given=False, installed=True))
            point.load()
        except Exception as error:  # any error of the package
            package = point.dist.name if point.dist is not None else "an installed package"
            warn(f"The plugin {point.name} of {package} is left out: {str(error).rstrip('.')}.")


def unload(name: str) -> None:
    plugin = _LOADED.pop(name, None)
    if plugin is None:
        return
    tables = _tables()
    for kind, names in plugin.added.items():
        for entry in names:
            tables[kind].pop(entry, None)
    _forget(plugin)


def _forget(plugin: Plugin, kept: Collection[str] = ()) -> None:
    """Unload a plugin's module, and those beside it that it imports, except for ``kept`` ones."""
    names = named_code.loaded_modules(Path(plugin.name).parent, plugin.modules)
    for name in {_module_name(plugin), *names} - {*kept}:
        sys.modules.pop(name, None)


def loaded_plugins() -> tuple[Plugin, ...]:
    return tuple(_LOADED.values())


def _locate_plugin(text: str) -> tuple[str, Path | None]:
    text = text.strip()
    check_text(text, "the plugin")
    if text.endswith(".py") or "/" in text or os.sep in text:
        path = Path(os.path.realpath(expand(text)))
        return str(path), path
    if not text or not all(part.isidentifier() for part in text.split(".")):
        raise UserError(f'--plugin must name a file FILE.py or a module, not "{text}".')
    return text, None


def _module_identity(name: str) -> str:
    try:
        return module_identity(name)
    except ModuleNotFoundError:
        file = f" (or --plugin {name}.py)" if Path(f"{name}.py").is_file() else ""
        raise UserError(
            f'The plugin "{name}" is no module that Python can import: install it, add its folder to PYTHONPATH, or '
            f"name a file, --plugin FILE.py{file}."
        ) from None


def _module_name(plugin: Plugin) -> str:
    return plugin.name if plugin.source is None else module_name(plugin.name, plugin.source)


def _tables() -> Mapping[str, Registry[Any]]:
    for module in _REGISTERED:
        importlib.import_module(module)
    return REGISTRIES


def _execute(plugin: Plugin) -> Plugin:
    """Run a plugin's code, and return the plugin with its entries, of which an exception leaves none."""
    tables, module = _tables(), _module_name(plugin)
    # A plugin of another folder may have loaded an imported module's name.
    for loaded in _LOADED.values():
        folder = Path(loaded.name).parent
        shared = named_code.loaded_modules(folder, {*loaded.modules} & {*plugin.modules})
        if shared and folder != Path(plugin.name).parent:
            raise UserError(
                f"The plugin {plugin.name} imports {shared[0]}, and another {shared[0]} is loaded already, of the "
                f"plugin {loaded.name}: rename one of the two."
            )
    before = {kind: dict(table) for kind, table in tables.items()}
    modules = set(sys.modules)
    try:
        _run(plugin, module)
        added = _registered_names(plugin, before, tables)
        if not added and module not in modules:
            raise UserError(
                f'The plugin {plugin.name} registers nothing: put @fedkern.register("NAME") on a method, or another of '
                "the decorators of docs/plugins.md."
            )
        return replace(plugin, added=added)
    except BaseException:
        for kind, table in tables.items():
            table.clear()
            table.update(before[kind])
        _forget(plugin, modules)
        raise


def _run(plugin: Plugin, name: str) -> None:
    try:
        if plugin.source is None:
            named_code.run_module(name)
        else:
            sys.modules.pop(name, None)  # perhaps executed as a network's code, without a record of its entries
            named_code.run_module(name, plugin.name, plugin.source)
    except UserError as error:
        raise UserError(f"The plugin {plugin.name} cannot be loaded: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The plugin {plugin.name} cannot be loaded{_line(error, plugin)}: {type(error).__name__}: {error}."
        ) from error


def _line(error: BaseException, plugin: Plugin) -> str:
    """Return the line of the plugin's file that raised an exception, as `` (line N)``, or ""."""
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})" if error.filename == plugin.name else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == plugin.name]
    return f" (line {lines[-1]})" if lines else ""


def _registered_names(
    plugin: Plugin, before: Mapping[str, Mapping[str, object]], tables: Mapping[str, Mapping[str, object]]
) -> dict[str, tuple[str, ...]]:
    added: dict[str, tuple[str, ...]] = {}
    for kind, table in tables.items():
        replaced = [name for name, entry in before[kind].items() if table.get(name, entry) is not entry]
        names = tuple(name for name in table if name not in before[kind])
        for name in (*replaced, *names):
            if name in replaced:
                problem = ", which is registered already: choose another name."
            elif name in COMMANDS:
                problem = ", which is the name of a command: choose another name."
            elif not _NAME.fullmatch(name):
                problem = ': a name has letters, digits, ".", "-" and "_", and begins with a letter or digit.'
            else:
                continue
            raise UserError(f'The plugin {plugin.name} registers the {kind} "{name}"{problem}')
        if names:
            added[kind] = names
    return added


# -- plugins of a run --------------------------------------------------------------------------------------------------


def load_given(names: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """Load plugins that the user names, and return their identities by full name.

    A mapping has the required identities, "" for any.
    """
    identities = names if isinstance(names, Mapping) else dict.fromkeys(names, "")
    result = {}
    for name, identity in identities.items():
        plugin = load(name)
        if identity not in ("", plugin.identity):
            raise UserError(
                f"The plugin {plugin.name} is not the one that the settings name ({_short(identity)} there, "
                f"{_short(plugin.identity)} now): put it back, or take the identity out of the settings."
            )
        result[plugin.name] = plugin.identity
    return result


def find_used(names: Mapping[str, str]) -> dict[str, str]:
    """Return identities of the loaded plugins that registered one of ``names`` (by kind), or a metric.

    Installed plugins that registered a part or a filter are included: no setting names these.
    """
    return {
        plugin.name: plugin.identity
        for plugin in _LOADED.values()
        if "metric" in plugin.added
        or (plugin.installed and not {"part", "filter"}.isdisjoint(plugin.added))
        or any(name in plugin.added.get(kind, ()) for kind, name in names.items())
    }


def names_of_run(table: Registry[Any], stored: Mapping[str, str]) -> list[str]:
    """Return a run's names in a registry: those of its ``stored`` plugins in order, then those of no plugin."""
    of_all = {name for plugin in _LOADED.values() for name in plugin.added.get(table.kind, ())}
    names = [name for plugin in sent_plugins(stored) for name in plugin.added.get(table.kind, ())]
    return [*names, *(name for name in table if name not in of_all)]


def describe_plugins(kind: str) -> dict[str, str]:
    """Return the first docstring lines, by name, of a kind's classes from plugins."""
    names = [name for plugin in _LOADED.values() for name in plugin.added.get(kind, ())]
    return {name: read_docstring(_tables()[kind][name]).splitlines()[0] for name in names}


def identify_loaded(stored: Mapping[str, str]) -> dict[str, str]:
    """Return the identities of the loaded plugins that stand for a run's ``stored`` ones."""
    plugins = [_stand_in(name, identity) or Plugin(name, identity) for name, identity in stored.items()]
    return {plugin.name: plugin.identity for plugin in plugins}


def restore(stored: Mapping[str, str], folder: str | os.PathLike[str], trusted: Collection[str] = ()) -> None:
    """Load the plugins of a stored run, as far as they may be executed.

    Raises:
        UserError: a plugin is missing, has changed, or was never used by this user on this machine, and is neither
            ``trusted`` nor loaded.
    """
    for name, identity in stored.items():
        if _stand_in(name, identity) is not None:
            continue
        again = f"--plugin {shlex.quote(name)}"
        file = Path(name).name if name.endswith(".py") else None
        if given_again := [text for text in trusted if text == name or Path(text).name == file]:
            load(given_again[0])
            continue
        try:
            full, path = _locate_plugin(name)
            words = _differences(name, path, identity)
        except UserError as error:
            raise UserError(
                f"The run in {folder} needs a plugin that is not there: {str(error).rstrip('.')}; where it has moved, "
                "give it again, --plugin FILE (in Python trusted=[FILE] to fedkern.load)."
            ) from None
        if words:
            raise refuse_changed(
                f"The plugin {name}", folder, words, f"the plugin again, {again} (in Python {trust(name)}),"
            )
        if full != name or not _is_remembered(name, identity):
            raise refuse_untrusted(Path(folder) / "config.toml", f"the plugin {name}", "the plugin again", again)
        _LOADED[name] = replace(load(name), given=False)


def _differences(name: str, path: Path | None, identity: str, source: bytes | None = None) -> list[str]:
    old, new = {"": identity}, {"": "" if path is not None else _module_identity(name)}
    if path is not None:
        code = named_code.read_code(path, f"The plugin {path}", source)
        old, new = named_code.parse_identity(identity) or old, code.hashes
    tables = ({str(Path(name).parent / part) if part else name: table[part] for part in table} for table in (old, new))
    return [_short(text) for text in find_changes(*tables)]


def _short(identity: str) -> str:
    return re.sub(r"(sha256:\w{12})\w*", r"\1", identity)


def check_given(names: Iterable[str], stored: Mapping[str, str], folder: str | os.PathLike[str]) -> None:
    """Raise UserError if a plugin that is given to resume a run does not belong to it."""
    for text in names:
        plugin = load(text)
        if not any(_stands_for(plugin, name, identity) for name, identity in stored.items()):
            raise UserError(
                f"The run in {folder} has no plugin {plugin.name}: leave it out to resume the run, or start a new run "
                "without --resume."
            )


def _stand_in(name: str, identity: str) -> Plugin | None:
    """Return the loaded plugin for a stored one: the same content, or one that the user has named."""
    namesake = _LOADED.get(name)
    if namesake is not None and (namesake.given or namesake.identity == identity):
        return namesake
    return next((plugin for plugin in _LOADED.values() if plugin.given and _stands_for(plugin, name, identity)), None)


def _stands_for(plugin: Plugin, name: str, identity: str) -> bool:
    """Return whether a plugin is the stored one, or the same file after it was moved."""
    moved = plugin.source is not None and (plugin.identity == identity or Path(plugin.name).name == Path(name).name)
    return plugin.name == name or moved


# -- which plugins a user has run --------------------------------------------------------------------------------------


def remember(plugins: Mapping[str, str]) -> None:
    """Note in the user's cache folder that a run of this user executes these plugins.

    Without a writable cache folder, a resumed run asks for ``--plugin`` again.
    """
    for name, identity in plugins.items():
        with suppress(OSError, UserError):
            path = _note(name, identity)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def _is_remembered(name: str, identity: str) -> bool:
    try:
        # Users who share a cache folder have executed other plugins.
        return is_own(_note(name, identity))
    except (OSError, UserError):
        return False


def _note(name: str, identity: str) -> Path:
    return cache_folder("plugins") / hashlib.sha256(f"{name}\n{identity}".encode()).hexdigest()


# -- worker processes --------------------------------------------------------------------------------------------------


def sent_plugins(stored: Mapping[str, str]) -> list[Plugin]:
    """Return the plugins of a run for another process, with files as this process has executed them."""
    return [plugin for name, identity in stored.items() if (plugin := _stand_in(name, identity)) is not None]


def receive(plugins: Iterable[Plugin]) -> None:
    """Load plugins from another process's :func:`sent_plugins`, unless an imported file has changed."""
    for plugin in plugins:
        if plugin.name in _LOADED:
            continue
        path = None if plugin.source is None else Path(plugin.name)
        if path is not None and (words := _differences(plugin.name, path, plugin.identity, plugin.source)):
            raise UserError(f"The plugin {plugin.name} has changed meanwhile ({first_of(words, 3)}).")
        _LOADED[plugin.name] = _execute(plugin)
