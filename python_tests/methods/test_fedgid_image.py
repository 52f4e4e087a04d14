"""FedGID with ``intervene=image``: object masks replace the sample's own background in the image."""

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset

import fedkern
from fedkern.data import AUGMENTATIONS, FederatedData, Split, normalise
from fedkern.data.forms import ImageForm
from fedkern.data.images.transforms import window
from fedkern.engine.batches.images import Images
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import UserError
from fedkern.methods import METHODS, FedAvg, FedGID
from python_tests.engine.executors.test_workers import compare_workers
from python_tests.engine.local.test_captured import SMALL, same_runs
from python_tests.interrupted import KillAt, check_interruption
from python_tests.methods.test_fedgid import PHASE, Scene, gradient

IMAGE = {"intervene": "image"}


@pytest.fixture
def scene(make_data, make_config):
    def make(**options):
        made = Scene(make_data, make_config, **IMAGE, **options)
        data = made.context.samples.of_client(0)
        rows = made.batch.indices
        planned = data.batch(rows)
        assert planned.masks is None  # only methods that ask have them
        (masked,) = data.make_batches([rows], PHASE, masked=True)
        masked.masks[2] = False  # nothing was detected
        made.batch = dataclasses.replace(made.batch, masks=masked.masks)
        return made

    return make


def compose(scene):
    """Compose pixel by pixel: the object stays, the rest comes from the background.

    An image without an object stays.
    """
    batch, bank = scene.batch, scene.batch.drawn["bank"].take(scene.batch.drawn["index"])
    made = batch.inputs.clone()
    for image, background, mask in zip(made, bank, batch.masks, strict=True):
        if mask.any():
            image[:, ~mask] = background[:, ~mask]
    return made


@pytest.mark.parametrize("kl", ["local_global", "global_local"])
@pytest.mark.parametrize("on", ["features", "logits"])
@pytest.mark.parametrize("gd", [True, False])
def test_loss_and_gradient_are_the_formula_of_the_page(kl, on, gd, scene):
    made = scene(kl_direction=kl, distill_on=on, distillation=gd, temperature=2.0, **{"lambda": 0.4})
    made.local.train()
    x, y = compose(made), made.batch.targets
    assert not torch.equal(x, made.batch.inputs)
    assert torch.equal(x[2], made.batch.inputs[2])
    loss, seen = made.loss()
    own, intervened = (made.local.features(images) for images in (made.batch.inputs, x))
    anchor = made.frozen.features(made.batch.inputs)
    expected = 0
    for f in (own, intervened):
        z = made.local.head(f)
        expected = expected + cross_entropy(z, y)
        u, g = (f, anchor) if on == "features" else (z, made.frozen.head(anchor))
        p, q = (u, g) if kl == "local_global" else (g, u)
        p, q = torch.softmax(p / 2, 1), torch.softmax(q / 2, 1)
        expected = expected + gd * 0.4 * 4 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(made.local, loss), gradient(made.local, expected), rtol=1e-7, atol=1e-9)
    assert ("loss_gd" in seen) == gd
    assert seen.keys() >= {"loss_em", "loss_gi", "intervention_changed"}


def test_running_statistics_ignore_composed_images(scene):
    made = scene(distillation=False)
    made.local.train()
    twin = copy.deepcopy(made.local)
    twin(made.batch.inputs)
    _, seen = made.loss()
    assert seen["loss_gi"] != seen["loss_em"]
    buffers = dict(made.local.named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in twin.named_buffers())


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("sides", [(32, 32), (21, 25)])
def test_masks_move_with_their_images(kind, sides):
    """An image that shows its own mask still matches the mask.

    Images, labels and draws are those of batches without masks.
    """
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(rng.random((20, 8, 8)) < 0.5).repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = (255 * masks[:, None].byte()).expand(-1, 3, -1, -1).contiguous()
    split = Split(images, torch.from_numpy(rng.integers(0, 3, 20)), masks)
    reader = Images(split, ImageForm((3, *sides), (0.0,) * 3, (0.2,) * 3), torch.device("cpu"), augment=kind)
    plan = [np.arange(20)[::-1][:11], np.array([3, 3, 0])]
    rngs = [np.random.default_rng(4) for _ in range(2)]
    pairs = zip(
        reader.make_batches(plan, rng=rngs[0]), reader.make_batches(plan, rng=rngs[1], masked=True), strict=True
    )
    for plain, masked in pairs:
        assert torch.equal(plain.inputs, masked.inputs)
        assert torch.equal(plain.targets, masked.targets)
        assert masked.masks.dtype == torch.bool
        assert masked.masks.shape[1:] == masked.inputs.shape[2:] == sides
        low, high = (part(masked.inputs[:, 0], (1, 2)).view(-1, 1, 1) for part in (torch.amin, torch.amax))
        shown = (masked.inputs[:, 0] - low) / (high - low)
        pure = (shown - 0.5).abs() > 0.499  # where a rotation has not mixed pixels
        assert pure.double().mean() > 0.6
        assert torch.equal(masked.masks[pure], shown[pure] > 0.5)
    assert rngs[0].random() == rngs[1].random()


