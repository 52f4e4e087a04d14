"""Networks with parts that neither train nor travel, and runs with images on disk."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fedkern
from fedkern import models
from fedkern.data import Split, load
from fedkern.data.forms import ImageForm
from fedkern.data.identity import data_fingerprint
from fedkern.data.images import image_cache
from fedkern.engine.batches.images import Images
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.files import image_rows
from fedkern.files.image_rows import ImageRows, PixelClasses
from fedkern.methods import METHODS
from fedkern.models.state.freezing import freeze_bn_after, freeze_parameters, train_mode
from fedkern.settings.config import NAME, RunConfig, load_settings
from fedkern.settings.run_data import load_data
from fedkern.tasks import CLASSIFICATION
from python_tests import own_networks, smallest
from python_tests.image_files import count_gathered, two_brightnesses
from python_tests.interrupted import KillAt, outcome, play_killed
from python_tests.own_networks import Small
from python_tests.recording import Recording


class Adapter(nn.Module):
    """A frozen linear layer and a trained product of two narrow ones (LoRA, Hu et al. 2022)."""

    def __init__(self, layer, rank=1):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def make(freeze=True, adapter=False):
    torch.manual_seed(3)
    network = Small()
    network.backbone[1].running_mean.normal_(0, 0.1)
    network.backbone.requires_grad_(not freeze)
    if adapter:
        network.head = Adapter(network.head)
    return network


def play(out, network, make_data, method="fedavg", data=None, **settings):
    plain = {"rounds": 2, "local_epochs": 2, "batch_size": 4, "threads": 1, "client_threads": 1, "workers": 1}
    return fedkern.simulate(
        method, data=dataclasses.replace(make_data(), name="arrays") if data is None else data, model=network, out=out,
        pictures=False, **{**plain, "progress": False, "grad_cam": 0, **settings},
    )  # fmt: skip


@pytest.mark.sampled(1)
@pytest.mark.parametrize("adapter", [False, True], ids=["head", "adapter"])
def test_it_is_the_run_of_plain_pytorch(make_data, tmp_path, adapter):
    Recording.rows, network = [], make(adapter=adapter)
    found = play(tmp_path / "run", network, make_data, Recording, momentum=0.9, lr=0.1)
    sizes, config = [20, 13, 9], found.config
    plain = copy.deepcopy(network)
    for turn in range(2):
        uploads = []
        for size in sizes:
            local = copy.deepcopy(plain).train()
            local.backbone[1].eval()  # its scale and shift are frozen
            trained = [parameter for parameter in local.parameters() if parameter.requires_grad]
            optimiser = torch.optim.SGD(trained, config.lr, config.momentum, weight_decay=config.weight_decay)
            for _, _, images, targets in [row for row in Recording.rows if row[:2] == (turn, size)]:
                optimiser.zero_grad()
                nn.functional.cross_entropy(local(images), targets).backward()
                if config.clip_norm:
                    nn.utils.clip_grad_norm_(trained, config.clip_norm)
                optimiser.step()
            uploads.append(local.state_dict())
        mean = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in uploads[0].items()}
        for size, upload in zip(sizes, uploads, strict=True):
            for key, value in upload.items():
                mean[key] += size / sum(sizes) * value
        plain.load_state_dict({key: value.to(uploads[0][key].dtype) for key, value in mean.items()})
    stored, start = found.model().state_dict(), network.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=1e-5, atol=1e-6)
        trained = name.startswith("head") and not name.startswith("head.layer")
        assert torch.equal(stored[name], start[name]) is not trained, name


def test_only_what_is_trained_travels(make_data, tmp_path):
    networks = {"all": make(freeze=False), "head": make(), "adapter": make(adapter=True)}
    sent = {}
    for name, network in networks.items():
        found = play(tmp_path / name, network, make_data, rounds=1)
        assert {*found.model().state_dict()} == {*network.state_dict()}
        sent[name] = found.history.records[-1]["bytes_up"]
    norm = (4 * 16 + 8) / 12  # running statistics and their number, which stay where scale and shift are frozen
    assert {name: value / 12 for name, value in sent.items()} == {"all": 267 + 3 * norm, "head": 27, "adapter": 11}


def test_the_header_says_what_is_frozen(make_data, tmp_path, capsys):
    play(tmp_path / "run", make(), make_data, rounds=1, progress=True)
    assert "with 267 parameters (240 frozen with 1 batch norms in eval mode)" in capsys.readouterr().err


def test_freeze_is_requires_grad(make_data, tmp_path):
    given = play(tmp_path / "given", make(), make_data).model().state_dict()
    asked = play(tmp_path / "asked", make(freeze=False), make_data, freeze="backbone.*")
    assert (
        asked.config.freeze == fedkern.load(tmp_path / "asked", model=make(freeze=False)).config.freeze == "backbone.*"
    )
    assert all(torch.equal(value, given[name]) for name, value in asked.model().state_dict().items())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", ["resnet8", "cnn"])
def test_a_network_of_fedkerns_own(make_data, tmp_path, model):
    """Two workers give the same bits, the frozen stage stays as it began.

    The other layers have their usual gradients.
    """
    settings = {"width": 4, "freeze": "layer1.*"}
    own, two = (play(tmp_path / str(n), model, make_data, workers=n, **settings).model().state_dict() for n in (1, 2))
    assert all(torch.equal(value, two[name]) for name, value in own.items())
    start = models.build(model, classes=3, channels=3, image_size=8, seed=0, width=4)
    frozen = {name for name, value in start.state_dict().items() if torch.equal(value, own[name])}
    assert frozen == {name for name in own if name.startswith("layer1.")}
    thawed, images = copy.deepcopy(start), torch.rand(4, 3, 8, 8)
    freeze_parameters(start, ["layer1.*"], model)
    for network in (start, train_mode(start), thawed.train()):
        freeze_bn_after(network.get_submodule("layer1"))
        network(images).square().sum().backward()
    grads = {name: p.grad for name, p in thawed.named_parameters()}
    assert all(torch.equal(p.grad, 2 * grads[name]) for name, p in start.named_parameters() if p.requires_grad)


WRONG = {
    "no name": ({"freeze": "bakbone.*"}, r'freeze="bakbone\.\*" matches no parameter of module:Small: its parts '
                r'are backbone\.\*, head\.\*\. Did you mean "backbone\.\*"\?'),
    "everything": ({"freeze": "*"}, "every parameter of module:Small is frozen, so there is nothing to train"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_frozen_is_said_first(make_data, refuses, tmp_path, settings, said):
    with refuses(said):
        play(tmp_path / "run", make(freeze=False), make_data, **settings)


def test_a_frozen_module_trains_nothing(make_data, tmp_path):
    with pytest.raises(UserError, match="no parameters that require gradients, so there is nothing to train"):
        play(tmp_path / "run", make().requires_grad_(False), make_data)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("freeze", [None, "backbone.*"])
@pytest.mark.parametrize("method", sorted(name for name, kind in METHODS.items() if kind.serves(CLASSIFICATION)))
def test_every_client_begins_with_what_does_not_travel(make_data, make_public, tmp_path, method, freeze):
    """One process and two agree, and the run's evaluation is that of the saved network."""
    data = make_public(dataclasses.replace(make_data(), name="arrays"), 12)
    settings = {"rounds": None if METHODS[method].one_shot else 2, "seed": 5, **smallest.SETTINGS.get(method, {})}
    settings["options"] = {**settings.get("options", {}), **({"blocks": 2} if method == "fusefl" else {})}

    def run(kind, workers):
        named = f"{own_networks.__file__}:{kind}"
        return play(
            tmp_path / f"{kind} {workers}", named, make_data, method, data, workers=workers, freeze=freeze, **settings
        )

    if METHODS[method].keeps_head and freeze:
        with pytest.raises(UserError, match=r"leaves nothing of .* to be shared"):
            run("Small", 1)
        return
    single, two, plain = run("remembering", 1), run("remembering", 2), run("Small", 1)
    assert single.metrics == two.metrics != plain.metrics
    assert single.evaluate()["ood_loss"] == single.metrics["ood_loss"]
    assert single.history.records[-1]["bytes_up"] == plain.history.records[-1]["bytes_up"]
    if freeze and METHODS[method].averages:
        start, found = plain.model().state_dict(), single.model().state_dict()
        assert all(torch.equal(value, found[name]) for name, value in start.items() if name.startswith("backbone"))


