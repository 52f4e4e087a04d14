"""Flower projects that the command line writes: equal settings, and all code that they need."""

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

from fedkern.data import load
from fedkern.errors import UserError
from fedkern.flower.runs import run_settings
from fedkern.flower.runs.project import simulation_settings
from fedkern.run import main
from fedkern.settings.config import RunConfig
from fedkern.usercode import plugins

FLAGS = ("--data", "digits", "--clients", "4", "--rounds", "3", "--lr", "0.05", "--partition", "dirichlet:0.5")
PLUGIN = """
import fedkern
from fedkern.methods import FedAvg

@fedkern.register("halved")
class Halved(FedAvg):
    "FedAvg whose clients do nothing."

    def client_update(self, client, phase, message):
        return message
"""
MODEL = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, classes))
"""
DATA = """
import numpy as np
from fedkern import FederatedData

def ours():
    pair = np.arange(384).reshape(6, 8, 8).astype(np.uint8), np.arange(6) % 2
    return FederatedData.from_arrays([pair] * 3, pair)
"""


@pytest.fixture(autouse=True)
def _without_plugins(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {plugin.name for plugin in plugins.loaded_plugins()}
    yield
    for plugin in plugins.loaded_plugins():
        if plugin.name not in before:
            plugins.unload(plugin.name)


def flat(table, above=""):
    """Flatten a table as Flower does."""
    found = {}
    for key, value in table.items():
        found.update(flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value})
    return found


def run_config(folder):
    return flat(tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])


def test_the_settings_are_those_of_the_flags(tmp_path, capsys):
    folder = tmp_path / "project"
    words = ("fedgid", *FLAGS, "--threads", "1", "--method-option", "alpha=0.7", "--boxes", "all.json")
    assert main([*words, "--out", str(tmp_path / "run"), "--flower", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Flower project: {folder}",
        "files:          README.md, pyproject.toml",
        "commands:       README.md",
    ]
    read = run_settings.read_run_config(run_config(folder))
    boxes = str(Path("all.json").absolute())
    expected = RunConfig.make(
        "fedgid", options=["alpha=0.7"], data_options={"boxes": boxes}, data="digits", clients=4, rounds=3,
        lr=0.05, partition="dirichlet:0.5", threads=1, on_nan="skip", on_error="skip",
    )  # fmt: skip
    assert read.config == expected
    assert read.config.unset == expected.unset
    assert (read.out, read.resume, read.report) == (tmp_path / "run", False, False)
    assert (read.deadline, read.wait, read.state) == (3600, 600, "")
    assert "partition-id=3 num-partitions=4" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", ["fusefl", "fedlpfm", pytest.param("feddra", marks=pytest.mark.exhaustive)])
def test_settings_that_are_left_open_stay_open(method, tmp_path):
    assert main([method, "--flower", str(tmp_path / "project"), "--on-nan", "stop"]) == 0
    read = run_settings.read_run_config(run_config(tmp_path / "project"))
    assert read.config == RunConfig.make(method, on_nan="stop", on_error="skip")
    assert read.config.unset == {"partition", "clients", "client_test"}


def test_every_setting_can_be_overridden(tmp_path):
    """Flower refuses keys that the project does not have."""
    assert main(["fedprox", "--flower", str(tmp_path / "project")]) == 0
    found = run_config(tmp_path / "project")
    settings = {run_settings.setting_key(spec.field) for spec in RunConfig.list_options()} - {*run_settings.LOCAL_ONLY}
    assert settings <= set(found)
    assert {"method-option.mu", "method-option.weighting", "out", "resume", "plugins", "flower.deadline"} <= set(found)
    changed = run_settings.read_run_config(
        {**found, "lr": 0.25, "method-option.mu": 0.5, "rounds": 7, "resume": True, "out": "x"}
    )
    assert (changed.config.lr, changed.config.options["mu"], changed.config.rounds) == (0.25, 0.5, 7)
    assert changed.resume


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [("round", 3, r'unknown key "round".*"rounds"'), ("rounds", "many", "--rounds must be an integer"),
     ("resume", "perhaps", "resume must be true or false"), ("flower.wait", -1.0, r"flower.wait must be in \[0, "),
     ("method-option.nu", 1, '"nu"'), ("plugins", "nowhere.py", "nowhere.py")],
)  # fmt: skip
def test_a_wrong_run_config_is_named(key, value, why):
    with pytest.raises(UserError, match=why):
        run_settings.read_run_config({"method": "fedprox", key: value})


def test_code_comes_along(tmp_path, capsys, registries):
    (tmp_path / "halved.py").write_text(PLUGIN)
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "ours.py").write_text(DATA)
    (tmp_path / "chosen.py").write_text("")
    folder = tmp_path / "project"
    code = ("--plugin", str(tmp_path / "halved.py"), "--model", f"{tmp_path / 'net.py'}:Net",
            "--data", f"{tmp_path / 'ours.py'}:ours", "--sample-fraction", "0.7",
            "--choose", f"{tmp_path / 'chosen.py'}:chosen")  # fmt: skip
    assert main(["halved", "--clients", "3", *code, "--flower", str(folder)]) == 0
    assert "README.md, chosen.py, halved.py, net.py, ours.py, pyproject.toml" in capsys.readouterr().out
    found = run_config(folder)
    assert (found["plugins"], found["model"], found["data"]) == ("halved.py", "net.py:Net", "ours.py:ours")
    assert str(tmp_path) not in (folder / "pyproject.toml").read_text()
    plugins.unload(str(tmp_path / "halved.py"))
    sys.path.insert(0, str(folder))
    config = run_settings.read_run_config(found).config
    assert config.model == f"{folder / 'net.py'}:Net"
    assert config.data == f"{folder / 'ours.py'}:ours"
    assert config.choose == f"{folder / 'chosen.py'}:chosen"
    assert load(config.data).client_sizes == (6, 6, 6)
    assert [*config.plugins] == [str(folder / "halved.py")]


@pytest.mark.parametrize(
    ("words", "why"),
    [(("--resume", "runs/x"), "writes a project and runs nothing"), (("--tensorboard",), "writes a project and runs"),
     (("--json",), "writes a project and runs nothing"),
     (("--compress", "int8"), "--compress int8 is not for runs over Flower, whose nodes send uploads whole"),
     (("--choose", "loss", "--sample-fraction", "0.5", "--records", "private"), "--choose loss needs the losses that")],
)  # fmt: skip
def test_flags_that_do_not_fit(words, why, tmp_path, capsys):
    assert main(["fedavg", *words, "--flower", str(tmp_path / "project")]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "project").exists()


ENCODING = """
from fedkern import Filter, register_filter