def test_a_bank_shows_windows_as_a_batch_does(make_data):
    data, sides, rows = make_data(), (5, 6), np.array([4, 0, 4])
    split = data.clients[0]
    form = dataclasses.replace(data.form, shape=(3, *sides))
    erased = normalise(split.images, form.mean, form.std).masked_fill(split.masks[:, None], 0)[rows]
    reader = Images(split, form, torch.device("cpu"), augment="window")
    bank = reader.backgrounds
    torch.testing.assert_close(bank.take(rows), window(erased, sides))
    rng, again = (np.random.default_rng(3) for _ in range(2))
    torch.testing.assert_close(bank.take(rows, rng), window(erased, sides, again))
    ((_, masks),) = reader.masked_batches(20)
    assert torch.equal(masks[:, None], window(split.masks[:, None], sides))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("augment", "options"), [("none", IMAGE), ("crop-flip", IMAGE), ("none", {}), ("crop-flip", {})]
)
def test_a_network_may_see_windows(augment, options, make_data, make_config, tmp_path):
    data = make_data()
    splits = [
        dataclasses.replace(split, **{name: twice(getattr(split, name)) for name in ("images", "masks")})
        for split in (*data.clients, data.validation, *data.tests.values())
    ]
    data = dataclasses.replace(
        data, clients=tuple(splits[:3]), validation=splits[3], tests=dict(zip(data.tests, splits[4:], strict=True)),
        form=dataclasses.replace(data.form, shape=(3, 9, 12)),
    )  # fmt: skip
    run(make_config("fedgid", augment=augment, options=options), out=tmp_path / "run", data=data)
    assert all("loss_gi" in client for client in read_metrics(tmp_path / "run")[-1]["clients"].values())


def twice(pixels):
    """Return pixels [..., H, W] with twice the height and width."""
    return pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_backgrounds_are_augmented_apart(make_data, make_config, tmp_path, monkeypatch):
    found = []

    class Spy(FedGID):
        def loss(self, model, batch, received):
            drawn = batch.drawn
            ground = ~batch.masks & batch.masks.flatten(1).any(1)[:, None, None]
            found.append(torch.equal(drawn["composed"].movedim(1, -1)[ground], drawn["images"].movedim(1, -1)[ground]))
            found.append(torch.equal(drawn["composed"].movedim(1, -1)[~ground], batch.inputs.movedim(1, -1)[~ground]))
            return super().loss(model, batch, received)

    monkeypatch.setitem(METHODS, "fedgid", Spy)
    run(make_config("fedgid", augment="crop-flip", options=IMAGE), out=tmp_path, data=make_data())
    assert len(found) > 4
    assert all(found)


@pytest.mark.usefixtures("forked_workers")
def test_two_workers_give_the_bits_of_one(make_data, make_config, tmp_path):
    single, two = compare_workers(make_config("fedgid", augment="crop-flip", options=IMAGE), make_data(), tmp_path)
    assert single == two


def test_a_killed_run_goes_on_with_the_same_bits(make_data, make_config, tmp_path):
    data, config = make_data(), make_config("fedgid", rounds=3, sample_fraction=0.6, options=IMAGE)
    check_interruption(config, tmp_path, data=data, at=KillAt("client", 3))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("augment", ["crop", "none"])
def test_a_step_is_replayable(augment, make_data, make_config, tmp_path, monkeypatch):
    config = make_config("fedgid", **{**SMALL, "augment": augment, "options": IMAGE})
    equal, tapes, diagnostics = same_runs(config, make_data(), tmp_path, monkeypatch)
    assert equal
    assert tapes.replayed > 3 * tapes.recorded > 0
    assert "no-cuda-graph" not in diagnostics


def test_a_client_without_an_object_trains_without_the_intervention(make_data, make_config, tmp_path):
    data = make_data()
    data.clients[1].masks[:] = False
    run(make_config("fedgid", options=IMAGE), out=tmp_path, data=data)
    clients = read_metrics(tmp_path)[0]["clients"]
    assert "loss_gi" in clients["0"]
    assert "loss_gi" not in clients["1"]