# -- images on disk ----------------------------------------------------------------------------------------------------


FORM = ImageForm((3, 8, 8), (0.4,) * 3, (0.2,) * 3)

IMAGES, SIDE = 60, 8
WIDE = 16
"""Side of images with masks: a U-Net needs that many pixels."""


@pytest.fixture
def root(tmp_path):
    return two_brightnesses(tmp_path / "root", IMAGES)


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Put images into a temporary file, and keep no normalised image."""
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "home"))

    def change(yes=True):
        monkeypatch.setattr(image_cache, "MEMORY_BYTES", 0 if yes else 1 << 30)
        monkeypatch.setattr("fedkern.engine.local.samples.CACHE_BYTES", 0 if yes else 1 << 30)

    return change


def settings(root, method="fedavg", **extra):
    plain = {"data": "folder", "data_root": str(root), "data_options": {"size": SIDE, **extra.pop("data_options", {})}}
    small = {"width": 2, "rounds": 2, "batch_size": 4, "clients": 3, "partition": "iid", "threads": 1}
    return RunConfig.make(method, **plain, **{**small, **extra})


@pytest.mark.parametrize("colour", ["rgb", pytest.param("grey", marks=pytest.mark.exhaustive)])
def test_the_bits_of_a_run_in_memory(root, on_disk, tmp_path, monkeypatch, colour):
    config = settings(root, data_options={"colour": colour}, augment="crop-flip", client_test=0.2, public_samples=5)
    monkeypatch.setattr("fedkern.engine.evaluate.CPU_BATCH", 4)
    run(config, out=tmp_path / "memory")
    on_disk()
    largest = count_gathered(monkeypatch)
    monkeypatch.setattr(image_rows, "PART_BYTES", 5 * SIDE**2)
    run(config, out=tmp_path / "disk")
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "memory")
    assert max(largest) <= 5  # of a batch; a test set has 12 images, a client 10 to train on
    run(config.replace(cache=str(tmp_path / "cache")), out=tmp_path / "cached")
    assert outcome(tmp_path / "cached") == outcome(tmp_path / "memory")
    assert (tmp_path / "cached" / NAME).read_text() == (tmp_path / "memory" / NAME).read_text()


def masks(root):
    """Write masks beside the images: a bright square on some, and unknown pixels."""
    rng = np.random.default_rng(1)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        mask = np.zeros((9, 9), dtype=np.uint8)
        mask[2:6, 2 : 4 + number % 4] = 1 + number % 2
        mask[8, number % 9] = 255
        pixels = rng.integers(0, 60, (9, 9), dtype=np.uint8) + 90 * (mask % 255)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["scaffold", pytest.param("fedavg", marks=pytest.mark.exhaustive)])
def test_the_bits_of_a_segmentation_in_memory(tmp_path, on_disk, monkeypatch, method):
    masks(tmp_path / "pairs")
    config = RunConfig.make(
        method, data="segmentation", data_root=str(tmp_path / "pairs"), data_options={"size": WIDE, "ignore": 255},
        width=2, rounds=2, batch_size=4, clients=3, partition="iid", threads=1, augment="crop-flip", client_test=0.2,
    )  # fmt: skip
    monkeypatch.setattr("fedkern.tasks.segmentation.PIXELS", 4 * WIDE**2)
    run(config, out=tmp_path / "memory")
    on_disk()
    monkeypatch.setattr(image_rows, "PART_BYTES", 8 * 4 * WIDE**2)
    largest = []
    plain = PixelClasses.plain

    def note_size(self):
        largest.append(len(self))
        return plain(self)

    monkeypatch.setattr(PixelClasses, "plain", note_size)
    run(config, out=tmp_path / "disk")
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "memory")
    assert largest
    assert max(largest) <= 5  # of a batch; a test set has 12 images, a client 11 to train on
    run(config.replace(cache=str(tmp_path / "cache"), workers="1"), out=tmp_path / "cached")
    assert outcome(tmp_path / "cached") == outcome(tmp_path / "memory")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("forked_workers")
def test_the_same_with_workers(root, on_disk, tmp_path):
    run(settings(root), out=tmp_path / "memory")
    on_disk()
    run(settings(root, workers="2"), out=tmp_path / "disk")
    assert outcome(tmp_path / "disk") == outcome(tmp_path / "memory")
    masks(tmp_path / "pairs")
    folder, options = str(tmp_path / "pairs"), {"ignore": 255, "size": WIDE}
    pairs = {"data": "segmentation", "data_root": folder, "data_options": options}
    small = {"width": 2, "rounds": 2, "batch_size": 4, "clients": 3, "partition": "iid", "threads": 1}
    run(RunConfig.make("fedavg", **pairs, **small, workers="2"), out=tmp_path / "two")
    on_disk(False)
    run(RunConfig.make("fedavg", **pairs, **small, workers="1"), out=tmp_path / "one")
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")


@pytest.mark.parametrize("caches", [pytest.param(True, marks=pytest.mark.exhaustive), False], ids=["first", "then"])
def test_resumed_with_and_without_a_cache(root, on_disk, tmp_path, caches):
    config = settings(root)
    run(config, out=tmp_path / "whole")
    cached = config.replace(cache=str(tmp_path / "cache"))
    on_disk()
    play_killed(cached if caches else config, out=tmp_path / "run", at=KillAt("round", 1))
    run(config if caches else cached, out=tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_the_fingerprint_of_the_data(root, on_disk, monkeypatch):
    plain = data_fingerprint(load_data(settings(root)))
    on_disk()
    monkeypatch.setattr(image_rows, "PART_BYTES", 3 * 3 * SIDE**2)
    assert data_fingerprint(load_data(settings(root))) == plain


def test_a_run_folder_does_not_say_where_images_are_written(root, tmp_path):
    run(settings(root, rounds=1), out=tmp_path / "run")
    path = tmp_path / "run" / NAME
    path.write_text(f'cache = "{tmp_path / "elsewhere"}"\n' + path.read_text())
    config = load_settings(tmp_path / "run")
    assert config.cache is None


def test_backgrounds_of_images_on_disk(root, on_disk):
    on_disk()
    lazy = load("folder", root=root, clients=1, partition="iid", options={"size": SIDE}).clients[0]
    assert isinstance(lazy.images, ImageRows)
    masks = torch.rand(len(lazy), SIDE, SIDE) > 0.7
    masks[3] = False
    banks = []
    for images in (lazy.images, lazy.images.plain()):
        split = Split(images, lazy.labels, masks)
        made = Images(split, FORM, torch.device("cpu"), augment="crop-flip")
        augmented = made.backgrounds.take(np.array([5, 0, 5]), np.random.default_rng(1))
        banks.append([torch.from_numpy(made.backgrounds.labels), augmented, made.backgrounds.take(None)])
    for found, expected in zip(*banks, strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_a_cache_that_cannot_be_written_leaves_no_run(root, refuses, tmp_path):
    (tmp_path / "file").write_text("")
    with refuses("name another folder with --cache DIR"):
        run(settings(root, cache=str(tmp_path / "file")), out=tmp_path / "run")
