"""Plugins of the tests, and how a test leaves none of them behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedkern import plugins

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "plugins"

METHOD = '''\
import pathlib
from fedkern.methods import FedAvg, register
with pathlib.Path({marker!r}).open("a") as file:
    file.write("ran\\n")

@register({name!r})
class Mine(FedAvg):
    """A method of a test."""
'''


class Marked:
    """A file that registers a method, and says how often it was executed."""

    def __init__(self, folder: Path, name: str = "mine") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.marker = folder / "marked.py", folder / "ran"
        self.path.write_text(METHOD.format(marker=str(self.marker), name=name))

    def change(self) -> None:
        self.path.write_text(self.path.read_text() + "# changed\n")

    @property
    def runs(self) -> int:
        return len(self.marker.read_text().splitlines()) if self.marker.exists() else 0


def unload_all() -> None:
    """Forgets all plugins, as a new process would."""
    for plugin in plugins.loaded():
        plugins.unload(plugin.name)


@pytest.fixture
def plugged(tmp_path_factory, monkeypatch) -> Iterator[None]:
    """A user who has run no plugin yet; afterwards nothing of a plugin is left in this process."""
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield
    unload_all()
