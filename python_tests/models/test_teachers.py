"""Teachers, their cached logits, their training, and their names."""

import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedkern import models
from fedkern.errors import UserError
from fedkern.models.cost import measure_cost
from fedkern.models.teachers import named_teachers, teacher_cache
from fedkern.models.teachers.teacher import Teacher, teacher_of, trained_teacher
from fedkern.models.teachers.teacher_cache import LogitsCache, image_keys, read_file, stored_logits
from fedkern.models.teachers.teacher_training import Recipe, load_or_pretrain, pretrain, tune_copy

MEAN, STD = (0.4,), (0.3,)
CLASSES = ("a", "b", "c")


def build(model: str | None = None, width: int | None = None) -> Any:
    return models.build(model or "cnn", classes=3, channels=1, image_size=8, seed=0, width=width or 2)


def bytes_of(count: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 1, 8, 8)).astype(np.uint8))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels / 255 - MEAN[0]) / STD[0]


class Public:
    """Images of three classes by brightness."""

    def __init__(self, count: int = 30) -> None:
        self.labels = torch.arange(count) % 3
        noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.images = normalise((self.labels[:, None, None, None] * 90 + 20 + 5 * noise).clamp(0, 255).to(torch.uint8))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        return self.images[torch.from_numpy(indices)]


class Counting(Teacher):
    """A teacher that counts its images."""

    def __init__(self, **options: Any) -> None:
        self.seen = 0
        super().__init__(classes=3, load=lambda: self.answer, **options)

    def answer(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, :3] * 2


def counting(version: int = 1) -> Counting:
    return Counting(name="counting", identity={"model": "counting", "version": version})


def test_an_image_is_asked_about_once(tmp_path: Path) -> None:
    images = normalise(bytes_of(12))
    teacher, cache = counting(), LogitsCache(tmp_path, MEAN, STD)
    logits = cache.logits(teacher, images[:10].split(4))
    assert (logits.shape, teacher.seen) == ((10, 3), 10)
    assert torch.equal(logits, teacher.answer(images[:10]))
    # Another order, another batch size, and two new ones: only those are computed.
    order = torch.tensor([11, 3, 0, 10, 3])
    again = counting()
    assert torch.equal(cache.logits(again, [images[order]]), images[order].flatten(1)[:, :3] * 2)
    assert again.seen == 2
    newer = counting(version=2)
    cache.logits(newer, [images])
    assert newer.seen == 12
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == {".lock"}


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = LogitsCache.read_logits

    def slow(self: LogitsCache, *arguments: Any) -> dict[bytes, torch.Tensor]:
        found = read(self, *arguments)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(LogitsCache, "read_logits", slow)
    images, cache = normalise(bytes_of(8)), LogitsCache(tmp_path, MEAN, STD)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda k: cache.logits(counting(), [images[k : k + 1]]), range(8)))
    assert len(cache.read_logits(counting().identity or {}, 3)) == 8


def test_cache_files_have_the_mode_of_the_users_umask(tmp_path: Path) -> None:
    cache = LogitsCache(tmp_path, MEAN, STD)
    cache.logits(counting(), [normalise(bytes_of(2))])
    (tmp_path / "other").touch()
    assert cache.path("logits", counting().identity or {}).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_keys_are_the_images_before_normalisation() -> None:
    pixels = bytes_of(40)
    keys = image_keys(normalise(pixels), MEAN, STD)
    assert len(set(keys)) == 40
    rescaled = image_keys((pixels / 255 - 0.1) / 0.7, (0.1,), (0.7,))
    assert keys == rescaled == image_keys(normalise(pixels).to(memory_format=torch.channels_last), MEAN, STD)
    changed = pixels.clone()
    changed[7, 0, 3, 3] ^= 1
    assert [a == b for a, b in zip(keys, image_keys(normalise(changed), MEAN, STD), strict=True)].count(False) == 1