@register_filter("encoding")
class Encoding(Filter):
    "Changes uploads where clients work."

    def encoders(self, asked):
        return {}
"""


def test_a_filter_with_encoders_does_not_fit(tmp_path, capsys):
    (tmp_path / "encoding.py").write_text(ENCODING)
    words = ("fedavg", "--plugin", str(tmp_path / "encoding.py"), "--flower", str(tmp_path / "project"))
    assert main(words) == 2
    assert "The filter encoding has encoders, and nodes of Flower send uploads as they are" in capsys.readouterr().err
    assert not (tmp_path / "project").exists()
    plugins.unload(str(tmp_path / "encoding.py"))


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["fedavg", "--flower", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path} exists and is not an empty folder: name a new one with --flower.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_pooled_method_has_no_nodes(tmp_path, capsys):
    assert main(["centralised", "--flower", str(tmp_path / "project")]) == 2
    assert "needs the data of all clients in one place" in capsys.readouterr().err


def test_two_files_of_one_name(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "code.py").write_text(PLUGIN)
    (tmp_path / "b" / "code.py").write_text(MODEL)
    code = ("--plugin", str(tmp_path / "a" / "code.py"), "--model", f"{tmp_path / 'b' / 'code.py'}:Net")
    assert main(["halved", *FLAGS, *code, "--flower", str(tmp_path / "project")]) == 2
    assert "have one name" in capsys.readouterr().err
    assert not (tmp_path / "project").exists()


@pytest.mark.flower
def test_flower_takes_the_project(tmp_path):
    if importlib.util.find_spec("flwr") is None:
        pytest.skip("flwr is not installed: pip install '.[flower]'")
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate
    from flwr.common.config import get_fused_config_from_dir

    folder = tmp_path / "A Project"
    assert main(["fedgid", *FLAGS, "--flower", str(folder)]) == 0
    found, warnings = load_and_validate(folder / "pyproject.toml")
    assert not warnings
    assert found["project"]["name"] == "a-project"
    assert build_fab_from_disk(folder)
    assert get_fused_config_from_dir(folder, {"rounds": 9})["rounds"] == 9


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_nodes_with_data_of_their_own(method, tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    assert main([method, *FLAGS, "--flower", str(shared)]) == 0
    assert main([method, *FLAGS, "--own-data", "--flower", str(own)]) == 0
    assert [run_settings.read_run_config(run_config(folder)).own_data for folder in (shared, own)] == [False, True]
    assert "the data of its client alone" in (own / "README.md").read_text()
    assert "--own-data" in (shared / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [(["--own-data"], "--own-data is for nodes of Flower: give --flower DIR too."),
     (["--own-data", "--flower", "PROJECT", "--client-test", "0.2"], "need the data of all clients in one place"),
     (["--own-data", "--flower", "PROJECT", "--public-samples", "9"], "which flower.own-data keeps apart")],
    ids=["alone", "client-test", "public"],
)  # fmt: skip
def test_own_data_that_cannot_be(words, why, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the checkout may hold a newcomer's runs
    project = tmp_path / "project"
    assert main(["fedavg", *FLAGS, *(str(project) if word == "PROJECT" else word for word in words)]) == 2
    assert why in capsys.readouterr().err
    assert not project.exists()
    assert not Path("runs").exists()


def test_a_simulation_of_a_whole_run_has_a_node_for_each_client(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)
    assert main(["fedavg", *FLAGS, "--flower", "p"]) == 0
    path, cpu, two = Path("p/pyproject.toml"), "client-resources-num-cpus=1", "verbose=true num-supernodes=2"
    assert simulation_settings(Path("p"), ["verbose=true"]) == [cpu, "num-supernodes=4", "verbose=true"]
    assert simulation_settings(Path("p"), [two]) == [cpu, two]

    text = path.read_text()
    path.write_text(text.replace("\nclients = 4\n", '\nclients = ""\n'))
    with pytest.raises(UserError, match=r"give that number with --federation-config num-supernodes=N\."):
        simulation_settings(Path("p"), [])
    assert simulation_settings(Path("p"), [two]) == [cpu, two]

    for file in (text.replace("fedkern.flower.runs.server_app:app", "own:app"), "", "[tool.flwr]\napp = 3\n", "[tool"):
        path.write_text(file)
        assert simulation_settings(Path("p"), []) == [cpu]
    assert simulation_settings(Path("nonesuch"), []) == [cpu]


def test_a_simulation_without_ray_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Ray, which is not installed: pip install 'flwr\[simulation\]>=1.41"):
        simulation_settings(tmp_path, [])
