"""Tests of settings: defaults, TOML round trip, differences, and the wording of errors."""

import math
import tomllib

import numpy as np
import pytest
import torch

from fedkern.data import DATASETS
from fedkern.errors import UserError
from fedkern.files import toml
from fedkern.methods import METHODS
from fedkern.models import MODELS
from fedkern.settings.config import RunConfig, read_settings
from fedkern.settings.defaults import DATA, METHOD, METHOD_ON, defaults
from fedkern.settings.error_wording import key_words, python_words, to_python_words


@pytest.mark.sampled(7)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_defaults_are_valid_settings_and_survive_toml(method):
    for data in sorted(DATASETS):
        config = RunConfig.make(method, data=data)
        assert config.partition, data
        assert config.width, data
        assert RunConfig.of(read_settings(config.to_toml())) == config, data


def test_numbers_of_numpy_are_settings():
    given = {"rounds": np.int64(2), "lr": np.float32(0.5), "clients": np.uint8(3), "seed": np.int16(7)}
    options, data_options = {"mu": np.float16(0.25)}, {"test_samples": np.int32(5)}
    config = RunConfig.make("fedprox", data="digits", **given, options=options, data_options=data_options)
    assert RunConfig.of(read_settings(config.to_toml())) == config
    found = [config.rounds, config.lr, config.clients, config.seed, config.options["mu"], config.data_options]
    assert found == [2, 0.5, 3, 7, 0.25, {"test_samples": 5}]
    assert [type(value) for value in found] == [int, float, int, int, float, dict]


def test_defaults_name_only_what_exists():
    assert set(DATA) <= set(DATASETS)
    assert {*METHOD, *(method for method, _ in METHOD_ON)} <= set(METHODS)
    assert {data for _, data in METHOD_ON} <= set(DATASETS)
    assert RunConfig().clients == DATASETS[RunConfig().data].clients


def test_a_method_may_have_its_own_data_and_settings(monkeypatch):
    monkeypatch.setitem(METHOD, "fedgid", {"data": "digits", "lr": 0.2, "options": {"alpha": 0.7}})
    monkeypatch.setitem(METHOD_ON, ("fedgid", "mnist"), {"rounds": 9, "options": {"lambda": 0.2}})
    config = RunConfig.make("fedgid")
    assert (config.data, config.lr, config.options["alpha"]) == ("digits", 0.2, 0.7)
    config = RunConfig.make("fedgid", data="mnist", lr=0.3)
    assert (config.rounds, config.lr, config.options["alpha"], config.options["lambda"]) == (9, 0.3, 0.7, 0.2)
    assert RunConfig.make("fedavg").data == "colordigits"


@pytest.mark.parametrize("steps", ["0", "4,2", "2,2", "1.5", "-3", "2,,3"])
def test_bad_lr_steps(steps):
    with pytest.raises(UserError, match="--lr-steps must be epochs of at least 1 in rising order"):
        RunConfig.make("fedavg", lr_steps=steps)


def test_lr_steps_are_numbers():
    config = RunConfig.make("fedavg", lr_steps="20, 40")
    assert (config.lr_steps, config.lr_epochs) == ("20,40", (20, 40))
    assert RunConfig.of(read_settings(config.to_toml())) == config


def test_what_is_given_wins_over_the_defaults_of_method_and_data():
    assert RunConfig.make("fedgid", lr=0.3).lr == 0.3
    chosen = RunConfig.make("fedgid", options=["lambda=0.77", "alpha=0.9"]).options
    assert (chosen["lambda"], chosen["alpha"]) == (0.77, 0.9)
    own = defaults("fedgid", "colordigits").get("options", {})
    assert {**RunConfig.make("fedgid").options, **own} == dict(RunConfig.make("fedgid").options)


def test_a_default_width_is_that_of_the_default_network(monkeypatch):
    monkeypatch.setitem(METHOD_ON, ("fediod", "digits"), {"width": 5})
    usual = RunConfig.make("fediod")
    assert usual.width == 5
    assert RunConfig.make("fediod", model=usual.model).width == 5
    assert RunConfig.make("fediod", model="cnn").width == MODELS["cnn"].width
    assert RunConfig.make("fediod", model="cnn", width=3).width == 3


