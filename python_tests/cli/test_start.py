"""Imports of a command before it does its work: the user waits for every module."""

import subprocess
import sys

import pytest

from fedkern.cli import front_page
from fedkern.methods import METHODS
from python_tests.plugin_sources import Marked, no_plugins  # noqa: F401

COLLECTED = """
import atexit, gc, sys
import fedkern.run as run
atexit.register(lambda: print(len(gc.get_objects()) < 1000))
run.main({given})
print(*sys.modules, file=sys.stderr)
print(gc.get_freeze_count() > 0, gc.isenabled())
"""
"""A command that tells the modules that it imports, and what the collector looks at during its end."""
LOADED = "import sys; from fedkern.run import main; code = main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"

RUN = """
import sys
from fedkern.listeners.events import Listeners
from fedkern.run import main
def tell(*_):
    print("modules", *sys.modules, file=sys.stderr)
Listeners.on_round = tell
code = main(sys.argv[1:])
tell()
sys.exit(code)
"""
"""A run that tells the modules that its first round and its end find."""
LATER = {
    "contourpy", "jinja2", "matplotlib", "networkx", "onnx", "pandas", "scipy", "sympy", "tensorboard", "tokenizers",
    "torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.cpp_extension", "transformers", "triton", "wandb",
}  # fmt: skip
"""What only pictures, reports, trackers, exports, pretrained networks and torch.compile need."""
PICTURES = {"contourpy", "matplotlib"}


def command(*words: str) -> tuple[str, set[str]]:
    """Return a command's output in a new process, and the modules that it imports."""
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True)
    return done.stdout, set(done.stderr.split())


@pytest.fixture(scope="module")
def help_page() -> tuple[str, set[str]]:
    return command("--help")


def test_help_needs_no_torch(help_page):
    text, modules = help_page
    assert not modules & {"torch", "numpy", "rich", "fedkern.engine", "fedkern.methods"}
    for name in front_page.COMMANDS:
        assert f"{front_page.PROGRAM} {name} " in text
    assert [line for line in text.splitlines() if line.startswith("  ")] == [
        f"  {name:<16}{METHODS[name].description}" for name in sorted(METHODS)
    ]


@pytest.mark.parametrize(
    ("given", "kept"), [("", True), pytest.param("sys.argv[1:]", False, marks=pytest.mark.exhaustive)]
)
def test_a_command_imports_its_own_file_and_the_collector_leaves_that_out(given, kept):
    """For a script the collector leaves nothing out."""
    command("list")  # keeps the flags of all commands, for which it imports them
    words = [sys.executable, "-c", COLLECTED.format(given=given), "attack"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [f"{kept} True", str(kept)]
    modules = set(done.stderr.split())
    assert {name for name in modules if name.startswith("fedkern.cli.commands.")} == {"fedkern.cli.commands.attack"}
    assert not modules & {"fedkern.engine.run", "fedkern.downstream", "fedkern.comparison.compared"}


def test_help_is_the_same_once_torch_is_loaded(result, help_page):
    assert result("--help")[0] == result("-h", "--json")[0] == help_page[0]


def test_help_names_the_methods_of_a_plugin(result, help_page, no_plugins, tmp_path):  # noqa: F811
    text, _ = result("--help", "--plugin", str(Marked(tmp_path).path))
    assert f"  {'mine':<16}A method of a test." in text.splitlines()
    assert "mine" not in help_page[0]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["fedgid", "fedavg", "scaffold"])
def test_a_run_imports_what_it_needs_when_it_needs_it(method, tmp_path):
    small = ["--train-samples", "60", "--clients", "2", "--rounds", "1", "--local-steps", "1", "--width", "4",
             "--grad-cam", "2", "--quiet", "--out", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", RUN, method, *small], capture_output=True, text=True, check=True)
    loaded, end = (set(line.split()) for line in done.stderr.splitlines() if line.startswith("modules "))
    assert {"torch", f"fedkern.methods.{'fedgid' if method == 'fedgid' else 'baselines.' + method}"} <= loaded
    assert not loaded & LATER
    assert end & LATER == PICTURES