@pytest.mark.parametrize(
    "damage", ["empty", "noise", "shape", "nan", "classes", "flipped", "swapped", "another teacher's"]
)
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    images = normalise(bytes_of(5))
    said: list[str] = []
    cache, teacher = LogitsCache(tmp_path, MEAN, STD, said.append), counting()
    expected = cache.logits(teacher, [images])
    path = cache.path("logits", teacher.identity or {})
    stored = read_file(path, teacher.identity)
    keys, logits = stored["keys"], stored["logits"]
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 3)
    elif damage == "shape":
        save_file({"keys": keys, "logits": logits[:-1].clone()}, path)
    elif damage in ("flipped", "swapped"):
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[-2] ^= 1
        else:  # the logits of two images
            content[-24:] = content[-12:] + content[-24:-12]
        path.write_bytes(content)
    elif damage == "another teacher's":
        newer = counting(2)
        cache.logits(newer, [images])
        cache.path("logits", newer.identity or {}).replace(path)
    elif damage == "nan":
        save_file({"keys": keys, "logits": logits * float("nan")}, path)
    else:
        save_file({"keys": keys, "logits": logits[:, :2].clone()}, path)
    teacher.seen = 0
    assert torch.equal(cache.logits(teacher, [images]), expected)
    assert teacher.seen == 5
    assert any("damaged" in text for text in said)
    assert torch.equal(cache.logits(counting(), [images]), expected)


def test_an_interrupted_computation_keeps_what_it_has(tmp_path: Path) -> None:
    images, cache = normalise(bytes_of(9)), LogitsCache(tmp_path, MEAN, STD)

    def batches() -> Any:
        yield images[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.logits(counting(), batches())
    teacher = counting()
    cache.logits(teacher, [images])
    assert teacher.seen == 3


def test_a_callable_without_identity_is_asked_every_time(tmp_path: Path) -> None:
    images, teacher = normalise(bytes_of(4)), Counting(name="anonymous")
    cache = LogitsCache(tmp_path, MEAN, STD)
    assert torch.equal(cache.logits(teacher, [images]), cache.logits(teacher, [images]))
    assert teacher.seen == 8
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the teacher cache .*; name another folder .* teacher_cache"):
        LogitsCache(tmp_path / "file" / "below", MEAN, STD).logits(counting(), [normalise(bytes_of(2))])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # the default folder is done without
    assert LogitsCache(None, MEAN, STD).logits(counting(), [normalise(bytes_of(2))]).shape == (2, 3)


def test_a_file_of_logits_is_a_teacher(tmp_path: Path) -> None:
    images, cache = normalise(bytes_of(6)), LogitsCache(tmp_path, MEAN, STD)
    expected = cache.logits(counting(), [images])
    path = cache.path("logits", counting().identity or {})
    stored = stored_logits(path, 3, MEAN, STD)
    assert torch.equal(stored.logits(images[[4, 1]]), expected[[4, 1]])
    with pytest.raises(UserError, match="lacks the logits of 2 of 3 images"):
        stored.logits(torch.cat([images[:1], normalise(bytes_of(2, seed=9))]))
    with pytest.raises(UserError, match="knows 3 classes and the data have 4"):
        stored_logits(path, 4, MEAN, STD)
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        stored_logits(tmp_path / "nowhere", 3, MEAN, STD)
    with pytest.raises(UserError, match="gives logits alone"):
        _ = stored.classifier
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        stored_logits(path, 3, MEAN, STD)


def test_logits_of_another_format_are_refused_or_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = normalise(bytes_of(6)), LogitsCache(tmp_path, MEAN, STD)
    identity = counting().identity or {}
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "FORMAT", teacher_cache.FORMAT + 1)
        expected = cache.logits(counting(), [images])
        file = cache.path("logits", identity)
    with pytest.raises(UserError, match="has format 2, and this version of fedkern reads format 1:"):
        stored_logits(file, 3, MEAN, STD)
    content, teacher = file.read_bytes(), counting()
    assert torch.equal(cache.logits(teacher, [images]), expected)
    assert teacher.seen == 6
    assert file.read_bytes() == content
    with pytest.raises(UserError, match="has format 2"):
        read_file(file, identity)


@pytest.mark.parametrize(("answer", "sentence"), [
    (lambda x: torch.zeros(len(x), 4), "knows 4 classes and the data have 3"),
    (lambda x: torch.zeros(3), r"must give logits \[2, 3\], but gave \[3\]"),
    (lambda x: [1, 2, 3], r"but gave list"),
    (lambda x: torch.full((len(x), 3), float("inf")), "NaN or infinite"),
    (lambda x: x[:, 5], r"failed on images \[2, 1, 8, 8\] \(IndexError: index 5"),
])  # fmt: skip
def test_answers_that_are_no_logits(answer: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        teacher_of(answer, "mine", 3).logits(torch.zeros(2, 1, 8, 8))


def test_exhausted_memory_is_no_mistake_of_a_teacher() -> None:
    def run_out_of_memory(images: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        teacher_of(run_out_of_memory, "mine", 3).logits(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 3, 8, 8), (1, 3, 1, 1)], ids=str)
