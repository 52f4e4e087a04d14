"""The command line: help, list, doctor, mistakes, and the meaning of flags."""

import dataclasses
import gzip
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

import fedkern
from fedkern import typed_option
from fedkern.cli import flags, repeat, request
from fedkern.methods import METHODS
from fedkern.settings.config import RunConfig

SMALL = ["--train-samples", "60", "--clients", "2", "--local-epochs", "1", "--threads", "1", "--width", "4"]
TINY = [*SMALL, "--rounds", "2", "--grad-cam", "8"]


# -- help, list, doctor ------------------------------------------------------------------------------------------------


def test_the_help_of_a_method_names_every_setting(result):
    text, _ = result("fedavg", "--help")
    for setting in RunConfig.list_options():
        if setting.field != "method":
            assert re.search(rf"^  {flags.flag(setting.field)} ", text, re.MULTILINE), setting.field
    for name in (
        "--client-column NAME",
        "--detector PATH_OR_NAME",
        "--boxes FILE",
        "--method-option key=value",
        "--resume DIR",
    ):
        assert name in text
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("model", {"model", "freeze-bn-after"}),
        ("data", {"data", "clients", "client-column", "data-option"}),
        ("federation", {"rounds", "stop-at"}),
        ("faults", {"on-nan", "stragglers"}),
        ("privacy", {"dp-clip", "records"}),
        ("training", {"lr", "teachers"}),
        ("execution", {"seed", "workers"}),
        ("run", {"method-option", "resume"}),
    ],
)
def test_the_help_has_the_settings_of_a_section_under_its_name(result, section, settings):
    text, _ = result("fedavg", "--help")
    under = re.split(r"^(?=\w)", text.partition(f"\n{section}:\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    assert settings <= set(re.findall(r"^  (?:-h, )?--(\S+)", under, re.MULTILINE))


def test_the_version_is_told_without_loading_torch():
    code = "import sys, fedkern.run; fedkern.run.main(['--version']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"fedkern {fedkern.__version__}\n"


@pytest.mark.parametrize(("command", "flag"), [("attack", "--data-root DIR"), ("list", "--json"), ("doctor", "--json")])
def test_a_command_has_a_help_of_its_own(result, command, flag):
    text, _ = result(command, "--help")
    assert text.startswith(f"usage: {flags.PROGRAM} {command}")
    assert flag in text
    assert "--batch-size" not in text


def test_the_help_of_a_method_begins_with_its_own_options(result):
    text, _ = result("fedgid", "--help")
    assert text.index("method options") < text.index("mix_stage") < text.index("--data NAME")


def test_help_shows_the_defaults_of_the_data_set(result):
    for argv in (["fedavg", "--data", "cifar100", "--help"], ["fedavg", "--help", "--data=cifar100"]):
        text, _ = result(*argv)
        assert re.search(r"--model NAME [^;]*; default resnet18", " ".join(text.split()))
    assert re.search(r"--model NAME [^;]*; default cnn", " ".join(result("fedavg", "--help")[0].split()))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_help_of_a_method_shows_its_options_with_ranges(result, method):
    text, _ = result(method, "--help")
    assert METHODS[method].description in " ".join(text.split())
    if not METHODS[method].Options.list_options():
        assert "It has no options of its own." in text
        return
    options = text[text.index("method options") :]
    flat = " ".join(options.split())
    for option in METHODS[method].Options.list_options():
        assert re.search(rf"^  {option.name} ", options, re.MULTILINE)
        assert option.range in flat


def test_list_has_one_line_for_everything(result):
    text, _ = result("list")
    for name in ("fedavg", "fedprox", "fedgid", "colordigits", "cifar10", "resnet18", "dirichlet:ALPHA", "classes:S"):
        assert re.search(rf"^  {re.escape(name)}\S* +\S.{{20,}}$", text, re.MULTILINE)
    found = json.loads(result("list", "--json")[0])
    kinds = {"methods", "data sets", "models", "image encoders", "text encoders", "partitioners", "aggregators"}
    assert set(found) == kinds
    assert all(text and "\n" not in text for entries in found.values() for text in entries.values())


def test_doctor(result):
    text, _ = result("doctor")
    for word in ("torch", "processor", "threads", "GPU", "reference"):
        assert word in text
    report = json.loads(result("doctor", "--json")[0])
    assert report["threads"]["torch"] == torch.get_num_threads()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["Which method", "fedgid"]),
        (["fedgidd"], ['"fedgidd"', 'Did you mean "fedgid"']),
        (["doctor", "--profile"], ['doctor does not take "--profile"']),
        (["attack", "DIR", "--predictions"], ['attack does not take "--predictions"']),
        (["fedgid", "--roundz", "3"], ['"--roundz"', 'Did you mean "--rounds"']),
        (["--methodoption=alpha=1", "fedgid"], ['"--methodoption"', 'Did you mean "--method-option"']),
        (["fedgid", "--alpha", "0.5"], ["--alpha", "--method-option alpha=VALUE"]),
        (["fedavg", "--augment", "flip"], ["--augment", "crop-flip"]),
        (["fedavg", "--lr", "inf"], ["--lr", "finite"]),
        (["fedavg", "--lr", "1e39"], ["--lr", "at most 1e+30"]),
        (["fedavg", "--weight-decay", "1e300"], ["--weight-decay", "at most 1e+30"]),
        (["fedavg", "--clip-norm", "1e300"], ["--clip-norm", "at most 1e+30"]),
        (["fedprox", "--method-option", "mu=1e300"], ['"mu"', "at most 1e+30"]),
        (["feddyn", "--method-option", "alpha=1e300"], ['"alpha"', "at most 1e+30"]),
        (["fedavg", "--threads", "99999999999"], ["--threads", "[0, 1024]", "99999999999"]),
        (["fedavg", "--data", "folder", "--data-option", "size=1000000"], ["size", "in [8, 8192]"]),
        (["fedavg", "--data-option", "test_samples=1" + "0" * 20], ["test_samples", "at most 2147483647"]),
        (["fedgid", "--lr"], ["--lr"]),
        (["fedgid", "--rounds", "many"], ["--rounds", "integer", '"many"']),
        (["fedgid", "--rounds", "0"], ["--rounds", "[1, 100000]"]),
        (["fedgid", "--buffers", "mean"], ["--buffers", "average, local, drop"]),
        (["fedgid", "--method-option", "alpah=1"], ['"alpah"', 'Did you mean "alpha"']),
        (["fedgid", "--method-option", "alpha=1.5"], ['"alpha"', "[0, 1]"]),
        (["fedgid", "--method-option", "alpha"], ["key=value"]),
        (["fedgid", "--data", "colourdigits"], ['"colourdigits"', 'Did you mean "colordigits"']),
        (["fedgid", "--data-option", "sise=3"], ['"sise"']),
        (["fedgid", *("--data-option", "test_samples=3"), *("--data-option", "test-samples=4")], ["given twice"]),
        (["fedgid", "--client-column", "site"], ["client_column"]),
        (["fedavg", "--local-epochs", "1", "--local-steps", "1"], ["--local-epochs has no effect beside --local"]),
        (["fedavg", "--backdoor-target", "1"], ["backdoor_target has no effect without backdoor_clients"]),
        (["fedgid", "--partition", "dirichlet:0"], ["positive"]),
        (["fedgid", "--clients", "2000"], ["2000"]),
        (["fedgid", "--train-samples", "3", "--clients", "5"], ["5"]),
        (["fedavg", "--data", "mnist"], ["--data-root"]),
        (["fedgid", "--config", "none.toml"], ["none.toml"]),
        (["--resume", "nowhere"], ["nowhere does not exist", "--out"]),
        (["--resume", "nowhere", "--out", "there"], ["--out"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence(fails, tmp_path, argv, parts):
    sentence = fails(*argv)
    for part in parts:
        assert part in sentence
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_damaged_file_is_named(fails, tmp_path):
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    for name in names:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\0\0\x08\x03 not an IDX file"))
    sentence = fails("fedavg", "--data", "mnist", "--data-root", str(tmp_path))
    assert "idx" in sentence
    assert not (tmp_path / "runs").exists()


def test_memory_that_is_not_there(fails, monkeypatch):
    def greedy(*_):
        raise MemoryError("Unable to allocate 2.7 TiB for an array")

    monkeypatch.setattr("fedkern.run._dispatch", greedy)
    sentence = fails("fedavg")
    assert "not enough memory (Unable to allocate 2.7 TiB" in sentence
    assert "--train-samples" in sentence


@pytest.mark.parametrize(("name", "value"), [("FEDKERN_BACKEND", "tpu"), ("FEDKERN_CPU_ISA", "avx1024")])
def test_a_backend_that_does_not_exist(fails, monkeypatch, name, value):
    from fedkern.ops._core import backend

    if name == "FEDKERN_CPU_ISA":
        pytest.importorskip("fedkern._cpu", reason="the compiled core is not built")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(backend, "_isa_applied", False)
    sentence = fails("fedavg", *TINY)
    assert name in sentence
    assert value in sentence


# -- what is asked for is what runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "repeated"),
    [
        # Fed-LPFM's and FML's own on the digits
        (
            ["fedlpfm"],
            ["--data digits", "--partition classes:2", "--rounds 40", "--local-epochs 1", "--lr 0.1 --momentum 0.0"],
        ),
        (["fml", "--lr", "0.3"], ["--lr 0.3", "--momentum 0.0"]),
        (["fusefl", "--method-option", "calibration_epochs=2"], ["--method-option calibration_epochs=2"]),
        (["fedprox", "--method-option", "weighting=uniform"], ["--method-option weighting=uniform"]),
    ],
)
def test_the_command_for_comparison_repeats_what_differs_from_its_own_defaults(argv, repeated):
    config = request.effective_config(flags.parse_run(argv))
    baseline = "oneshot-fedavg" if argv[0] == "fusefl" else "fedavg"
    command = repeat.command_line(baseline, config)
    assert all(f" {words}" in command for words in repeated)
    assert "calibrate=" not in command  # a part of FuseFL, not of what it is compared with


def test_a_word_is_converted_once(monkeypatch):
    converted, convert = [], typed_option._convert
    monkeypatch.setattr(typed_option, "_convert", lambda value, kind: converted.append(value) or convert(value, kind))
    words = ["--lr", "0.0321", "--method-option", "alpha=0.4321", "--cue-size", "12", "--cue-clients", "1"]
    config = request.effective_config(flags.parse_run(["fedgid", *words]))
    again = config.replace(rounds=3).with_client_threads()
    assert (again.lr, again.method_instance.options.alpha, again.data_options["cue_size"]) == (0.0321, 0.4321, 12)
    assert [converted.count(word) for word in ("0.0321", 0.0321, "0.4321", 0.4321, "12", 12)] == [1, 0, 1, 0, 1, 0]


def test_data_options_have_flags():
    request = flags.parse_run(["fedgid", "--data", "csv", "--client-column", "ward", "--data-option", "label=kind"])
    assert request.data_options == {"client_column": "ward", "label": "kind"}


@pytest.mark.parametrize(
    "argv",
    [
        ["fedgid"],
        ["fedgid", "--correlation", "0.8", "--seed", "3", "--clients", "4", "--train-samples", "500"],
        ["fedgid", "--data", "digits", "--partition", "dirichlet:0.3", "--rounds", "9", "--model", "resnet8"],
        ["fedgid", "--data", "cifar10", "--data-root", "a folder", "--model", "cnn", "--width", "16"],
        ["fedprox", "--data", "csv", "--client-column", "ward", "--data-root", "a folder", "--method-option", "mu=0.5"],
        ["fedgid", "--lr", "0.123", "--data-option", "test_samples=50"],
    ],
)
def test_the_command_for_comparison_has_the_same_split_and_budget(argv):
    config = request.effective_config(flags.parse_run(argv))
    command = repeat.command_line("fedavg", config)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "fedkern.run", "fedavg"]
    baseline = request.effective_config(flags.parse_run(words[3:]))
    assert baseline.method == "fedavg"
    for field in dataclasses.fields(RunConfig):
        if field.name not in ("method", "options"):
            assert getattr(baseline, field.name) == getattr(config, field.name), field.name


def test_private_records_are_not_repeated_where_they_follow_from_the_options():
    private = {"epsilon": 1.0}
    for options, records, given in ((private, None, False), (private, "private", False), ({}, "private", True)):
        config = RunConfig.make("fediod", options=options, records=records)
        assert config.records == "private"
        assert ("--records private" in repeat.command_line("fedavg", config)) == given
