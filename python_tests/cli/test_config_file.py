"""The file of ``--config``: its contents and its mistakes."""

import pytest

from fedkern.cli import flags, request
from fedkern.settings.config import RunConfig
from fedkern.settings.stored import load_settings


def test_a_config_file_with_a_mistake(fails, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("roundz = 3\n")
    assert '"roundz"' in (sentence := fails("fedavg", "--config", str(path)))
    assert 'Did you mean "rounds"' in sentence
    path.write_text("rounds = \n")
    assert "settings.toml" in fails("fedavg", "--config", str(path))
    path.write_text("[options]\nalpah = 0.5\n")
    assert '"alpah"' in fails("fedgid", "--config", str(path))
    path.write_bytes(b"\xff\xfe")
    assert "settings.toml" in fails("fedgid", "--config", str(path))


def test_flags_override_the_config_file_which_overrides_the_defaults(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('method = "fedgid"\nrounds = 7\nlr = 0.2\n[options]\nalpha = 0.9\ntemperature = 3.0\n')
    config = request.effective_config(
        flags.parse_run(["--config", str(path), "--lr", "0.3", "--method-option", "alpha=0.8"])
    )
    assert (config.method, config.rounds, config.lr) == ("fedgid", 7, 0.3)
    assert (config.options["alpha"], config.options["temperature"]) == (0.8, 3)
    assert config.batch_size == RunConfig.make("fedgid").batch_size


def test_a_file_of_another_method_gives_its_settings_but_no_options(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('method = "fedgid"\nrounds = 7\nlr = 0.2\n[options]\nalpha = 0.9\n')
    config = request.effective_config(flags.parse_run(["fedavg", "--config", str(path)]))
    assert (config.method, config.rounds, config.lr) == ("fedavg", 7, 0.2)


def test_a_file_of_a_run_may_name_settings_without_effect(tmp_path):
    config = RunConfig.make("fedavg", optimizer="adamw", local_steps=2)
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert request.effective_config(flags.parse_run(["--config", "config.toml"])) == config


def test_epochs_take_the_place_of_default_steps(tmp_path):
    assert RunConfig.make("feddra").local_steps == 20
    config = request.effective_config(flags.parse_run(["feddra", "--local-epochs", "1"]))
    assert (config.local_epochs, config.local_steps) == (1, None)


def test_a_byte_order_mark_says_nothing(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('method = "fedavg"\nrounds = 7\n', encoding="utf-8-sig")
    config = request.effective_config(flags.parse_run(["--config", str(path)]))
    assert config.rounds == 7
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config.to_toml(), encoding="utf-8-sig")
    assert load_settings(tmp_path / "run") == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('method = ["fedavg"]', ["Unknown method", "settings.toml"]),
        ("method = 3", ["Unknown method", "settings.toml"]),
        ('method = "fedavg"\nmodel = ["cnn"]', ["--model", "a word"]),
        ('method = "fedavg"\ndata = ["digits"]', ["--data", "a word"]),
        ('method = "fedavg"\ndata_root = ["here"]', ["--data-root", "a word"]),
        ('method = "fedavg"\nlr = [0.1]', ["--lr", "a number"]),
        ("method = 'fedavg'\nlocal_epochs = 1" + "0" * 400, ["--local-epochs", "at most 2147483647"]),
        ("method = 'fedavg'\nlr_decay = 0.9\nlr-decay = 0.8", ["settings.toml", "lr_decay twice"]),
    ],
)
def test_a_value_of_another_kind_is_one_sentence(fails, tmp_path, text, parts):
    (tmp_path / "settings.toml").write_text(text)
    sentence = fails("--config", "settings.toml")
    for part in parts:
        assert part in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["settings.toml"]
