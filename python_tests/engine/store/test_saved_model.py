"""Metadata of model.safetensors: right, incomplete, or wrong."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedkern import models
from fedkern.downstream.saved_network import read_model
from fedkern.downstream.tasks import TASKS
from fedkern.engine.run import run
from fedkern.engine.store import saved_model
from fedkern.errors import UserError
from fedkern.run import main
from fedkern.settings.config import RunConfig
from python_tests.interrupted import forget_results

PLAIN = {
    "model": "cnn", "width": 4, "task": "classification", "classes": ["a", "b"], "channels": 3, "image_size": [16, 16],
    "mean": [0.5] * 3, "std": [0.2] * 3, "grey_bits": 8, "window": None, "method": "fedavg",
    "rounds": 1,
}  # fmt: skip
PAIR = {
    "image_encoder": "conv", "text_encoder": "words", "channels": 3, "image_size": [16, 16], "mean": [0.5] * 3,
    "std": [0.2] * 3, "vocabulary": ["a", "b"], "width": 8,
}  # fmt: skip
PAIRED = {**PLAIN, "task": "retrieval", "model": "conv+words", "pair": PAIR}
ANYTHING = [None, True, -1, 0.5, "x", [], [None], {}, 10**400, [[1]], [10**400] * 3]
"""Of every kind that JSON has, none of which fits everywhere."""


def write(folder, about, text=None):
    network = models.build_pair(**PAIR) if "model" in about and "pair" in about else models.build(
        "cnn", classes=2, channels=3, image_size=16, seed=0, width=4
    )  # fmt: skip
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    text = json.dumps({"format": saved_model.FORMAT, **about}) if text is None else text
    save_file(tensors, folder / saved_model.MODEL, metadata={"fedkern": text})


@pytest.fixture
def folder(tmp_path):
    config = RunConfig.make("fedavg", data="digits", model="cnn", width=4, clients=2)
    (tmp_path / "config.toml").write_text(config.to_toml())
    return tmp_path


@pytest.mark.exhaustive
def test_a_key_that_is_missing_or_of_another_kind_is_a_sentence_or_changes_nothing(folder):
    pairs = [{**PAIRED, "pair": pair} for pair in spoilt(PAIR)]
    for about in (*spoilt({**PLAIN, "statistics": "batch", "samples": [1, 1]}), *spoilt(PAIRED), *pairs):
        write(folder, about)
        try:
            read_model(folder)
        except UserError:
            continue
        assert isinstance(about["model"], str)
        assert isinstance(about["method"], str)


def spoilt(about):
    """Yield the table without each key, and with each key's value of any kind."""
    for key in about:
        yield {name: value for name, value in about.items() if name != key}
        yield from ({**about, key: value} for value in ANYTHING)


def test_a_file_that_names_no_network_is_damaged(folder):
    for text in ("[]", "null", "1", '"x"', "{", "", '{"format": 1, "model": NaN}', "[" * 100_000):
        write(folder, PLAIN, text)
        with pytest.raises(UserError, match="is damaged"):
            read_model(folder)
    save_file({}, folder / saved_model.MODEL)
    with pytest.raises(UserError, match="does not say what network it holds"):
        read_model(folder)


def test_what_is_whole_is_read(folder):
    for about in (PLAIN, {**PLAIN, "statistics": "batch"}, PAIRED):
        if "statistics" in about:
            network = models.build("cnn", classes=2, channels=3, image_size=16, seed=0, width=4)
            saved_model.write_model(folder / saved_model.MODEL, network, about)
        else:
            write(folder, about)
        assert read_model(folder)[1] == about


def test_another_format_is_refused(folder):
    for number, told in ((0, "format 0"), (2, "format 2"), ("1", "format '1'"), (None, "no format number")):
        write(folder, {**PLAIN, "format": number})
        with pytest.raises(UserError, match=rf"model.safetensors has {told}, and this version of fedkern reads format"):
            read_model(folder)


@pytest.mark.parametrize("change", [
    {"model": "x"}, {"width": None}, {"width": 8}, {"classes": ["a"]}, {"channels": 1, "mean": [0.5], "std": [0.5]},
    {"image_size": [1, 1]}, {"width": 60_000, "channels": 60_000, "mean": [0.5] * 60_000, "std": [0.5] * 60_000},
])  # fmt: skip
def test_another_network_than_the_tensors_are_of_is_a_sentence(folder, change):
    write(folder, {**PLAIN, **change})
    with pytest.raises(UserError, match=r"model|images|parameters|damaged"):
        read_model(folder)


@pytest.mark.parametrize("change", [
    {"image_encoder": "x"}, {"text_encoder": "x"}, {"vocabulary": None}, {"vocabulary": ["a"]}, {"width": 7},
    {"image_size": [8, 8]}, {"longest": 1},
])  # fmt: skip
def test_another_pair_too(folder, change):
    write(folder, {**PAIRED, "pair": {**PAIR, **change}})
    with pytest.raises(UserError, match=r"encoder|pair|images|parameters|damaged"):
        read_model(folder)


def test_every_command_says_so(folder, capsys):
    for about in ({**PLAIN, "mean": None}, {**PAIRED, "pair": {}}, {"samples": 3}):
        write(folder, about)
        for words in (["attack"], *(["evaluate", "--task", task] for task in TASKS)):
            assert main([*words, str(folder)]) == 2
            said = capsys.readouterr().err
            assert "is damaged" in said
            assert "Traceback" not in said


def test_what_a_method_builds_again_is_looked_at_too(make_data, make_config, tmp_path):
    # The ensemble's tensors, and complete tables of other clients or images.
    data, out = make_data(), tmp_path / "run"
    run(make_config("ensemble", rounds=None), out=out, data=data)
    forget_results(out)
    path = out / saved_model.MODEL
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fedkern"])
    tensors = load_file(path)
    assert {"format": saved_model.FORMAT, **read_model(out)[1]} == about
    for change in ({"samples": [1]}, {"samples": [0] * 40}, {"classes": ["a"]}, {"image_size": [1, 1]},
                   {"channels": 1, "mean": [0.5], "std": [0.5]}, {"task": "segmentation"}):  # fmt: skip
        save_file(tensors, path, metadata={"fedkern": json.dumps({**about, **change})})
        try:
            network, _ = read_model(out)
        except UserError:
            continue
        assert set(network.state_dict()) == set(tensors)  # what changes nothing of the module
