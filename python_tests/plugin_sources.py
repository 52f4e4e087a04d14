"""Plugins of the tests, and their removal after a test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from fedkern.usercode import plugins
from python_tests.interrupted import Kill, KillAt

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


class Executed:
    """Plugin that writes a line into ``marker`` whenever it is executed."""

    path: Path
    marker: Path

    @property
    def runs(self) -> int:
        return len(self.marker.read_text().splitlines()) if self.marker.exists() else 0


class Marked(Executed):
    """File that registers a method, and tells how often it was executed."""

    def __init__(self, folder: Path, name: str = "mine") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.marker = folder / "marked.py", folder / "ran"
        self.path.write_text(METHOD.format(marker=str(self.marker), name=name))

    def change(self) -> None:
        self.path.write_text(self.path.read_text() + "# changed\n")


SETTINGS = {"train_samples": 40, "clients": 2, "local_epochs": 1, "threads": 1, "width": 4, "grad_cam": 0,
            "data": "digits", "partition": "iid", "data_options": {"test_samples": 20}}  # fmt: skip


def begin(plugin: Executed, out: Path) -> Path:
    """Play the first round of a run with a plugin, which this process then forgets, and return the run's folder."""
    config = RunConfig.make("mine", plugins=[str(plugin.path)], rounds=2, **SETTINGS)
    with pytest.raises(Kill):
        run(config, out=out, listener=KillAt("round", 1))
    unload_all()
    assert plugin.runs == 1
    return out


def check_refused(
    fails: Callable[..., str], folder: Path, commands: list[list[str]], parts: tuple[str, ...],
    readers: tuple[Callable[[Path], object], ...] = (),
) -> None:  # fmt: skip
    """Check that commands end in a sentence with these parts, that readers raise, and that the folder stays."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for words in commands:
        sentence = fails(*words)
        for part in parts:
            assert part in sentence
    for read in readers:
        with pytest.raises(UserError):
            read(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def unload_all() -> None:
    """Forget all plugins, as a new process would."""
    for plugin in plugins.loaded_plugins():
        plugins.unload(plugin.name)


@pytest.fixture
def no_plugins(tmp_path_factory, monkeypatch) -> Iterator[None]:
    """Yield with no plugin loaded, and leave no plugin behind in this process."""
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield
    unload_all()