def test_methods_share_the_settings_of_a_data_set():
    a, b = (RunConfig.make(m) for m in ("fedavg", "fedgid"))
    assert {d.split(":")[0].split(".")[0] for d in b.differences(a)} <= {"method", "options"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, r"--lr must be above 0, not 0"),
        ({"lr": "fast"}, '--lr must be a number, not "fast"'),
        ({"rounds": 0}, r"--rounds must be in \[1, 100000\]"),
        ({"rounds": 10**9}, r"--rounds must be in \[1, 100000\]"),
        ({"sample_fraction": 1.5}, "--sample-fraction must be above 0 and at most 1"),
        ({"correlation": 2}, r"--correlation must be in \[0, 1\]"),
        ({"lr": math.inf}, "--lr must be finite"),
        ({"augment": "crop-flop"}, '--augment must be one of none, crop.*Did you mean "crop-flip"'),
        ({"momentum": 1}, "--momentum must be below 1"),
        ({"freeze_bn_after": 3, "buffers": "drop"}, "--freeze-bn-after.*--buffers drop.*leave one of the two out"),
        ({"buffers": "avg"}, '--buffers must be one of average, local, drop, pool, not "avg"'),
        ({"device": "gpu"}, "--device must be one of auto, cpu, cuda, cuda:N, not "),
        ({"device": "cuda:N"}, "--device must be one of auto, cpu, cuda, cuda:N, not "),
        ({"lernrate": 1}, 'Unknown setting "lernrate"'),
        ({"data": "colourdigits"}, '"colourdigits".*Did you mean "colordigits"'),
        ({"options": ["alpha=1.5"]}, r'"alpha" must be in \[0, 1\], not 1.5'),
    ],
)
def test_mistakes_are_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig.make("fedgid", **settings)


AVERAGED = {
    "max_update_norm": {"max_update_norm": 3.0}, "clip_update_norm": {"clip_update_norm": 3.0},
    "compress": {"compress": "int8"}, "aggregator": {"aggregator": "median"},
    "dp_clip": {"dp_clip": 1.0, "dp_noise": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGED)
def test_what_is_for_methods_that_average_is_refused_for_others(name):
    said = f"^--{name.replace('_', '-')} is for methods that average .* "
    for method, kind in METHODS.items():
        given = {**AVERAGED[name], **({"rounds": None} if kind.one_shot else {})}
        if not kind(kind.Options()).averages:
            with pytest.raises(UserError, match=f"{said}{method} "):
                RunConfig.make(method, **given)
        elif name == "max_update_norm":
            assert RunConfig.make(method, **given).max_update_norm == 3.0


def test_feddyn_clips_no_update():
    with pytest.raises(UserError, match="is not for feddyn, whose clients keep a gradient of their whole update"):
        RunConfig.make("feddyn", clip_update_norm=3.0)


@pytest.mark.parametrize("method", ["fediod", "ensemble", "fusefl"])
def test_fixed_statistics_are_for_networks_trained_round_by_round(method):
    with pytest.raises(UserError, match=f"--freeze-bn-after is not for {method}"):
        RunConfig.make(method, freeze_bn_after=2)


def test_differences_name_setting_old_and_new():
    config = RunConfig.make("fedgid")
    changed = config.replace(lr=0.5, options={**config.options, "temperature": math.inf})
    assert changed.differences(config) == ["lr: 0.05 -> 0.5", "options.temperature: 1.0 -> inf"]
    assert config.differences(config) == []
    assert RunConfig.of(read_settings(changed.to_toml())) == changed
    assert RunConfig.make("fedavg", lr=0.1).differences(config) == ["method: fedgid -> fedavg", "lr: 0.05 -> 0.1"]


def test_a_partial_file_has_only_what_it_says():
    table = read_settings('lr = 0.2\nlocal-epochs = 3\n[options]\n"lambda" = 2\n')
    assert table == {"lr": 0.2, "local_epochs": 3, "options": {"lambda": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "not a valid TOML file"),
        ("learning = 1", 'unknown setting "learning"'),
        ("options = 3", "must be a table"),
    ],
)
def test_bad_files(text, message):
    with pytest.raises(UserError, match=message):
        RunConfig.of(read_settings(text))


