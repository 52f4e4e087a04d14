"""Encoders through transformers, on tiny randomly initialised networks that the tests save."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.models import PairNetwork, build_pair, towers
from fedkern.models.pretrained.preprocessing import Preprocessing
from fedkern.models.state.freezing import freeze_parameters, train_mode
from fedkern.run import main
from fedkern.settings.config import RunConfig
from python_tests.models.pretrained_pictures import PICTURES, SCALE, SIDE, normalise, pictures

transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")

TEXTS = ["a red three", "one blue seven above it", "three"]
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "three", "one", "blue", "seven", "above", "it"]


def save(path: Path, config: Any, **settings: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.AutoModel.from_config(config)
        for parameter in network.parameters():  # the library's initial weights make all inputs look alike
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({**PICTURES, **settings}))
    return path


def save_words(path: Path) -> None:
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("networks")
    pictures = {"image_size": SIDE, "patch_size": 8, "num_channels": 3}
    made = {
        "vit": save(base / "vit", transformers.ViTConfig(**SMALL, **pictures)),
        "deit": save(base / "deit", transformers.DeiTConfig(**SMALL, **pictures)),
        "dinov2": save(base / "dinov2", transformers.Dinov2Config(**SMALL, **pictures)),
        "resnet": save(
            base / "resnet",
            transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"),
        ),
        "swin": save(
            base / "swin",
            transformers.SwinConfig(image_size=SIDE, patch_size=2, embed_dim=4, depths=[1, 1], num_heads=[1, 2],
                                    window_size=2),
        ),
        "clip": save(
            base / "clip",
            transformers.CLIPConfig(
                text_config={**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 2,
                             "eos_token_id": 3, "pad_token_id": 0},
                vision_config={**SMALL, **pictures}, projection_dim=4,
            ),
        ),
        "bert": save(base / "bert", transformers.BertConfig(**{**SMALL, "hidden_size": 12}, vocab_size=len(WORDS))),
        "sentences": save(base / "sentences", transformers.BertConfig(**SMALL, vocab_size=len(WORDS))),
    }  # fmt: skip
    for name in ("bert", "sentences", "clip"):
        save_words(made[name])
    (made["sentences"] / "1_Pooling").mkdir()
    (made["sentences"] / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return made


def pair(folders: dict[str, Path], image: str, text: str, **options: Any) -> PairNetwork:
    names = [str(folders.get(name, name)) for name in (image, text)]
    settings = {"channels": 3, "image_size": (12, 12), **SCALE, "longest": 10, **options}
    return build_pair(*names, **settings)


GRIDS = {"vit": (2, 2), "deit": (2, 2), "dinov2": (2, 2), "clip": (2, 2), "resnet": (2, 2), "swin": (4, 4)}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("image", GRIDS)
def test_image_networks_become_tokens(folders: dict[str, Path], image: str) -> None:
    made = pair(folders, image, "bert")
    images = normalise(pictures())
    made.eval()
    sequence = made.encode_image(images)
    assert made.grid == GRIDS[image]
    assert sequence.shape == (3, 1 + made.grid[0] * made.grid[1], 8)
    network = transformers.AutoModel.from_pretrained(folders[image]).eval()
    network = getattr(network, "vision_model", network)
    with torch.no_grad():
        theirs = network(pixel_values=made.image_encoder.preprocessing(images)).last_hidden_state
    if image == "resnet":
        theirs = theirs.flatten(2).transpose(1, 2)
    patches = theirs[:, -made.grid[0] * made.grid[1] :]
    torch.testing.assert_close(sequence[:, 1:], patches)
    pooled = patches.mean(1) if image in ("resnet", "swin") else theirs[:, 0]
    torch.testing.assert_close(sequence[:, 0], pooled)
    assert not torch.allclose(sequence[0, 0], sequence[1, 0], atol=1e-3)


def test_texts_are_those_of_transformers(folders: dict[str, Path]) -> None:
    made = pair(folders, "vit", "bert").eval()
    tokens = made.tokenize(TEXTS)
    assert tokens.ids[:, 0].tolist() == [WORDS.index("[CLS]")] * 3
    assert tokens.mask.sum(1).tolist() == [5, 7, 3]
    network = transformers.AutoModel.from_pretrained(folders["bert"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    with torch.no_grad():
        theirs = network(**tokenizer(TEXTS, padding=True, return_tensors="pt")).last_hidden_state
        own = made.encode_text(tokens)
    torch.testing.assert_close(own, theirs)
    assert pair(folders, "vit", "bert", longest=4).tokenize(TEXTS).ids.shape == (3, 4)
    assert made.tokenize([]).ids.shape[0] == 0


@pytest.mark.parametrize("text", ["sentences", "clip"])
def test_the_mean_of_the_tokens_stands_in_front(folders: dict[str, Path], text: str, monkeypatch) -> None:
    if text == "clip":  # its tokenizer has no token for the whole text
        real = transformers.AutoTokenizer.from_pretrained

        def without(*args: Any, **options: Any) -> Any:
            tokenizer = real(*args, **options)
            tokenizer.cls_token = None
            return tokenizer

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", without)
    made = pair(folders, "vit", text).eval()
    tokens = made.tokenize(TEXTS)
    out = made.encode_text(tokens)
    assert out.shape[:2] == tokens.ids.shape
    for row, mask in zip(out, tokens.mask, strict=True):
        torch.testing.assert_close(row[0], row[1:][mask[1:]].mean(0))
    single = made.encode_text(made.tokenize(TEXTS[2:]))
    torch.testing.assert_close(single[0, 0], out[2, 0])


def test_the_pair_trains_everything_but_what_is_not_used(folders: dict[str, Path]) -> None:
    made = pair(folders, "vit", "bert").train()
    images, tokens = normalise(pictures()), made.tokenize(TEXTS)
    before, repeated = made(images, tokens), made(images, tokens)
    assert torch.equal(before[0], repeated[0])  # no dropout, which would draw from a global generator
    assert torch.equal(before[1], repeated[1])
    (before[0] * torch.randn(3, 128) + before[1] * torch.randn(3, 128)).sum().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None] == []
    assert (made.image_align.norm1.weight.numel(), made.text_align.norm1.weight.numel()) == (8, 12)
    again = build_pair(**json.loads(json.dumps(made.about)))
    again.load_state_dict(made.state_dict())


@pytest.mark.parametrize("text", ["bert", "sentences"])
def test_frozen_encoders_compute_an_input_once_and_alone(folders: dict[str, Path], text: str) -> None:
    made = pair(folders, "resnet", text).eval()
    images, tokens = normalise(pictures()), made.tokenize(TEXTS)
    plain = made.encode_image(images), made.encode_text(tokens)[tokens.mask]
    freeze_parameters(made, ["image_encoder.*", "text_encoder.*"], "the pair")
    train_mode(made)
    rows, vectors = made.encode_image(images), made.encode_text(tokens)
    torch.testing.assert_close((rows, vectors[tokens.mask]), plain)
    for parameter in (*made.image_encoder.parameters(), *made.text_encoder.parameters()):
        parameter.zero_()
    last = tokens.take(torch.tensor([2]))
    assert torch.equal(made.encode_image(images[1:]), rows[1:])
    assert torch.equal(copy.deepcopy(made).encode_text(last), vectors[2:, : last.ids.shape[1]])


def test_a_pretrained_side_beside_a_built_in_one(folders: dict[str, Path]) -> None:
    made = pair(folders, "vit", "words", vocabulary=("a", "red"), width=16)
    x, y = made(normalise(pictures()), made.tokenize(TEXTS))
    assert x.shape == y.shape
    made = pair(folders, "conv", "bert", image_size=(16, 16), width=16)
    x, y = made(normalise(pictures(3, 16, 16)), made.tokenize(TEXTS))
    assert x.shape == y.shape


def test_published_setting_on_the_meta_device() -> None:
    with torch.device("meta"):
        vit = transformers.AutoModel.from_config(transformers.ViTConfig())
        bert = transformers.AutoModel.from_config(transformers.BertConfig(vocab_size=28_996))
        vit.pooler = bert.pooler = torch.nn.Identity()
        images = towers.PretrainedImage(vit, Preprocessing({}, **SCALE, side=224), (32, 32), 3)
        texts = towers.PretrainedText(bert, None, 112, pooled=False)
        made = PairNetwork(images, texts)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in made.named_children()}
    assert sizes["image_encoder"] == 85_798_656
    assert sizes["text_encoder"] == 107_719_680
    assert round(sum(sizes.values()) / 1e6, 1) == 211.4
    assert made.grid == (14, 14)


@pytest.mark.parametrize(("image", "text", "words"), [
    ("./nowhere", "bert", "folder nowhere of the image encoder does not exist"),
    ("vit", "some/where", "folder some/where of the text encoder does not exist"),
    ("empty", "bert", "cannot load the image encoder from .*empty"),
    ("vit", "empty", "cannot load the text encoder from .*empty"),
    ("bert", "bert", "cannot be used as image encoder"),
    ("resnet", "vit", "cannot load a tokenizer|cannot be used as text encoder"),
    ("vit", "broken", "1_Pooling.*config.json is damaged"),
    ("shredded", "bert", "preprocessor_config.json is damaged"),
])  # fmt: skip
def test_wrong_folders(folders: dict[str, Path], tmp_path: Path, image: str, text: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(folders["sentences"], tmp_path / "broken")
    (tmp_path / "broken" / "1_Pooling" / "config.json").write_text("[")
    shutil.copytree(folders["vit"], tmp_path / "shredded")
    (tmp_path / "shredded" / "preprocessor_config.json").write_text("{")
    paths = {**folders, **{name: tmp_path / name for name in ("empty", "broken", "shredded")}}
    with pytest.raises(UserError, match=words):
        pair(paths, image, text)


def rewrite(folder: Path, base: Path, drop: str) -> Path:
    """Return a copy of a folder without the tensors whose names hold ``drop``."""
    copied = base / f"{folder.name}-less"
    shutil.copytree(folder, copied)
    tensors = {name: x for name, x in load_file(copied / "model.safetensors").items() if drop not in name}
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


@pytest.mark.parametrize(("text", "drop", "words"), [
    ("bert", "layer.1.", r"text encoder .*bert-less lacks 16 of the 37 .* of the bert .*encoder\.layer\.1\."),
    ("clip", "text_model.embeddings", r"such as text_model\.embeddings"),
])  # fmt: skip
def test_missing_weights_are_refused(folders, tmp_path, text, drop, words):
    with pytest.raises(UserError, match=words):
        pair(folders, "vit", str(rewrite(folders[text], tmp_path, drop)))


@pytest.mark.parametrize(
    ("image", "text", "drop"),
    [("vit", "bert", "pooler"), ("vit", "clip", "vision_model"), ("clip", "bert", "text_model"),
     ("dinov2", "bert", "mask_token"), ("resnet", "bert", "num_batches_tracked")],
)  # fmt: skip
def test_missing_weights_that_nobody_uses_are_none(folders, tmp_path, image, text, drop):
    changed = text if drop in ("pooler", "vision_model") else image
    paths = {**folders, changed: rewrite(folders[changed], tmp_path, drop)}
    for own, loaded in zip(*(pair(x, image, text).state_dict().items() for x in (folders, paths)), strict=True):
        if "image_encoder" in own[0] or "text_encoder" in own[0]:
            assert torch.equal(own[1], loaded[1]) or drop in own[0]


def test_a_folder_with_a_pickle_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text"
    shutil.copytree(folders["bert"], text)
    weights = load_file(text / "model.safetensors")
    (text / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load the text encoder from .*text: .*model\.safetensors"):
        pair(folders, "vit", str(text))
    torch.save(weights, text / "pytorch_model.bin")
    made, expected = (pair(folders, "vit", name).text_encoder.state_dict() for name in (str(text), "bert"))
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    torch.save({**weights, "more": Path("code")}, text / "pytorch_model.bin")  # unpickling it would run a class
    with pytest.raises(UserError, match="cannot load the text encoder from"):
        pair(folders, "vit", str(text))


@pytest.mark.parametrize("files", ["none", "no words"])
def test_a_tokenizer_without_words_is_refused(folders: dict[str, Path], tmp_path: Path, files: str) -> None:
    text = tmp_path / "text"
    shutil.copytree(folders["bert"], text)
    for path in (text / "vocab.txt", text / "tokenizer.json", text / "tokenizer_config.json"):
        path.unlink(missing_ok=True)
    if files == "no words":
        (text / "vocab.txt").write_text("\n".join(WORDS[:5]))
    with pytest.raises(UserError, match=r"text encoder .*text has no words: copy its tokenizer's files"):
        pair(folders, "vit", str(text))


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_a_tokenizer_of_another_network_is_refused(folders: dict[str, Path], tmp_path: Path, text: str) -> None:
    copied = tmp_path / "other"
    shutil.copytree(folders[text], copied)
    for name in ("vocab.txt", "tokenizer.json"):
        (copied / name).unlink(missing_ok=True)
    (copied / "vocab.txt").write_text("\n".join([*WORDS, "below"]))
    with pytest.raises(UserError, match=r"text encoder .*other knows 14 words and its network 13: they do not belong"):
        pair(folders, "vit", str(copied))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.sampled(1)
@pytest.mark.parametrize(("method", "options"), [
    ("fedavg", []),
    ("feddra", ["--method-option", "alignment_steps=1", "--method-option", "stage_schedule=per_round"]),
])  # fmt: skip
def test_a_run_and_its_model(method, options, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["vit"].parent)
    words = [method, *options, "--buffers", "pool", "--data", "captions",
             "--image-encoder", "./vit", "--text-encoder", "bert", "--clients", "2", "--train-samples",
             "24", "--rounds", "1", "--local-steps", "1", "--batch-size", "4", "--lr", "0.01",
             "--data-option", "test_samples=6", "--data-option", "validation_samples=4",
             "--data-option", "minority=0", "--quiet", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0
    monkeypatch.chdir(tmp_path)
    made, about = read_model(tmp_path / "run")
    assert about["pair"]["image_encoder"] == str(folders["vit"])
    assert not torch.equal(made.image_encoder.network.embeddings.cls_token,
                           transformers.AutoModel.from_pretrained(folders["vit"]).embeddings.cls_token)  # fmt: skip
    assert main(["evaluate", str(tmp_path / "run"), "--task", "retrieval", "--json"]) == 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("method", ["fedavg", "feddra"])
def test_a_frozen_text_encoder_stays_and_never_travels(method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    words = [method, "--data", "captions", "--text-encoder", str(folders["bert"]), "--clients", "2", "--width", "4",
             "--train-samples", "24", "--rounds", "2", "--local-steps", "1", "--batch-size", "4", "--quiet",
             "--data-option", "test_samples=6", "--data-option", "validation_samples=4", "--data-option", "minority=0",
             "--buffers", "average"]  # fmt: skip
    sent = {}
    for name, options in (("trained", []), ("frozen", ["--freeze", "text_encoder.*"])):
        assert main([*words, *options, "--out", str(tmp_path / name)]) == 0
        sent[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["round_bytes_up"]
    made, _ = read_model(tmp_path / "frozen")
    trained, _ = read_model(tmp_path / "trained")
    given = transformers.AutoModel.from_pretrained(folders["bert"]).state_dict()
    own = made.text_encoder.network.state_dict()
    assert all(torch.equal(own[key], given[key]) for key in own)
    assert not all(torch.equal(value, given[key]) for key, value in trained.text_encoder.network.state_dict().items())
    assert not torch.equal(made.text_head[0].weight, build_pair(**made.about).text_head[0].weight)
    frozen_bytes = 4 * sum(value.numel() for value in made.text_encoder.parameters())
    saved = (sent["trained"] - sent["frozen"]) / 2  # of a client; a vector has gaps between its parameters
    assert frozen_bytes <= saved < 1.02 * frozen_bytes


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["fedavg", "local"])
def test_a_wrong_folder_ends_before_the_run_folder_is_made(refuses, tmp_path: Path, method: str) -> None:
    sizes = {"train_samples": 60, "data_options": {"test_samples": 6, "validation_samples": 4}}
    with refuses(r"the folder .*nowhere of the image encoder does not exist"):
        run(RunConfig.make(method, data="captions", **sizes, image_encoder="./nowhere"), out=tmp_path / "run")


def test_it_is_silent(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    pair(folders, "vit", "bert")
    assert capfd.readouterr() == ("", "")


# -- preprocessing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "height", "width"), [
    (PICTURES, 12, 12),
    (PICTURES, 40, 25),
    ({**PICTURES, "resample": 3}, 12, 30),
    ({**PICTURES, "resample": 0, "size": {"height": 61, "width": 61}}, 48, 48),
    ({**PICTURES, "resample": 0}, 40, 40),
    ({**PICTURES, "resample": 0}, 12, 12),
    ({**PICTURES, "size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}, 30, 45),
    ({**PICTURES, "size": 20, "do_center_crop": True, "crop_size": {"height": 18, "width": 16}}, 20, 20),
    ({"do_resize": False, "do_normalize": False}, 12, 12),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_is_pillows(settings: dict[str, Any], height: int, width: int, channels: int) -> None:
    images = pictures(2, height, width, channels)
    scale = {name: SCALE[name][:channels] for name in SCALE}
    made = Preprocessing(settings, **scale, side=SIDE)(normalise(images))
    expected = []
    for pixels in images.expand(-1, 3, -1, -1):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        size = settings.get("size")
        if size is not None:
            shortest = size if isinstance(size, int) else size.get("shortest_edge")
            short = min(image.size)
            exact = (size["width"], size["height"]) if shortest is None else ()
            target = exact or [int(shortest * side / short) for side in image.size]
            image = image.resize(tuple(target), Image.Resampling(settings["resample"]))
        if settings.get("do_center_crop"):
            crop = settings["crop_size"]
            tall, wide = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            left, top = (image.width - wide) // 2, (image.height - tall) // 2
            image = image.crop((left, top, left + wide, top + tall))
        expected.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255)
    expected = torch.stack(expected)
    byte = 1 / 255
    if settings.get("do_normalize"):
        expected, byte = (expected - 0.5) / 0.5, 2 * byte
    assert made.shape == expected.shape
    distance = (made - expected).abs()
    assert distance.max() < 2.1 * byte
    # Which direction Pillow resizes first, where the proportions change, depends on its version.
    stretched = settings.get("size") == PICTURES["size"] and height != width
    assert (distance > 0.1 * byte).float().mean() < (0.3 if stretched else 0.03)


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ViT", {"size": {"height": 20, "width": 20}, "do_rescale": False, "do_normalize": False}),
        ("ViT", {"size": {"height": 20, "width": 20}, "rescale_factor": 1 / 127.5, "do_normalize": False}),
        ("ConvNext", {"size": {"shortest_edge": 16}}),
        ("ConvNext", {"size": {"shortest_edge": 20}, "crop_pct": 0.7, "do_center_crop": True,
                      "crop_size": {"height": 12, "width": 14}}),
        ("ConvNext", {"size": {"shortest_edge": 384}}),
        ("EfficientNet", {"size": {"height": 20, "width": 20}, "resample": 2}),
        ("EfficientNet", {"size": {"height": 20, "width": 20}, "rescale_offset": True, "include_top": False}),
        ("MobileViT", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
    ],
)  # fmt: skip
def test_preprocessing_is_that_of_the_library(tmp_path: Path, processor: str, settings: dict[str, Any]) -> None:
    try:
        theirs = getattr(transformers, f"{processor}ImageProcessor")(**settings)
    except ImportError as error:  # some versions have it through torchvision alone
        pytest.skip(str(error).strip())
    theirs.save_pretrained(tmp_path)
    images = pictures(2, 30, 30)
    made = Preprocessing.read(tmp_path, **SCALE, side=SIDE)(normalise(images))
    results = [theirs(Image.fromarray(pixels.permute(1, 2, 0).numpy()))["pixel_values"][0] for pixels in images]
    expected = torch.stack([torch.from_numpy(np.array(result, dtype=np.float32)) for result in results])
    assert made.shape == expected.shape
    distance = (made - expected).abs()
    assert (distance > 1e-5 * expected.abs().max()).float().mean() < 0.01
    assert distance.max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(("settings", "words"), [
    ({"resample": 1}, "resample 1 is not done here: give one of 0, 2, 3"),
    ({"rescale_factor": 0}, "is damaged: rescale_factor is 0"),
    ({"image_processor_type": "LevitImageProcessor"}, "what LevitImageProcessor makes of images is not done here"),
    ({"size": {"longest_edge": 20}}, "sizes by longest_edge are not done here: give height and width"),
    ({"size": {"shortest_edge": 16, "longest_edge": 20}}, "sizes by shortest_edge and longest_edge are not done"),
    ({"size": {"height": 20}}, "sizes by height are not done here"),
    ({"size": {}}, "sizes by nothing are not done here"),
    ({"do_center_crop": True, "crop_size": {"longest_edge": 20}}, "sizes by longest_edge are not done here"),
])  # fmt: skip
def test_preprocessing_that_is_not_done_here_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"preprocessor_config.json:? {words}"):
        Preprocessing.read(tmp_path, **SCALE, side=SIDE)
