"""Grounding DINO through transformers, on a tiny randomly initialised model that the test saves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedkern import ops
from fedkern.data import Detections, FederatedData, Split, load, normalise
from fedkern.engine.batches.images import BackgroundBank, Images
from fedkern.errors import UserError
from fedkern.models.pretrained.detector import GroundingDino

CLASSES = tuple("0123456789")
# BERT's own numbers: Grounding DINO knows special tokens and the full stop by them.
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a complete model folder: weights, configuration, tokenizer, preprocessing."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")
    path = tmp_path_factory.mktemp("tiny-dino")
    words = [f"word{i}" for i in range(1045)]
    for i, word in {**SPECIAL, **{1030 + i: name for i, name in enumerate(CLASSES)}}.items():
        words[i] = word
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=transformers.BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=4, max_text_len=16, encoder_n_points=2, decoder_n_points=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GroundingDinoForObjectDetection(config)
        # The box head starts at zero, which makes every box equally small; random weights give boxes of all sizes.
        for name, parameter in model.named_parameters():
            if "bbox_embed" in name and "layers.2" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {"size": {"shortest_edge": 128, "longest_edge": 160}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        )
    )
    return path


@pytest.fixture
def forwards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the batch size of every pass through the network."""
    from transformers import GroundingDinoForObjectDetection

    counted: list[int] = []
    forward = GroundingDinoForObjectDetection.forward

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(kwargs["pixel_values"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GroundingDinoForObjectDetection, "forward", count)
    return counted


def detect(folder: Path, cache: Path, box: float, text: float = 0.0) -> Any:
    return load(
        "digits", clients=2, partition="iid", train_samples=30, seed=3,
        options={"detector": str(folder), "box_threshold": box, "text_threshold": text, "detector_cache": str(cache)},
        make_detector=GroundingDino,
    )  # fmt: skip


def backgrounds(split: Split, data: FederatedData) -> BackgroundBank:
    return Images(split, data.form, torch.device("cpu"), cache=True).backgrounds


def test_only_the_boxes_are_erased_and_the_cache_is_used(folder: Path, tmp_path: Path, forwards: list[int]) -> None:
    data = detect(folder, tmp_path, box=0.3)
    assert sum(forwards) == 30
    plain = load("digits", clients=2, partition="iid", train_samples=30, seed=3)
    detector = GroundingDino(folder, 0.3, 0.0)
    erased = kept = 0
    for split, untouched in zip(data.clients, plain.clients, strict=True):
        boxes = Detections(detector, tmp_path).boxes(split, CLASSES)
        assert any(len(found) for found in boxes)
        marked = ops.erase_boxes(torch.zeros(len(split), 1, 32, 32), boxes, fill=1.0)[:, 0] == 1
        assert torch.equal(split.masks, marked)
        detected = marked.flatten(1).any(1)
        inside = marked[detected][:, None]
        images = backgrounds(split, data).take(None)
        original = normalise(untouched.images[detected], data.form.mean, data.form.std)
        assert (images[inside] == 0).all()
        assert torch.equal(images[~inside], original[~inside])
        erased, kept = erased + int(inside.sum()), kept + int((~inside).sum())
    assert erased > 0
    assert kept > 0
    assert sum(forwards) == 30  # asking for the boxes again cost nothing
    again = detect(folder, tmp_path, box=0.3)
    assert sum(forwards) == 30
    assert all(torch.equal(a.masks, b.masks) for a, b in zip(again.clients, data.clients, strict=True))


def test_other_thresholds_are_detected_anew(folder: Path, tmp_path: Path, forwards: list[int]) -> None:
    loose = detect(folder, tmp_path, box=0.0)
    strict = detect(folder, tmp_path, box=1.0)
    assert sum(forwards) == 60
    assert all(split.masks.flatten(1).any(1).all() for split in loose.clients)
    # Nothing scores above 1: no mask, and an empty bank.
    assert all(len(backgrounds(split, strict)) == 0 for split in strict.clients)


def test_the_thresholds_filter_scores(folder: Path) -> None:
    images = load("digits", clients=1, partition="iid", train_samples=6).clients[0].images.expand(-1, 3, -1, -1)
    count = {
        (box, text): sum(map(len, GroundingDino(folder, box, text).detect(images, "7")))
        for box in (0.0, 0.9) for text in (0.0, 0.6, 0.9)
    }  # fmt: skip
    assert count[0.0, 0.0] == 6 * 4  # all queries
    assert count[0.0, 0.0] > count[0.9, 0.0] > 0
    assert count[0.0, 0.0] > count[0.0, 0.9]
    # The name's own token may fall short where the best token passes, never the other way round.
    assert all(count[box, 0.9] <= count[box, 0.6] <= count[box, 0.0] for box in (0.0, 0.9))
    assert count[0.9, 0.9] == count[0.0, 0.9]


def test_boxes_agree_with_the_processor_of_transformers(folder: Path) -> None:
    """The boxes are those of transformers' own post-processing of the same output."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")
    images = load("digits", clients=1, partition="iid", train_samples=6).clients[0].images.expand(-1, 3, -1, -1)
    detector = GroundingDino(folder, 0.5, 0.0)
    made = detector.detect(images, "4")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(["4."] * 6, return_tensors="pt")
    pixels = torch.nn.functional.interpolate(
        images.float() / 255, (128, 128), mode="bilinear", antialias=True, align_corners=False
    )
    network = transformers.GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        output = network(pixel_values=(pixels - 0.5) / 0.25, **tokens)
    post = transformers.GroundingDinoProcessor.post_process_grounded_object_detection

    class Decoder:
        def batch_decode(self, ids: Any) -> list[str]:
            return [""] * len(ids)

    expected = post(
        Decoder(), output, tokens["input_ids"], threshold=0.5, text_threshold=0.0, target_sizes=[(32, 32)] * 6
    )
    assert sum(map(len, made)) > 0
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs["boxes"].clamp(0, 32), rtol=1e-4, atol=1e-3)


def test_the_prompt_is_the_class_name(folder: Path) -> None:
    detector = GroundingDino(folder)
    detector._load()
    prompts: list[list[str]] = []
    tokenizer = detector._tokenizer

    class Spy:
        def __call__(self, texts: list[str], **kwargs: Any) -> Any:
            prompts.append(texts)
            return tokenizer(texts, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    detector._tokenizer = Spy()
    detector.detect(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "Sweet_Pepper")
    assert prompts == [["sweet pepper."] * 2]


def test_new_weights_get_a_new_cache(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = Detections(GroundingDino(copy), tmp_path / "cache").path
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert Detections(GroundingDino(copy), tmp_path / "cache").path != before


def test_a_folder_with_a_pickle_alone(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "pickled"
    shutil.copytree(folder, copied)
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    images = torch.arange(2 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(2, 3, 32, 32)
    found, expected = (GroundingDino(source, 0.0, 0.0).detect(images, "3") for source in (copied, folder))
    assert any(len(boxes) for boxes in expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    before = GroundingDino(copied).identity
    torch.save({**weights, "more": Path("code")}, copied / "pytorch_model.bin")  # unpickling it would run a class
    assert GroundingDino(copied).identity != before
    with pytest.raises(UserError, match="cannot load a Grounding DINO from"):
        GroundingDino(copied).detect(images, "3")
