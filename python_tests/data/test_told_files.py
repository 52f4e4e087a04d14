"""Tests of a run's header on image files, of files that hold several pictures, and of windows of greys."""

import io
import json
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import fedkern
from fedkern.data import load, lookup
from fedkern.data.images import greys
from fedkern.data.images.greys import format_window, inspect_files, window_of
from fedkern.data.images.image_files import ImageFiles
from fedkern.downstream import run_evaluation
from fedkern.downstream.prediction import Predictor
from fedkern.downstream.run_evaluation import _as_trained, evaluate_run
from fedkern.errors import UserError
from fedkern.report.live import progress_bar
from fedkern.settings.config import RunConfig

GREY, RGB, DEEP = "8-bit grey, 96 x 96", "16 x 16 RGB", "16-bit grey, 96 x 96"
WINDOW = "window 40,400"


def image(kind, seed):
    rng = np.random.default_rng(seed)
    side = int(kind.rpartition(" ")[2])
    top, channels = (65536 if kind.startswith("16") else 256), ((3,) if "RGB" in kind else ())
    return Image.fromarray(rng.integers(0, top, (side, side, *channels)).astype(np.uint16 if top > 256 else np.uint8))


def table(folder, kinds, count=6, splits=("",)):
    """Write a CSV file whose rows name site and split.

    ``kinds`` are the kinds of files by (split, site) or by site.
    """
    lines = ["path,label,client,split" if splits != ("",) else "path,label,client"]
    for site in dict.fromkeys(key[1] if isinstance(key, tuple) else key for key in kinds):
        for split in splits:
            for i in range(count):
                name = f"{site}{split}{i}.png"
                image(kinds.get((split, site)) or kinds[site], len(lines)).save(folder / name)
                lines.append(",".join([name, "ab"[i % 2], site, split][: 4 if split else 3]))
    path = folder / "t.csv"
    path.write_text("\n".join(lines))
    return path


def read_seen(path, **options):
    return load("csv", root=path, options={"size": 16, **options}).form.seen


def test_one_line_where_all_sets_are_alike(tmp_path):
    path = table(tmp_path, {"Ulm": GREY, "Trier": GREY})
    assert read_seen(path) == (f"images: {GREY} -> {RGB}",)
    assert read_seen(path, size=96, colour="grey") == (f"images: {GREY}",)
    assert read_seen(path, size=96) == (f"images: {GREY} -> 96 x 96 RGB",)


