"""``--plugin``: plugins' names work like built-in names, and no run folder executes a plugin by itself."""

import json
import shutil
import tomllib
from importlib.metadata import EntryPoint

import pytest

from fedkern.downstream.membership_attack import attack
from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.run import main
from fedkern.settings.config import RunConfig, load_settings
from fedkern.usercode import plugins
from python_tests.interrupted import outcome
from python_tests.plugin_sources import EXAMPLES, SETTINGS, Marked, begin, check_refused, no_plugins, unload_all  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_plugins")

TINY = ["--train-samples", "40", "--clients", "2", "--local-epochs", "1", "--threads", "1", "--width", "4",
        "--grad-cam", "0", "--data-option", "test_samples=20", "--data", "digits", "--partition", "iid"]  # fmt: skip


@pytest.fixture
def plugin(tmp_path):
    return Marked(tmp_path / "plugin")


@pytest.fixture
def cut(plugin, tmp_path):
    """Return the folder of a run that is killed after its first round."""
    return begin(plugin, tmp_path / "run")


# -- names -------------------------------------------------------------------------------------------------------------


def test_list_help_and_errors_know_what_a_plugin_registers(result, fails, plugin):
    flag = ["--plugin", str(plugin.path)]
    assert "mine" not in result("list")[0]
    assert "  mine " in result("list", *flag)[0]
    assert json.loads(result("list", "--json", *flag)[0])["methods"]["mine"] == "A method of a test."
    text, _ = result("mine", "--help", *flag)
    assert "mine: A method of a test." in text
    assert "weighting" in text
    assert "mine," in " ".join(text.split())  # among the methods
    assert 'Did you mean "mine"?' in fails("minee", *flag)
    assert "--method-option weighting=VALUE" in fails("mine", "--weighting", "uniform", *flag)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--plugin="], "--plugin is given without a value"),
        (["--plugin"], "write --plugin FILE.py|MODULE."),
        (["--plugin", "own.py"], "own.py registers nothing"),
    ],
)
def test_a_plugin_with_a_mistake_is_one_sentence(fails, tmp_path, words, part):
    (tmp_path / "own.py").write_text("")
    assert part in fails("fedavg", *TINY, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]


def test_commands_without_plugins_refuse_them(fails, plugin):
    assert 'doctor does not take "--plugin"' in fails("doctor", "--plugin", str(plugin.path))


@pytest.mark.parametrize("word", ["list", "--help"])
@pytest.mark.usefixtures("undrawn")
def test_an_installed_plugin_is_known_and_a_broken_one_warns(capsys, monkeypatch, tmp_path, plugin, word):
    monkeypatch.syspath_prepend(plugin.path.parent)
    points = [EntryPoint("good", "marked", plugins.GROUP), EntryPoint("bad", "not_installed", plugins.GROUP)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    monkeypatch.setattr(plugins, "_installed", False)
    assert main([word]) == 0
    out, err = capsys.readouterr()
    assert "  mine " in out
    assert err.startswith("warning: The plugin bad of an installed package is left out")
    assert main(["mine", *TINY, "--rounds", "1", "--quiet", "--out", "run"]) == 0
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert list(stored["plugins"]) == ["marked"]
    assert "plugins" not in RunConfig.make("fedavg").to_toml()  # a run that uses nothing of a plugin


# -- a run stores and reloads its plugins ------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_run_stores_its_plugins_and_repeats_them(result, plugin, tmp_path):
    out, _ = result("mine", *TINY, "--rounds", "1", "--plugin", "plugin/marked.py", "--out", "run")
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert list(stored["plugins"]) == [str(plugin.path)]
    assert stored["plugins"][str(plugin.path)].startswith("sha256:")
    assert f"--plugin {plugin.path}" in " ".join(out.split())  # the command for comparison
    unload_all()
    result("--config", "run/config.toml", "--rounds", "1", "--out", "again", "--quiet")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "model.safetensors"
    ).read_bytes()
    plugin.change()
    unload_all()
    runs = plugin.runs
    assert main(["--config", "run/config.toml", "--out", "third"]) == 2
    assert plugin.runs == runs + 1  # the user named it, in a file


@pytest.mark.usefixtures("undrawn")
def test_a_config_file_lists_plugins_by_name(result, plugin, tmp_path):
    (tmp_path / "own.toml").write_text('method = "mine"\nplugins = ["plugin/marked.py"]\nrounds = 1\n')
    result("--config", "own.toml", *TINY, "--out", "run", "--quiet")
    assert str(plugin.path) in (tmp_path / "run" / "config.toml").read_text()


def test_a_config_file_with_plugins_of_another_kind(fails, tmp_path):
    (tmp_path / "own.toml").write_text('method = "fedavg"\nplugins = 3\n')
    assert "plugins must be a list of names" in fails("--config", "own.toml")