def test_without_masks_the_run_is_refused(make_data, make_config, tmp_path):
    with pytest.raises(UserError, match=r"where the objects are.*--boxes FILE or --detector"):
        run(make_config("fedgid", options=IMAGE), out=tmp_path / "run", data=make_data(masked=False))
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("images", [True, False])
def test_a_method_of_users_that_asks_for_masks_is_refused_without(
    images, make_data, make_config, tmp_path, monkeypatch
):
    class Masked(FedAvg):
        requires = frozenset({"loss"})
        masked = True

    monkeypatch.setitem(METHODS, "fedavg", Masked)
    items, out = TensorDataset(torch.randn(12, 3), torch.arange(12) % 3), tmp_path / "run"
    play = (
        partial(run, make_config("fedavg"), out=out, data=make_data(masked=False))
        if images
        else partial(
            fedkern.simulate, "fedavg", data=[items, items], test=TensorDataset(*items.tensors),
            model=torch.nn.Linear(3, 3), rounds=1,
            workers=1, progress=False, out=out,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match=r"Masked trains on object masks .* client 0 has no images with masks"):
        play()
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(("extra", "message"), [
    ("alpha=0.5", '"alpha" has no effect with intervene=image'),
    ("mix_stage=feature", '"mix_stage" has no effect with intervene=image'),
    ("intervention=off", '"intervene" = image has no effect with intervention=off'),
])  # fmt: skip
def test_options_without_effect_are_refused(extra, message):
    with pytest.raises(UserError, match=message):
        FedGID.Options.parse(["intervene=image", extra])
    assert FedGID.Options.parse(["intervene=image", "alpha=0.6"]).alpha == 0.6  # a stored run names all options


def test_a_network_needs_no_stages():
    needs = [FedGID(FedGID.Options.parse(options)).needs for options in ([], ["intervene=image"])]
    assert needs == ["maps", "features"]


class Masked(Dataset):
    """Images uint8 or float32 ``[3, 16, 16]`` with a class, and masks, those of the last third empty."""

    def __init__(self, seed, count, kind="uint8", masked=True):
        draw = np.random.default_rng(seed)
        self.targets = draw.integers(0, 3, count)
        images = (draw.integers(0, 60, (count, 3, 16, 16)) + 60 * self.targets[:, None, None, None]).astype(np.uint8)
        self.images, self.masks = torch.from_numpy(images), torch.zeros(count, 1, 16, 16)
        self.masks[: 2 * count // 3, :, 4:11, 3:9] = 1
        self.values = self.images if kind == "uint8" else (self.images / 255 - 0.5) / 0.25
        self.masked = masked

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        image, label = self.values[row], int(self.targets[row])
        return {"image": image, "label": label, "mask": self.masks[row]} if self.masked else (image, label)


def make_network():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)]
    return nn.Sequential(*parts)


@pytest.mark.parametrize(("kind", "model", "options"), [
    ("uint8", "cnn", {}),
    ("uint8", "cnn", IMAGE),
    ("uint8", "cnn", {"intervention": "off"}),
    ("float32", "cnn", {}),
    ("float32", make_network(), {}),
    ("float32", make_network(), IMAGE),
])  # fmt: skip
def test_items_with_the_key_mask_are_images_with_masks(kind, model, options, tmp_path):
    masked = options.get("intervention") != "off"
    sets = [Masked(k, 24, kind, masked) for k in range(2)]
    sets[1].masks[:] = 0
    test = Masked(2, 12, kind, masked=False)
    how = {"rounds": 2, "batch_size": 8, "workers": 1, "progress": False, "options": options}
    how |= {"model": model, "width": 4} if model == "cnn" else {"model": model}
    result = fedkern.simulate("fedgid", data=sets, test=test, out=tmp_path / "run", **how)
    clients = read_metrics(tmp_path / "run")[0]["clients"]
    assert ("loss_gi" in clients["0"]) == masked
    assert "loss_gi" not in clients["1"]  # it has no object
    if kind == "float32":
        return
    arrays = FederatedData.from_arrays([(part.images, part.targets) for part in sets], (test.images, test.targets))
    splits = [
        dataclasses.replace(split, masks=part.masks[:, 0] > 0) for split, part in zip(arrays.clients, sets, strict=True)
    ]
    arrays = dataclasses.replace(arrays, clients=tuple(splits))
    assert fedkern.simulate("fedgid", data=arrays, out=tmp_path / "arrays", **how).metrics == result.metrics


def test_that_items_lack_masks_is_said_before_the_run(refuses, tmp_path):
    sets = {"data": [Masked(k, 24, masked=False) for k in range(2)], "test": Masked(2, 12, masked=False)}
    with refuses("has no masks: give .*, for a Dataset, items with a key `mask`, or turn it off"):
        fedkern.simulate("fedgid", **sets, model="cnn", rounds=1, out=tmp_path / "run")
