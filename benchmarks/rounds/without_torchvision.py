"""Empty torchvision where the installed one cannot be imported: some frameworks import it and use it for data alone.

Its operators are compiled for one build of torch; beside another the import fails.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _Nothing(type):
    """Metaclass of classes whose attributes are classes that can be inherited from."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class _Empty(ModuleType):
    """Module that has every name."""

    __path__: list[str] = []  # noqa: RUF012 — a package's, which the import system reads
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class _Finder:
    """Finder of torchvision and all its submodules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, since there is no code to run."""


def install() -> str:
    """Put the empty module in the place of a torchvision that cannot be imported.

    Returns a sentence that says so, or "".
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        finders: Sequence[Any] = sys.meta_path
        finders.insert(0, _Finder())  # type: ignore[attr-defined]
        return f"torchvision is an empty module, as it cannot be imported: {error}"
    return ""