def test_a_network_that_sees_parts_of_images(tmp_path):
    for i in range(12):
        image(GREY, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    data = load("pairs", root=tmp_path, clients=2, partition="iid", options={"size": 96, "crop": 32})
    assert data.form.seen == (f"images: {GREY} -> 32 x 32 of 96 x 96 RGB",)


def test_a_line_per_site_where_they_differ(tmp_path):
    path = table(tmp_path, {"Bonn": GREY, "Jena": DEEP, "Trier": GREY, "Ulm": "8-bit RGB, 16 x 16"})
    summary, *lines = read_seen(path, window="40,400")
    assert summary == f"images: 16-bit grey, 8-bit RGB and 8-bit grey, 16 x 16 to 96 x 96, {WINDOW} -> {RGB}"
    assert lines == [
        f"images of Bonn, Trier: {GREY} -> {RGB}",
        f"images of Jena: {DEEP}, {WINDOW} -> {RGB}",
        "images of Ulm: 8-bit RGB, 16 x 16",
    ]


def test_many_sites_are_folded(tmp_path):
    path = table(tmp_path, {f"s{k:02}": f"8-bit grey, {20 + k} x {20 + k}" for k in range(12)}, count=4)
    _, *lines = read_seen(path)
    assert len(lines) == greys.LINES
    assert lines[0] == f"images of s00: 8-bit grey, 20 x 20 -> {RGB}"
    assert lines[-1] == f"images of s03, s04, s05 and 6 more: 8-bit grey, 23 x 23 to 31 x 31 -> {RGB}"
    _, usual, deep = read_seen(table(tmp_path, {f"s{k:02}": DEEP if k == 4 else GREY for k in range(12)}, count=4))
    assert usual == f"images of s00, s01, s02 and 8 more: {GREY} -> {RGB}"
    assert deep.startswith(f"images of s04: {DEEP}, 0 to 65,535 become 0 to 255 ({greys.ADVICE}) -> ")


def test_the_training_and_the_test_set_differ(tmp_path):
    kinds = {("test", "A"): "8-bit RGB, 64 x 64", ("test", "B"): "8-bit RGB, 64 x 64", "A": GREY, "B": GREY}
    path = table(tmp_path, kinds, splits=("train", "test"))
    assert read_seen(path)[1:] == (f"training images: {GREY} -> {RGB}", f"test images: 8-bit RGB, 64 x 64 -> {RGB}")
    del kinds["test", "B"]
    (tmp_path / "other").mkdir()
    path = table(tmp_path / "other", kinds, splits=("train", "test"))
    assert read_seen(path)[1:] == (
        f"training images; test images of B: {GREY} -> {RGB}", f"test images of A: 8-bit RGB, 64 x 64 -> {RGB}"
    )  # fmt: skip


def test_a_set_is_named_however_few_files_it_has(tmp_path):
    path = table(tmp_path, {"Ulm": DEEP.replace("96", "8")}, count=2)
    lines = path.read_text().splitlines()
    for i in range(2 * greys.MAX_FILES):
        Image.fromarray(np.full((4, 4), i % 256, np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i % 2]},Bonn")
    path.write_text("\n".join([lines[0], *lines[3:], lines[1], lines[2]]))
    data = load("csv", root=path, options={"size": 16, "window": "40,400"})
    assert f"images of Ulm: 16-bit grey, 8 x 8, {WINDOW} -> {RGB}" in data.form.seen


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "1-bit black and white"), ("L", "8-bit grey"), ("P", "8-bit palette"), ("RGBA", "8-bit RGB"),
        ("CMYK", "8-bit CMYK"), ("F", "32-bit grey fractions"), ("I", "32-bit grey"), ("I;16", "16-bit grey"),
    ],
)  # fmt: skip
def test_depth_and_colour_are_those_of_the_file(mode, kind, tmp_path):
    Image.new(mode, (5, 3)).save(tmp_path / "one.tif")
    (look,) = greys.inspect_files([tmp_path / "one.tif"], 100, True).values()
    assert (look.kind, look.size) == (kind, (5, 3))


def test_the_header_tells_it_of_sites_only_where_records_are_not_private(tmp_path):
    path = table(tmp_path, {"Ulm": GREY, "Trier": DEEP})
    for records, count in (("all", 2), ("private", 1)):
        console = Console(file=io.StringIO(), width=200)
        fedkern.simulate(
            "fedavg", data="csv", data_root=path, data_options={"size": 8, "window": "40,400"}, rounds=1, model="mlp",
            out=tmp_path / records, progress=False, pictures=False, records=records,
            listener=progress_bar.Lines(console),
        )  # fmt: skip
        lines = [text for text in console.file.getvalue().splitlines() if text.startswith("images")]
        assert len(lines) == count
        assert any(WINDOW in text and text.endswith("-> 8 x 8 RGB") for text in lines)