def test_a_callable_gets_the_strides_of_a_data_loader(shape: tuple[int, ...]) -> None:
    images, seen = torch.zeros(shape), []
    answer = lambda x: seen.append(x.stride()) or torch.zeros(len(x), 3)  # noqa: E731
    for function in (answer, nn.Sequential(Asks(answer))):
        teacher_of(function, "mine", 3).logits(torch.zeros(shape[0], *shape[2:], shape[1]).movedim(-1, 1))
    assert seen == [images.stride()] * 2


class Asks(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(x)


def test_a_network_is_a_frozen_teacher() -> None:
    network = build()
    teacher = trained_teacher(network, "mine", 3)
    images = normalise(bytes_of(5)).requires_grad_()
    assert torch.equal(teacher.logits(images), network.eval()(images).detach())
    assert not teacher.logits(images).requires_grad
    assert not any(p.requires_grad for p in network.parameters())
    assert teacher.parameters == sum(p.numel() for p in network.parameters())
    with torch.no_grad():
        network.head.weight[0, 0] += 1
    assert trained_teacher(network, "mine", 3).identity != teacher.identity


def test_pre_training_learns_and_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public, cache = Public(), LogitsCache(tmp_path, MEAN, STD)
    recipe = Recipe(epochs=8, batch_size=8)
    state = torch.get_rng_state()

    def make(data: Public = public, width: int = 4) -> Any:
        network = build(width=width)
        load_or_pretrain(network, data, cache, name=f"cnn of width {width}", recipe=recipe, seed=0)
        return network

    teacher = make()
    assert torch.equal(torch.get_rng_state(), state)
    assert not teacher.training
    with torch.no_grad():
        assert (teacher(public.images).argmax(1) == public.labels).float().mean() > 0.9
    trained: list[int] = []
    real = pretrain
    monkeypatch.setattr(
        "fedkern.models.teachers.teacher_training.pretrain", lambda *args: (trained.append(1), real(*args))
    )
    for (name, a), b in zip(teacher.state_dict().items(), make().state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not trained
    make(Public(27))
    make(width=2)
    assert len(trained) == 2
    for path in tmp_path.glob("*.safetensors"):  # a damaged file is trained anew, to the same bits
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    assert torch.equal(make().head.weight, teacher.head.weight)
    assert len(trained) == 3


def test_other_augmentation_is_another_training(tmp_path: Path) -> None:
    class Flipped(Public):
        def take(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
            return super().take(indices) if rng is None else super().take(indices).flip(3)

    cache, found = LogitsCache(tmp_path, MEAN, STD), []
    for data in (Public(), Flipped()):
        network = build()
        load_or_pretrain(network, data, cache, name="cnn", recipe=Recipe(epochs=1, batch_size=8), seed=0)
        found.append(network.head.weight)
    assert not torch.equal(*found)


def test_long_work_is_told_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cache, recipe = LogitsCache(tmp_path, MEAN, STD, said.append), Recipe(epochs=3, batch_size=8)
    images = normalise(bytes_of(600))
    for seconds, epochs, asked in ((3600.0, [1], []), (0.0, [1, 2, 3], [256, 400, 600])):
        monkeypatch.setattr(teacher_cache, "TELL_EVERY", seconds)
        said.clear()
        load_or_pretrain(build(), Public(), cache, name="cnn", recipe=recipe, seed=int(seconds))
        assert said == [f"training cnn on 30 public images: epoch {epoch} of 3" for epoch in epochs]
        said.clear()
        cache.logits(counting(version=int(seconds)), images.split(400), 600)
        assert said == [f"asking the teacher counting: {done} of 600 images" for done in asked]


def test_too_few_public_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be trained on 1 public images: raise --public-samples"):
        pretrain(build(), Public(1), Recipe(), 0)


@pytest.mark.parametrize("kind", ["probe", "finetune"])
def test_tuning_starts_from_the_zero_shot_teacher_and_leaves_it_alone(kind: str) -> None:
    public = Public()
    teacher = trained_teacher(build(width=4), "mine", 3)
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}

    def run_tuning(epochs: int, lr: float) -> torch.Tensor:
        rng, probes = np.random.default_rng(0), kind == "probe"
        batches = public.images.split(7)
        module, logits = tune_copy(teacher, batches, public.labels, rng, head_only=probes, epochs=epochs, lr=lr)
        torch.testing.assert_close(module(teacher.features(public.images) if probes else public.images), logits)
        return logits

    torch.testing.assert_close(run_tuning(1, 1e-12), teacher.logits(public.images), rtol=1e-4, atol=1e-5)
    loss = nn.functional.cross_entropy
    assert loss(run_tuning(60, 0.02), public.labels) < 0.6 * loss(teacher.logits(public.images), public.labels)
    assert torch.equal(run_tuning(3, 0.02), run_tuning(3, 0.02))
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_callable_has_nothing_to_tune() -> None:
    with pytest.raises(UserError, match="gives logits alone, and tuning needs features"):
        counting().features(torch.zeros(1, 1, 8, 8))
    assert teacher_of(build(), "mine", 3).features(torch.zeros(2, 1, 8, 8)).shape == (2, 8)


def make_teacher(spec: named_teachers.Spec, folder: Path, public: Public | None = None) -> Any:
    named = named_teachers.Teachers(
        [spec],
        LogitsCache(folder, MEAN, STD),
        CLASSES,
        torch.device("cpu"),
        build,
        public,
        "",
        "auto",
        Recipe(epochs=1),
    )
    return named[0]


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = named_teachers.expand_pretrained(named_teachers.parse_teachers("pretrained, pretrained:cnn/3"), build)
    assert [str(spec) for spec in larger] == [
        "pretrained:resnet8/32", "pretrained:cnn/64", "pretrained:resnet8/64", "pretrained:cnn/3"
    ]  # fmt: skip
    teacher = make_teacher(larger[-1], tmp_path, Public())
    assert teacher.name == "cnn of width 3, pre-trained by fedkern on 30 public images"
    assert teacher.logits(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    module = types.ModuleType("teachers_of_a_test")
    module.bright = lambda images: images.mean((2, 3)).expand(-1, 3)  # type: ignore[attr-defined]
    module.mine = counting()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "teachers_of_a_test", module)
    (spec,) = named_teachers.parse_teachers("teachers_of_a_test:bright")
    assert make_teacher(spec, tmp_path).logits(torch.ones(2, 1, 8, 8)).tolist() == [[1.0] * 3] * 2
    assert make_teacher(named_teachers.parse_teachers("teachers_of_a_test:mine")[0], tmp_path) is module.mine


@pytest.mark.parametrize(("text", "sentence"), [
    ("pretraind", r'unknown teacher "pretraind": .* Did you mean "pretrained"'),
    ("clip", "needs a path after a colon: clip:PATH"),
    ("pretrained:resnet", r'must be pretrained:MODEL .* Did you mean "resnet'),
    ("pretrained:cnn/x", "must be pretrained:MODEL or pretrained:MODEL/WIDTH"),
    ("nowhere_at_all:f", "cannot be imported"),
    ("math:nothing", "cannot be imported"),
    (".math:floor", r'unknown teacher ".math:floor"'),
    ("math", r'unknown teacher "math": .* logits:FILE, FILE.py:NAME or MODULE:NAME'),
    ("nowhere.py:f", "the teacher /.*/nowhere.py:f cannot be read"),
    ("math:pi", "is of type float: name a function or module that takes images"),
])  # fmt: skip
def test_names_that_mean_nothing(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_teacher(named_teachers.parse_teachers(text)[0], tmp_path, Public())


def test_no_public_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"are none: give --public-samples N, .*public=DATASET, or another teacher"):
        make_teacher(named_teachers.Spec("pretrained", "cnn"), tmp_path)


def test_cost_of_a_network() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    made = measure_cost(network, torch.zeros(2, 1, 8, 8))
    assert made.parameters == 36 + 768 + 3
    assert made.inference_flops == 2 * (36 * 64 + 768)
    # The backward pass costs the weights' gradients, and the inputs' but for the first layer.
    assert made.training_flops == made.inference_flops * 2 + 2 * 768
    assert all(p.grad is None for p in network.parameters())