@pytest.mark.usefixtures("undrawn")
def test_a_killed_run_goes_on_with_its_plugin(result, cut, plugin, tmp_path):
    result("--resume", str(cut), "--quiet")
    assert plugin.runs == 2
    run(RunConfig.make("mine", rounds=2, **SETTINGS), out=tmp_path / "whole")
    assert outcome(cut) == outcome(tmp_path / "whole")
    unload_all()
    result("--resume", str(cut), "mine", "--quiet")  # finished; the words may name the method
    result("attack", str(cut))


# -- what no run folder executes ---------------------------------------------------------------------------------------


def check_untouched(fails, cut, plugin, runs, *parts):
    """Check that every command ends in one sentence, executes nothing and leaves the folder unchanged."""
    commands = [["--resume", str(cut)], ["--resume", str(cut), "mine"], ["attack", str(cut)]]
    check_refused(fails, cut, commands, parts, readers=(load_settings, attack))
    assert plugin.runs == runs


def test_a_changed_plugin_is_not_executed_unless_given_again(fails, result, cut, plugin):
    plugin.change()
    check_untouched(fails, cut, plugin, 1, f"The plugin {plugin.path} has changed since", f"--plugin {plugin.path}")
    result("--resume", str(cut), "--plugin", str(plugin.path), "--quiet")
    assert plugin.runs == 2
    summary = json.loads((cut / "summary.json").read_text())
    assert str(plugin.path) in summary["diagnostics"]["other-plugin"]


def test_a_folder_from_elsewhere_executes_nothing_unless_the_plugin_is_given(
    fails, result, cut, plugin, monkeypatch, tmp_path
):
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache of somebody else"))
    check_untouched(fails, cut, plugin, 1, "names code to run", f"--plugin {plugin.path}")
    result("--resume", str(cut), "--plugin", str(plugin.path), "--quiet")
    assert plugin.runs == 2
    unload_all()
    result("--resume", str(cut), "--quiet")  # now this user has run it
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache of a third"))
    unload_all()
    assert "names code to run" in fails("attack", str(cut))
    result("attack", str(cut), "--plugin", str(plugin.path))


def test_a_plugin_that_another_user_has_run_is_not_trusted(fails, cut, plugin, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    check_untouched(fails, cut, plugin, 1, "names code to run")


@pytest.mark.usefixtures("undrawn")
def test_a_plugin_that_is_gone_or_has_moved(fails, result, cut, plugin, tmp_path):
    moved = tmp_path / "elsewhere" / "marked.py"
    moved.parent.mkdir()
    shutil.move(plugin.path, moved)
    check_untouched(fails, cut, plugin, 1, "needs a plugin that is not there", "give it again, --plugin FILE (in Py")
    assert load_settings(cut, trusted=[str(moved)]).plugins
    result("--resume", str(cut), "--plugin", str(moved), "--quiet")
    assert plugin.runs == 2


def test_a_plugin_of_no_run_is_refused(fails, cut, plugin, tmp_path):
    stranger = Marked(tmp_path / "other", name="another")
    stranger.path = stranger.path.rename(stranger.path.with_name("another.py"))
    assert f"has no plugin {stranger.path}" in fails("--resume", str(cut), "--plugin", str(stranger.path))


def test_the_library_executes_a_trusted_plugin(cut, plugin, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="names code to run"):
        load_settings(cut)
    assert plugin.runs == 1
    config = load_settings(cut, trusted=[str(plugin.path)])
    assert plugin.runs == 2
    assert run(config, out=cut, resume=True)["rounds"] == 2
    assert len(read_metrics(cut)) == 2
    unload_all()
    model, _ = read_model(cut)  # its network is fedkern's own: nothing of the plugin is needed
    assert plugin.runs == 2
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


NETWORK = """\
import pathlib
from fedkern.models import CNN, MODELS, ModelEntry
with pathlib.Path({marker!r}).open("a") as file:
    file.write("ran\\n")

def slim(*, classes, channels, width, stem):
    return CNN(classes=classes, channels=channels, width=width)

MODELS["slim"] = ModelEntry("slim", "a narrow network of a test", 4, 8, slim)
"""


def test_a_network_of_a_plugin_is_read_back_under_the_same_rules(result, fails, plugin, monkeypatch, tmp_path):
    plugin.path.write_text(NETWORK.format(marker=str(plugin.marker)))
    words = [word for word in TINY if word not in ("--width", "4")]
    result(
        "fedavg", *words, "--rounds", "1", "--model", "slim", "--plugin", str(plugin.path), "--out", "run", "--quiet"
    )
    assert "slim" in " ".join(result("fedavg", "--help", "--plugin", str(plugin.path))[0].split())
    unload_all()
    model, about = read_model(tmp_path / "run")
    assert (about["model"], about["width"], plugin.runs) == ("slim", 4, 2)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    unload_all()
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache of somebody else"))
    with pytest.raises(UserError, match="names code to run"):
        read_model(tmp_path / "run")
    assert plugin.runs == 2
    assert read_model(tmp_path / "run", trusted=[str(plugin.path)])[1]["model"] == "slim"
