"""Refusals of settings that do not fit image-text data, before anything is on disk."""

from pathlib import Path

import pytest

from fedkern.settings.config import RunConfig

TINY = ("--train-samples", "60", "--clients", "2", "--rounds", "1", "--width", "4", "--local-steps", "1",
        "--data-option", "test_samples=10", "--data-option", "validation_samples=10")  # fmt: skip


@pytest.mark.parametrize("method", ["feddra", "centralised"])
def test_a_batch_of_a_single_pair(method, fails):
    sentence = fails(method, "--data", "captions", *TINY, "--batch-size", "1", "--out", "run")
    assert "--batch-size 1 is too small for image-text data" in sentence
    assert "--model" not in sentence
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "said", "offered"),
    [  # the second network is the default where there is a choice
        *(
            (("feddra", *TINY, "--model", model), 'no effect on the data set "captions"', "--image-encoder and --text-")
            for model in ("resnet8", "cnn")
        ),
        *(
            (("fedavg", "--data", "digits", flag, value), "is for images with texts", "--model")
            for flag, value in (("--image-encoder", "vit"), ("--text-encoder", "words"))
        ),
    ],
)
def test_networks_that_the_data_do_not_have(words, said, offered, fails):
    sentence = fails(*words, "--out", "run")
    assert " ".join(words[-2:]) in sentence
    assert said in sentence
    assert offered in sentence
    assert not Path("run").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_file_of_all_settings_is_still_read(result, fails):
    """Like config.toml of every run, the file names a model too."""
    sizes = {"test_samples": 10, "validation_samples": 10}
    settings = {"train_samples": 60, "clients": 2, "rounds": 1, "width": 4, "local_steps": 1}
    text = RunConfig.make("fedavg", data="captions", **settings, data_options=sizes).to_toml()
    assert 'model = "cnn"' in text
    Path("all.toml").write_text(text)
    result("fedavg", "--config", "all.toml", "--out", "run", "--quiet")
    Path("other.toml").write_text(text.replace('model = "cnn"', 'model = "mlp"'))
    assert "--model mlp has no effect" in fails("fedavg", "--config", "other.toml", "--out", "again")


@pytest.mark.usefixtures("undrawn")
def test_the_first_lines_name_the_encoders(result):
    shown = "".join(result("fedavg", "--data", "captions", *TINY, "--image-encoder", "vit", "--out", "run"))
    assert "vit+words with" in shown
    assert "cnn with" not in shown
