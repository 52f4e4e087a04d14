"""User-defined networks on the command line: --model FILE.py:NAME and --init, from the first round to the last."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from fedkern.cli import flags, request
from fedkern.settings.config import load_settings
from python_tests import own_networks
from python_tests.interrupted import undo_rounds

TINY = ["--data", "digits", "--train-samples", "40", "--clients", "2", "--local-epochs", "1", "--threads", "1",
        "--grad-cam", "0", "--data-option", "test_samples=20", "--partition", "iid", "--rounds", "1"]  # fmt: skip
DOCS = Path(__file__).parents[2] / "docs"
NETWORK = """\
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes, channels):
        super().__init__(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, classes))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NETWORK)
    return path


@pytest.mark.usefixtures("undrawn")
def test_a_run_is_resumed_where_its_code_is_named_again(file, tmp_path, fails, result):
    words = ["fedavg", *TINY, "--model", "net.py:Net"]
    out, _ = result(*words, "--out", "run")
    name = f"{file}:Net"
    assert f"--model {name}" not in out  # the same method needs no comparison
    stored = load_settings("run")
    assert stored.model == name
    assert f'model = "{name}"' in Path("run/config.toml").read_text()
    assert (stored.model_sha256 or "").startswith("sha256:")
    model = Path("run/model.safetensors").read_bytes()
    undo_rounds(Path("run"))
    said = fails("--resume", "run")
    assert f"run/config.toml names code to run, {name}" in said
    assert f"give the option again, --model {name}" in said
    assert "has other settings" in fails("--resume", "run", "--model", "net.py:Other")
    assert [path.name for path in Path("run").iterdir()] == ["config.toml"]
    result("--resume", "run", "--model", "net.py:Net")
    assert Path("run/model.safetensors").read_bytes() == model
    for words in (["--resume", "run"], ["attack", "run", "--model", "net.py:Net", "--json"]):
        out, _ = result(*words)
    assert json.loads(out)["members"] == 40
    assert f"--model {name}" in fails("attack", "run")


@pytest.mark.exhaustive
def test_the_pages_network_with_stages(file, result):
    (code,) = re.findall(r"```python\n# net.py\n(.*?)```", (DOCS / "own-network.md").read_text(), re.DOTALL)
    file.write_text(code)
    words = ["--model", "net.py:Net", *TINY[2:]]
    out, _ = result("fedgid", "--data", "colordigits", *words, "--out", "run")
    (again,) = re.findall(r"python -m fedkern\.run fedavg .*", out)
    repeated = request.effective_config(flags.parse_run(shlex.split(again)[3:]))
    assert (repeated.model, repeated.width, repeated.train_samples) == (f"{file}:Net", None, 40)
    (stages,) = re.findall(r"```python\nclass Net.*\n( *stages = .*?)  #.*\n```", (DOCS / "models.md").read_text())
    file.write_text(code.replace("class Net(nn.Module):\n", f"class Net(nn.Module):\n{stages}\n"))
    result("fusefl", *TINY[:-2], "--local-epochs", "2", "--model", "net.py:Net", "--out", "other")


@pytest.mark.exhaustive
@pytest.mark.parametrize("changed", ["net.py", "beside.py"])
def test_a_changed_file_is_said(file, changed, result):
    beside = file.with_name("beside.py")
    beside.write_text("from torch.nn import ReLU")
    file.write_text("import beside\n" + NETWORK.replace("nn.ReLU", "beside.ReLU"))
    result("fedavg", *TINY, "--model", "net.py:Net", "--out", "run")
    undo_rounds(Path("run"))
    file.with_name(changed).write_text(file.with_name(changed).read_text() + "\nCHANGED = True\n")
    sys.modules.pop("beside")
    _, err = result("--resume", "run", "--model", "net.py:Net")
    assert f"goes on with the network {file}:Net as it is now" in " ".join(err.split())


@pytest.mark.exhaustive
def test_settings_of_an_earlier_run_make_a_new_one(file, result):
    result("fedavg", *TINY, "--model", "net.py:Net", "--out", "run")
    before = load_settings("run")
    file.write_text(NETWORK.replace("ReLU", "Tanh"))
    result("--config", "run/config.toml", "--out", "again")
    again = load_settings("again")
    assert again.model == before.model
    assert again.model_sha256 != before.model_sha256


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "net.py:Nat"], 'net.py has no "Nat". Did you mean "Net"?'),
        (["--model", "net.py:Net", "--width", "8"], "--width 8 is not for"),
        (["--init", "net.py"], "is damaged: "),
        (["--init", ""], "--init is given without a value"),
    ],
)
def test_mistakes_end_in_one_sentence_and_leave_nothing(words, said, file, tmp_path, fails):
    assert said in fails("fedavg", *TINY, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["net.py"]


def test_methods_that_cannot_use_it_say_so(file, tmp_path, fails):
    file.write_text(Path(own_networks.__file__).read_text().replace("x[:, 0].flatten(1)", "x.mean((1, 2)) @ self.out"))
    said = fails("moon", *TINY, "--model", "net.py:Raw")
    assert "cannot take the images of digits, 1x" in said
    code = fails("ensemble", *TINY[:-2], "--method-option", "models=net.py:Net")
    assert "is code: register that network with @fedkern.register_model(NAME)" in code
    assert [path.name for path in tmp_path.iterdir()] == ["net.py"]


def test_help_names_the_forms(result):
    out, _ = result("fedavg", "--help")
    assert "FILE.py:NAME or MODULE:NAME" in " ".join(out.split())
    assert "--init FILE" in out


@pytest.mark.exhaustive
@pytest.mark.parametrize(("page", "name"), [("own-network.md", "net.py"), ("own-data.md", "images.py")])
def test_a_tutorial(page, name, tmp_path, result, monkeypatch):
    text = (DOCS / page).read_text()
    code, *blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for block in blocks:
        exec(block.replace("simulate(", "simulate(progress=False, pictures=False, local_steps=1, method="), {})
    for command in re.findall(r"^fedkern (fedavg (?!.*DIR).*?)(?: +#.*)?$", text, re.MULTILINE):
        result(*shlex.split(command), "--local-steps", "1", "--quiet")