def test_evaluate_tells_images_and_patients_of_every_site(tmp_path):
    """Other files are all judged where no row names a split, and else only their test images."""
    tables = {}
    for name, splits in {"own": ("train", "test"), "unsplit": ("",), "tests": ("test",)}.items():
        (tmp_path / name).mkdir()
        tables[name] = path = table(tmp_path / name, {"Ulm": GREY, "Bonn": GREY}, splits=splits)
        header, *rows = path.read_text().splitlines()
        people = [f"{row},{'-'.join(row.split(',')[2:])}{i // 2}" for i, row in enumerate(rows)]  # two images a patient
        path.write_text("\n".join([f"{header},patient_id", *people]))
    for name in ("own", "unsplit"):
        fedkern.simulate(
            "fedavg", data="csv", data_root=tables[name], data_options={"size": 8, "test_share": 0.4}, rounds=1,
            model="mlp", out=tmp_path / f"run on {name}", progress=False, pictures=False,
        )  # fmt: skip
    everything, part = "images 12 of 6 patients, Bonn 6 of 3 patients, Ulm 6 of 3 patients", "images 4 of 2 patients, "
    for trained, judged, said in (
        ("own", {}, everything),
        ("own", {"data_root": tables["own"]}, everything),
        ("own", {"data_root": tables["unsplit"]}, everything),
        ("own", {"data_root": tables["unsplit"], "data_options": {"test_share": 0.4}}, part),
        ("own", {"data_root": tables["tests"]}, everything),
        ("unsplit", {"data_root": tables["unsplit"].parent}, part),  # most are those that it was trained on
    ):
        told = []
        source = {"data": "csv", **judged} if judged else {}
        _, _, intervals = evaluate_run(tmp_path / f"run on {trained}", progress=told.append, **source)
        assert any(line.startswith(f"the test set: {said}") for line in told)
        found = [(row.get("client"), f"{row['samples']} of {row['units']} {row['unit'][:-1]}") for row in intervals]
        texts = [text.split(" ", 1) for text in next(line for line in told if "test set" in line)[14:].split(", ")]
        assert found == [(None if name == "images" else name, text.rstrip("s")) for name, text in texts]


# -- several pictures --------------------------------------------------------------------------------------------------


FIRST, SECOND = (np.full((8, 8), value, np.uint8) for value in (10, 200))
SUFFIXES = "gif", "png", "webp", "tif"


def write(path, *pictures):
    picture, *later = [Image.fromarray(values) for values in pictures]
    picture.save(
        path, save_all=bool(later), append_images=later, **({"lossless": True} if path.suffix == ".webp" else {})
    )


def tree(root, suffix):
    """Write twelve files for every source, one of which holds two pictures."""
    for i in range(12):
        for folder in (root / "classes" / "ab"[i % 2], root / "cells/images", root / "cells/masks"):
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / f"{i}.{suffix}", *((FIRST, SECOND) if i == 6 else (FIRST,)))
        if suffix == "webp":  # has no single channel, as masks have
            write(root / "cells/masks" / f"{i}.png", FIRST)
            (root / "cells/masks" / f"{i}.webp").unlink()
        (root / "classes" / "ab"[i % 2] / f"{i}.txt").write_text("words")
    rows = [f"classes/{'ab'[i % 2]}/{i}.{suffix},{'ab'[i % 2]},some words here" for i in range(12)]
    (root / "paths.csv").write_text("\n".join(["path,label,report", *rows]))
    return root


def open_source(name, root):
    where = {
        "csv": "paths.csv", "segmentation": "cells", "pairs": "classes/a", "folder": "classes",
    }[name]  # fmt: skip
    return load(name, root=root / where, clients=2, partition="iid", options={"size": 8})


@pytest.mark.sampled
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["folder", "csv", "pairs", "segmentation"])
def test_two_pictures_in_a_file_are_refused(tmp_path, name, suffix):
    root = tree(tmp_path, suffix)
    with pytest.raises(UserError, match=rf"6\.{suffix} holds several pictures.*save the picture") as caught:
        open_source(name, root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["gif", "png", "tif"])