def test_toml_text_is_what_the_standard_library_reads():
    table = {
        "text": 'quotes " and \\ and \n and \x7f and ü',
        "number": -3,
        "real": 1e-30,
        "whole": 2.0,
        "inf": math.inf,
        "flag": True,
        "list": ["a", 1, 2.5, False],
        "sub": {"odd key!": "x", "plain": 1},
        "empty": {},
    }
    assert tomllib.loads(toml.dumps(table)) == table
    assert isinstance(tomllib.loads(toml.dumps(table))["whole"], float)
    with pytest.raises(TypeError, match="NoneType"):
        toml.dumps({"x": None})


def test_threads_and_device_are_resolved_and_a_gpu_has_a_number(monkeypatch):
    config = RunConfig.make("fedavg")
    assert config.threads >= 1
    assert config.device in ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert RunConfig.make("fedavg", device="cuda:1").device == "cuda:1"
    with pytest.raises(UserError, match=r"--device cuda:2: PyTorch sees 2 GPUs, the last is cuda:1\."):
        RunConfig.make("fedavg", device="cuda:2")


@pytest.mark.parametrize(("method", "options"), [("fusefl", {}), ("local", {}), ("fedproto", {"networks": "personal"})])
def test_who_keeps_every_clients_statistics(method, options):
    assert RunConfig.make(method, options=options, buffers="average").buffers == "average"
    with pytest.raises(UserError, match=f"--buffers drop is not for {method} with these options, which keeps every"):
        RunConfig.make(method, options=options, buffers="drop")


# -- error wording -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rounds must be at least 1, not 0.", "rounds must be at least 1, not 0."),
        ("--width 8 is not for it: leave width out.", "width=8 is not for it: leave width out."),
        ("--device cuda needs a GPU; use --device cpu.", 'device="cuda" needs a GPU; use device="cpu".'),
        ("--privacy-unit patient needs all", 'privacy_unit="patient" needs all'),
        ("give --data-option bits=12 or", 'give data_options={"bits": 12} or'),
        ("with --method-option intervention=off.", 'with intervention="off".'),
        ("continue it with --resume 'a b', or choose another --out.",
         "continue it with fedkern.load('a b').resume(), or choose another out."),
        ("continue it with --resume second.", 'continue it with fedkern.load("second").resume().'),
        ("go on with --resume, or", "go on with resume(), or"),
        ("give --boxes FILE or --client-column.",
         'give data_options={"boxes": FILE} or data_options={"client_column": ...}.'),
        ("name another folder with --out.", "name another folder with out=."),
        ("compare METHOD --sweep lr=0.1,0.2.", 'fedkern.compare(METHOD, sweep={"lr": [0.1, 0.2]}).'),
        ("take --network last (in Python best=False).", "take best=False."),
        ("give --model 'x.py:N' (in Python trusted=[...]).", "give trusted=[...]."),
        ("name its code, --model FILE.py:NAME.", 'name its code, model="FILE.py:NAME".'),
        ("--lr-step-factor has no effect", "lr_step_factor has no effect"),
        ("METHOD --help lists them; a--b stays.", "METHOD --help lists them; a--b stays."),
    ],
)  # fmt: skip
def test_flags_become_arguments(flags, words):
    assert to_python_words(flags) == words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rounds must be at least 1, not 0.", "rounds must be at least 1, not 0."),
        ("leave --local-epochs 3 out, or", "leave local-epochs=3 out, or"),
        ("give --data-option bits=12 or", "give data-option.bits=12 or"),
        ("with --method-option intervention=off.", "with method-option.intervention=off."),
        ("--buffers drop is not for it", 'buffers="drop" is not for it'),
        ("go on with --resume DIR.", "go on with --resume DIR."),
    ],
)
def test_flags_become_keys_of_a_run_config(flags, words):
    with pytest.raises(UserError) as told, key_words():
        raise UserError(flags)
    assert str(told.value) == words


def test_an_error_keeps_its_type_and_others_their_words():
    class Own(UserError):
        exit_code = 7

    with pytest.raises(Own, match=r"^rounds=3 is wrong") as told, python_words():
        raise Own("--rounds 3 is wrong")
    assert told.value.exit_code == 7
    with pytest.raises(ValueError, match=r"^--rounds"), python_words():
        raise ValueError("--rounds")
