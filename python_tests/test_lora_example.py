"""Tests of the example of LoRA on text, on a tiny encoder and a text of made-up verses."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")
SCRIPT = Path(__file__).resolve().parent.parent / "examples/lora/verses.py"
BOOKS = {"1Ki": 30, "Amos": 20, "Jude": 12}
BYTES = 2 * 4 * 1 * (4 * 2 * (8 + 8) + 2 * (8 + 16) + 2 * (16 + 8))
"""Of two clients, four bytes a number, one layer: four matrices of the attention and two of the feed-forward part."""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Write a text, and a folder with a BERT of one layer and a tokenizer of its words."""
    words = [f"word{number}" for number in range(20)]
    lines = [
        f"{book}{1 + i // 10}:{1 + i % 10} " + " ".join(words[(i + shift) % 20] for shift in range(3 + i % 4))
        for book, count in BOOKS.items()
        for i in range(count)
    ]
    text, folder = tmp_path / "verses.txt", tmp_path / "encoder"
    text.write_text("\n".join(lines))
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=25, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return text, folder


def play(monkeypatch: pytest.MonkeyPatch, folder: Path, text: Path, encoder: Path) -> ModuleType:
    """Run the script and return its module."""
    spec = importlib.util.spec_from_file_location("verses", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verses", module)
    spec.loader.exec_module(module)
    words = [text, encoder, "--out", folder / "run", "--adapter", folder / "adapter", "--clients", "2"]
    monkeypatch.setattr(sys, "argv", ["verses.py", *map(str, words), "--rounds", "2", "--steps", "2", "--rank", "2"])
    module.main()
    return module


def test_books_send_adapters_that_peft_loads(monkeypatch, files, tmp_path, capsys) -> None:
    text, encoder = files
    module = play(monkeypatch, tmp_path, text, encoder)
    assert re.findall(r"found, ([\d,]+) bytes up", capsys.readouterr().out) == [f"{BYTES:,}", f"{2 * BYTES:,}"]
    pairs = module.read_books(text, encoder)
    assert {book: len(rows) + 1 for book, rows in pairs.items()} == BOOKS
    (before, after), _ = pairs["Amos"][4]
    assert torch.equal(after, pairs["Amos"][5][0][0])
    assert not before[9:].any()

    network = module.fedkern.load(tmp_path / "run", model=module.Encoder(encoder)).model()
    tokens = pairs["Jude"].tensors[0]
    expected = network(tokens)
    assert (expected - module.Encoder(encoder).eval()(tokens)).abs().max() > 1e-4
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["lora_alpha"] == 4
    peft = pytest.importorskip("peft", reason="needs the extra [foundation]")
    loaded = module.Encoder(encoder)
    loaded.bert = peft.PeftModel.from_pretrained(loaded.bert, tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(tokens), expected)