def test_a_mask_of_two_pictures_is_refused(tmp_path, suffix):
    root = tree(tmp_path, suffix) / "cells"
    write(root / "images" / f"6.{suffix}", FIRST)
    with pytest.raises(UserError, match=rf"masks/6\.{suffix} holds several pictures"):
        load("segmentation", root=root, clients=2, options={"size": 8})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_picture_is_read_and_a_prediction_refuses_two(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, FIRST)
    assert (ImageFiles([path], 8, "folder").read()[0] == 10).all()
    write(path, FIRST, SECOND)
    about = {
        "task": "classification", "classes": ("a", "b"), "image_size": (8, 8), "channels": 1, "grey_bits": 16,
        "window": None, "mean": (0.5,), "std": (0.2,),
    }  # fmt: skip
    with pytest.raises(UserError, match="holds several pictures"):
        Predictor(torch.nn.Identity(), about).read([path])


def test_the_first_picture_of_a_photograph_counts(tmp_path):
    """Telephones store depth and brightness as further pictures of a JPEG file."""
    Image.fromarray(FIRST).save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.fromarray(SECOND)]
    )
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.n_frames == 2
    assert (ImageFiles([tmp_path / "a.jpg"], 8, "folder").read()[0] == 10).all()


# -- window ------------------------------------------------------------------------------------------------------------


SIDE, AIR = 24, 1024  # stored values are Hounsfield units + 1024
HOW = {"model": "cnn", "width": 8, "clients": 2, "partition": "iid", "rounds": 12, "local_epochs": 2, "lr": 0.05,
       "batch_size": 16, "threads": 1, "workers": 1, "progress": False, "pictures": False, "grad_cam": 0}  # fmt: skip


def scan(rng, lesion):
    """Write scans of soft tissue (40 HU, noise of 20) over a metal table, every second with a lesion of +35 HU."""
    values = 40 + AIR + rng.normal(0, 20, (SIDE, SIDE))
    y, x = rng.integers(6, SIDE - 6, 2)
    grid = np.mgrid[:SIDE, :SIDE]
    if lesion:
        values[(grid[0] - y) ** 2 + (grid[1] - x) ** 2 < 25] += 35
    values[-1] = rng.uniform(2000, 60000, SIDE)
    return np.rint(values).astype(np.uint16)


