"""Folders of networks with Python code: it never runs, whatever the answer on standard input."""

import ast
import builtins
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fedkern
from fedkern.errors import UserError
from fedkern.models import towers
from fedkern.models.pretrained.detector import GroundingDino
from fedkern.models.pretrained.safe_loading import quiet
from fedkern.models.teachers.clip import clip_teacher

transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")

KINDS = ["AutoConfig", "AutoModel", "AutoTokenizer", "AutoBackbone", "AutoImageProcessor", "AutoProcessor"]
CODE = """\
import pathlib
pathlib.Path(__file__).with_name("ran").write_text("")
pathlib.Path({marker!r}).write_text("")
from transformers import BertConfig, BertModel, BertTokenizer
class Config(BertConfig):
    model_type = "foreign"
class Model(BertModel):
    config_class = Config
Tokenizer = Processor = Model
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder whose every file names its code, and let the user answer yes to everything."""
    path = tmp_path / "network"
    path.mkdir()
    named = {kind: "code.Config" if kind == "AutoConfig" else "code.Model" for kind in KINDS}
    named["AutoTokenizer"] = ["code.Tokenizer", None]  # type: ignore[assignment]
    (path / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    for name in ("config", "tokenizer_config", "preprocessor_config", "processor_config"):
        (path / f"{name}.json").write_text(json.dumps({"model_type": "foreign", "auto_map": named}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return path


def ran(folder: Path) -> bool:
    return (folder.parent / "ran").exists()


def clip(path: Path) -> Any:
    return clip_teacher(path, ["a", "b"], mean=(0.5,) * 3, std=(0.5,) * 3).network


def dino(path: Path) -> Any:
    return GroundingDino(path)._load()


def image(path: Path) -> Any:
    return towers.read_image_encoder(path, channels=3, image_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)


def text(path: Path) -> Any:
    return towers.read_text_encoder(path, longest=8)


@pytest.mark.parametrize("load", [clip, dino, image, text])
def test_code_of_a_folder_is_not_run(folder: Path, load: Any) -> None:
    with pytest.raises(UserError) as said:
        load(folder)
    assert str(folder) in str(said.value)
    assert not ran(folder)
    if load in (image, text):
        assert "comes with Python code of its own, which is not run" in str(said.value)


def test_code_of_a_tokenizer_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network has no code, only its tokenizer."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = transformers.BertModel(transformers.BertConfig(**small, vocab_size=8))
    monkeypatch.setattr(towers, "_network", lambda *_: network)
    with pytest.raises(UserError, match=f"cannot load a tokenizer from {folder}: it comes with Python code"):
        text(folder)
    assert not ran(folder)


def test_code_of_a_part_is_not_run(folder: Path) -> None:
    """``from_config`` makes the part without the arguments of the whole, and asks the user."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    class Foreign(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
        model_type = "foreign"

    assert Foreign not in MODEL_MAPPING
    part = Foreign(auto_map={"AutoModel": "code.Model"}, name_or_path=str(folder))
    patience = transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with quiet(transformers), pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModel.from_config(part)
    assert not ran(folder)
    assert patience == transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0


@pytest.mark.parametrize("load", [clip, dino, image, text])
def test_a_folder_with_a_pipe_or_a_kernel_of_the_hub(folder: Path, load: Any) -> None:
    nested = {"model_type": "clip", "text_config": {"attn_implementation": "somebody/kernel"}}
    (folder / "config.json").write_text(json.dumps(nested))
    with pytest.raises(UserError, match=r"names code to be downloaded and run \(attn_implementation somebody/kernel\)"):
        load(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UserError, match=r"has a named pipe, config\.json"):
        load(folder)


@pytest.mark.parametrize("load", [clip, dino, image, text])
@pytest.mark.parametrize("complete", [False, True])
def test_a_folder_with_an_adapter(tmp_path: Path, load: Any, complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers would load the base network that the adapter's file names, or the adapter itself.
    path = tmp_path / "network"
    path.mkdir()
    (path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"})
    )
    if complete:
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        transformers.BertModel(transformers.BertConfig(**small, vocab_size=8)).save_pretrained(path)
    loaded = [transformers.AutoModel, transformers.PreTrainedModel, transformers.AutoTokenizer, transformers.AutoConfig]
    for kind in loaded:
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pytest.fail("transformers was asked"))
    with pytest.raises(UserError, match=r"holds a PEFT adapter \(adapter_config\.json\).*merge_and_unload") as said:
        load(path)
    assert str(path) in str(said.value)


@pytest.mark.parametrize("load", [clip, dino])
def test_an_adapter_of_the_hub(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        transformers.utils, "find_adapter_config_file", lambda name: asked.append(name) or "adapter_config.json"
    )
    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("transformers was asked")
    )
    with pytest.raises(UserError, match=r"from somebody/adapter.*it is a PEFT adapter \(adapter_config\.json\)"):
        load("somebody/adapter")
    assert asked == ["somebody/adapter"]


@pytest.mark.parametrize("load", [clip, dino, image, text])
def test_folders_that_hold_no_network(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"cannot load .* from {tmp_path}"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"the .*folder .*nowhere .*does not exist"):
        load(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers: pip install "):
        load(tmp_path)


def test_everything_is_loaded_without_code() -> None:
    """All loading from files, anywhere in the package, goes through the one function that runs no code."""
    seen = {"from_pretrained": 0, "load": 0, "open": 0}
    words = re.compile(r"pickle|dill|joblib|shelve|marshal|from_pretrained|torch\.load|Image\.open")
    for path in Path(fedkern.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if words.search(text) else ():
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                # Between processes of one run; python_state.py only writes, and reads nothing back.
                if path.parent.name in ("executors", "transport") or path.name in ("packets.py", "python_state.py"):
                    names -= {"pickle"}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            assert all(keyword.arg != "allow_pickle" for keyword in node.keywords), path
            if node.func.attr not in seen:
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "from_pretrained":
                seen[name] += 1
                assert keywords[None].startswith(("weight_args(local=", "without_code(local=")), path
            elif (owner, name) == ("torch", "load"):
                seen[name] += 1
                assert keywords["weights_only"] == "True", path
            elif (owner, name) == ("Image", "open"):
                seen[name] += 1
                assert keywords["formats"] == "FORMATS", path
    assert all(seen.values())