@pytest.fixture
def scans(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "scans"
    for i in range(240):
        (folder / ("ill" if i % 2 else "well")).mkdir(parents=True, exist_ok=True)
        Image.fromarray(scan(rng, i % 2)).save(folder / ("ill" if i % 2 else "well") / f"{i}.png")
    return folder


def options(**changes):
    return {"size": SIDE, "colour": "grey", "test_share": 0.3, **changes}


def open_set(folder, **changes):
    return load("folder", root=folder, clients=2, partition="iid", options=options(**changes))


@pytest.mark.exhaustive
def test_lesions_of_35_hu_separate(scans, tmp_path):
    found = {}
    for name, changes in (("without", {}), ("with", {"window": f"{40 + AIR},400"})):
        run = fedkern.simulate(
            "fedavg", data="folder", data_root=scans, data_options=options(**changes), out=tmp_path / name, **HOW
        )
        found[name] = run.metrics["auroc"]
    assert found["with"] >= 0.95
    assert found["without"] < 0.7


def test_a_window_is_kept_in_prediction_evaluation_and_export(scans, tmp_path):
    short = {**HOW, "rounds": 1, "local_epochs": 1, "train_samples": 40}
    run = fedkern.simulate(
        "fedavg", data="folder", data_root=scans, data_options=options(window=f"{40 + AIR},400"), out=tmp_path / "run",
        **short,
    )  # fmt: skip
    assert run.evaluate() == pytest.approx(run.metrics)
    paths = sorted((scans / "ill").iterdir())[:3]
    raw = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(float)
    seen = np.rint(255 * np.clip((raw - (AIR - 160)) / 400, 0, 1)).astype(np.uint8)[:, None]
    np.testing.assert_array_equal(run.predict(paths), run.predict(seen))
    _, about = run.export(tmp_path / "network.pt", "state-dict")
    assert json.loads(about.read_text())["window"] == [AIR - 160, AIR + 240]
    assert run.evaluate("folder", data_root=scans)["accuracy"] >= 0
    for path in scans.rglob("*.png"):  # as HU
        Image.fromarray(np.asarray(Image.open(path)).astype(np.int32) - AIR).save(path.with_suffix(".tif"))
        path.unlink()
    outside = r"9\d % of pixels lie below and \d % of pixels lie above the window; stored values -"
    with pytest.warns(UserWarning, match=outside):
        run.predict([path.with_suffix(".tif") for path in paths])
    with pytest.warns(UserWarning, match=outside):
        run.evaluate("folder", data_root=scans)


@pytest.mark.parametrize(("data", "given"), [
    ("pairs", {"crop": 8}), ("pairs", {"crop": 8, "size": 16}), ("pairs", {"size": 16}), ("segmentation", {"size": 16}),
])  # fmt: skip
def test_other_images_are_seen_in_the_size_of_the_run(data, given, tmp_path):
    """One case is a network that sees parts of the images."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(20):
        place = tmp_path / ("images" if data == "segmentation" else "")
        Image.fromarray(rng.integers(0, 256, (20, 20)).astype(np.uint8)).save(place / f"{i}.png")
        Image.fromarray((np.eye(20) * (i % 2)).astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    if data == "pairs":
        shutil.rmtree(tmp_path / "masks")
    opened = partial(load, data, root=tmp_path, clients=1, partition="iid")
    trained = opened(options={"colour": "grey", **given})
    config = RunConfig.make("feddra", data=data, data_options={"colour": "grey", **given})
    about = {**trained.form.about(), "task": trained.task.name, "classes": [*trained.classes]}
    later = opened(options=_as_trained(data, about, config))
    assert later.form.shape == trained.form.shape
    assert torch.equal(later.tests[""].images[:], trained.tests[""].images[:])


def test_a_user_s_data_set_may_have_parts_without_a_size(monkeypatch):
    info = SimpleNamespace(options={"crop": lookup("pairs").options["crop"]})
    monkeypatch.setattr(run_evaluation, "lookup", lambda data: info if data == "mine" else lookup(data))
    about = {"image_size": (8, 8), "channels": 1, "grey_bits": 8, "window": None, "task": "pairs"}
    seen = _as_trained("pairs", about, SimpleNamespace(data="mine", data_options={"crop": 8}))
    assert (seen["size"], seen["colour"]) == (8, "grey")
    assert "crop" not in seen


def test_what_files_hold_and_a_network_sees_is_told(scans):
    told = []
    opened = partial(load, "folder", root=scans, clients=2, partition="iid", notice=told.append)
    data = opened(options={"size": 16, "window": "1%,90%"})
    assert data.form.window == pytest.approx((40 + AIR, 40 + AIR), abs=90)
    low, high = data.form.window
    text = f"images: 16-bit grey, {SIDE} x {SIDE}, window {(low + high) / 2:g},{high - low:g} -> 16 x 16 RGB"
    assert data.form.seen == (text,)
    (line,) = opened(options={"size": 16}).form.seen
    assert "0 to 65,535 become 0 to 255 (--data-option window=CENTRE,WIDTH keeps what matters)" in line
    assert not told  # the header tells it


def test_percentiles_are_of_the_training_files(scans):
    for i, path in enumerate(sorted(scans.rglob("*.png"))):
        split = scans / ("test" if i % 4 == 0 else "train") / path.parent.name
        split.mkdir(parents=True, exist_ok=True)
        moved = split / path.name
        path.rename(moved)
        if i % 4 == 0:
            Image.fromarray(np.full((SIDE, SIDE), 60000, np.uint16)).save(moved)
    for name in ("ill", "well"):
        (scans / name).rmdir()
    form = open_set(scans, window="0%,90%").form
    assert form.window == pytest.approx((40 + AIR, 40 + AIR), abs=150)


def test_percentiles_of_few_training_files_among_many(tmp_path, monkeypatch):
    """The header's files, evenly spread over all, may include no training file."""
    monkeypatch.setattr(greys, "MAX_FILES", 4)
    for split, count in (("test", 44), ("train", 3)):
        for i in range(count):
            folder = tmp_path / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            value = 60000 if split == "test" else 1000 + 100 * i
            Image.fromarray(np.full((9, 9), value, np.uint16)).save(folder / f"{i:02}.png")
    form = load(
        "folder", root=tmp_path, clients=1, partition="iid", options=options(window="0%,100%", validation_share=0.0)
    ).form
    assert form.window == (1000, 1200)


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (f"{40 + AIR},400", ""), ("1%,99%", ""), ("40,400", "100 % of pixels lie above the window"),
        (f"{100 + AIR},80", "76 % of pixels lie below and 4 % of pixels lie above the window"),
    ],
)  # fmt: skip
def test_a_window_that_most_pixels_lie_outside_of_is_told(window, said, scans, tmp_path):
    said = said and f"{said}; stored values 976 to 59,981"
    assert open_set(scans, window=window).form.outside.partition(": give ")[0] == said
    given = {**HOW, "rounds": 1, "model": "mlp", "data_options": options(window=window), "out": tmp_path / "run"}
    equal = pytest.raises(UserError, match=rf"All 151 images of the training set are equal .*: {said}")
    with equal if window == "40,400" else nullcontext():
        run = fedkern.simulate("fedavg", data="folder", data_root=scans, **given)
        assert run.summary["diagnostics"].get("pixels-outside-window", "").partition(": give ")[0] == said
    assert (tmp_path / "run").exists() is (window != "40,400")


@pytest.mark.parametrize(
    ("blank", "said"),
    [("ab", "All 16 images of the training set are"), ("b", r"All 8 images of client 1 \(b\) are"), ("", ""),
     ("t", "All 8 images of the test set are equal as a network sees them, so that they tell nothing: look at")],
)  # fmt: skip
def test_a_set_of_equal_images_is_refused(blank, said, tmp_path):
    noise, labels = np.random.default_rng(0).integers(0, 256, (8, 4, 4)).astype(np.uint8), np.arange(8) % 2
    a, b, test = ((0 * noise if name in blank else noise, labels) for name in "abt")
    data = fedkern.FederatedData.from_arrays({"a": a, "b": b}, test)
    settings = {"model": "mlp", "rounds": 1, "progress": False, "pictures": False, "out": tmp_path / "run"}
    with pytest.raises(UserError, match=said) if said else nullcontext():
        fedkern.simulate("fedavg", data=data, **settings)
    assert (tmp_path / "run").exists() is not bool(said)


def test_a_window_without_effect_is_told(tmp_path):
    for i in range(12):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 9), i, np.uint8)).save(folder / f"{i}.png")
    told = []
    load("folder", root=tmp_path, clients=2, partition="iid", options=options(window="40,400"), notice=told.append)
    assert told == ["The data option window=40,400 has no effect: no file has greys of over 8 bits."]


def test_percentiles_are_of_the_pixels(scans):
    paths = sorted(scans.rglob("*.png"))
    looks = inspect_files(paths[::2], 10**6, True).values()
    low, high = window_of("0%,100%", looks)
    chosen = [np.asarray(Image.open(path)) for path in paths[::2]]
    assert (low, high) == (min(image.min() for image in chosen), max(image.max() for image in chosen))
    assert window_of(format_window((low, high)), looks) == (low, high)
    assert window_of("", looks) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("40", "window must be CENTRE,WIDTH such as 1064,400"), ("a,b", "must be CENTRE,WIDTH"),
        ("40,0", "holds no value between 40 and 40"), ("99%,1%", "two from 0 to 100, the lower one first"),
        ("0%,101%", "two from 0 to 100"),
    ],
)  # fmt: skip
def test_a_wrong_window_is_one_sentence(text, said, scans):
    with pytest.raises(UserError, match=said):
        open_set(scans, window=text)
