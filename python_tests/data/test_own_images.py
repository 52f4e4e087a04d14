"""Tests of users' sets: folders of classes, CSV files, images with masks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import IGNORE, load
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.run import main
from fedkern.settings.config import RunConfig
from python_tests.data.image_sets import write_image


def picture(path, value, size=(12, 10)):
    write_image(path, value, size, "RGB")


def mask(path, array):
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def open_set(name, root, **options):
    clients = options.pop("clients", 2)
    partition = options.pop("partition", "iid")
    return load(name, root=root, clients=clients, partition=partition, options={"size": 16, **options})


def every_split(data):
    return (*data.clients, data.validation, data.tests[""])


# folders


def write_folder(root, splits=("train", "test"), classes=("cat", "dog"), images=6):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for i in range(images):
                picture(root / split / name / f"{i}.png", 100 * c + 10 * s + i)


LAYOUTS = [("train", "test"), ("train", "val"), ("train", "valid", "test"), ("Train", "Test"), ("training", "testing")]


@pytest.mark.parametrize("splits", [*LAYOUTS, ("",)])
def test_folders(tmp_path, splits):
    write_folder(tmp_path, splits, images=20)
    data = open_set("folder", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.form.shape == (3, 16, 16)
    found = [
        (name, int(label)) for split in every_split(data) for name, label in zip(split.ids, split.labels, strict=True)
    ]
    assert len(found) == len(set(found)) == 40 * len(splits)
    for name, label in found:
        assert ("dog" in name) == label
    for split in every_split(data):
        assert torch.equal((split.images[:, 0, 0, 0] >= 100).long(), split.labels)
    held = {name.split("/")[0] for name in data.tests[""].ids}
    assert held == ({"cat", "dog"} if splits == ("",) else {splits[-1]})
    if len(splits) == 3:
        assert {name.split("/")[0] for name in data.validation.ids} == {"valid"}
    if splits == ("",):
        assert (len(data.tests[""]), len(data.validation)) == (8, 3)
        assert data.tests[""].labels.tolist().count(0) == 4
        assert open_set("folder", tmp_path).tests[""].ids == data.tests[""].ids


def test_grey_images_and_another_size(tmp_path):
    write_folder(tmp_path)
    data = open_set("folder", tmp_path, colour="grey", size=9)
    assert data.form.shape == (1, 9, 9)
    assert len(data.form.mean) == 1
    assert tuple(data.clients[0].sizes[0]) == (12, 10)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: (t / "train" / "dog" / "3.png").write_text("no"), r"cannot read the image .*dog/3\.png"),
    (
        lambda t: (picture(t / "test" / "cow" / "0.png", 3), (t / "train").rename(t / "Training")),
        r"test/cow is a class that .*/Training does not have",
    ),
    (lambda t: (t / "train" / "emu").mkdir(), r"train/emu holds no image"),
    (lambda t: (t / "test").rename(t / "other"), "has a folder train, but no folder test or val"),
    (lambda t: (t / "testing").mkdir(), "two folders for one split, test and testing"),
    (lambda t: [p.unlink() for p in (t / "test").rglob("*.png")], "no image belongs to the test split"),
])  # fmt: skip
def test_bad_folders_are_one_sentence(tmp_path, change, words):
    write_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=words):
        open_set("folder", tmp_path)


@pytest.mark.parametrize(("name", "words"), [("x\udcff", r'the folder ".*x.xff"'), ("dog/x\udcff.png", "the image")])
def test_names_that_are_not_utf8(tmp_path, name, words):
    write_folder(tmp_path, ("",))
    if name.endswith(".png"):
        picture(tmp_path / name, 3)
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{words}.* has bytes that are not UTF-8"):
        open_set("folder", tmp_path)


def test_a_folder_without_classes(tmp_path):
    with pytest.raises(UserError, match="found 0 class folders"):
        open_set("folder", tmp_path)
    (tmp_path / "scans.csv").write_text("path,label\n")
    with pytest.raises(UserError, match=r"found 0 class folders; for .* give --data csv --data-root .*scans.csv"):
        open_set("folder", tmp_path)


# CSV files


def write_csv(root, lines, header="path,label", count=24):
    for i in range(count):
        picture(root / "files" / f"{i}.png", 10 * i)
    (root / "data.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return root / "data.csv"


def test_csv_with_everything(tmp_path):
    splits = ["train"] * 18 + ["test"] * 6
    holders = ["ab"[i % 3 > 0] if i < 18 else "" for i in range(24)]
    lines = [f"files/{i}.png;{'10' if i % 2 else '9'};{splits[i]};{holders[i]}" for i in range(24)]
    path = write_csv(tmp_path, lines, "\ufeffPath; label;split;client")
    for root in (path, tmp_path):
        data = open_set("csv", root, partition="attribute")
        assert data.classes == ("9", "10")  # as numbers
        assert len(data.tests[""]) == 6
        for client, holds in zip(data.clients, ((0,), (1, 2)), strict=True):
            assert {int(name[6:-4]) % 3 for name in client.ids} == set(holds)
    for split in every_split(data):
        numbers = [int(name[6:-4]) for name in split.ids]
        assert split.images[:, 0, 0, 0].tolist() == [10 * i for i in numbers]
        assert split.labels.tolist() == [i % 2 for i in numbers]
    with pytest.raises(UserError, match="to 2 clients, not 3"):
        open_set("csv", path, partition="attribute", clients=3)


@pytest.mark.parametrize("source", ["folder", "csv"])
def test_a_share_of_0_holds_nothing_out(tmp_path, source, capsys):
    if source == "csv":
        root = write_csv(tmp_path, [f"files/{i}.png,{'xyz'[i % 3]}" for i in range(24)])
    else:
        write_folder(tmp_path, ("",))
        root = tmp_path
    usual = open_set(source, root)
    images = sum(map(len, every_split(usual)))
    data = open_set(source, root, test_share=0, validation_share=0)
    assert (len(data.tests[""]), len(data.validation)) == (0, 0)
    assert sum(map(len, data.clients)) == images
    data = open_set(source, root, validation_share=0)
    assert (len(data.tests[""]), len(data.validation)) == (len(usual.tests[""]), 0)
    words = ["--data", source, "--data-root", str(root), "--data-option", "test_share=0", "--partition", "iid"]
    assert main(["fedavg", *words, "--out", str(tmp_path / "run")]) == 2
    assert "There are no test images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_csv_without_split(tmp_path):
    path = write_csv(tmp_path, [f"files/{i}.png,{'xyz'[i % 3]}" for i in range(24)])
    data = open_set("csv", path, test_share=0.25)
    assert len(data.tests[""]) == 6
    assert len({name for split in every_split(data) for name in split.ids}) == 24
    with pytest.raises(UserError, match="has no attribute"):
        open_set("csv", path, partition="attribute")


@pytest.mark.parametrize(("header", "lines", "words"), [
    ("path,lable", ["files/0.png,a"], 'has no column "label".*lable'),
    ("path,label", [], "lists no image"),
    ("path,label", ["files/0.png,a", "files/99.png,b"], r"99\.png of .*data\.csv, line 3, is missing"),
    ("path,label", ["files/0.png,a", "files/1.png,"], "line 3, has no label"),
    ("path,label", ["files/0.png,a", "files/1.png,nan"], "line 3, has no label"),
    ("path,label,split", ["files/0.png,a,train", "files/1.png,b,tset"], 'line 3, has the split "tset"'),
    ("path,label,split", ["files/0.png,a,train", "files/1.png,b,train"], "no image belongs to the test split"),
    ("path,label,split", ["files/0.png,a,train", "files/1.png,b,test"], "1 images are too few to hold some out"),
    ("path,label", ['"files/0.png,a'], "line 2, begins a row that is not CSV"),
    ("path,note,label,Note", ["files/0.png,,a,"], 'has 2 columns "note", expected one'),
    ("path,label", ["files/0.png,a", "files/1.png,b, c"], "line 3, has 3 values for 2 columns; quote .* commas"),
    ("path;label", ["files/0.png;a;c", "files/1.png;b"],
     "line 2, has 3 values .*; quote texts that hold semicolons"),
])  # fmt: skip
def test_bad_csv_files_are_one_sentence(tmp_path, header, lines, words):
    path = write_csv(tmp_path, lines, header, count=3)
    with pytest.raises(UserError, match=words) as caught:
        open_set("csv", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("header", "line"), [
    ("path,,label,", "files/{i}.png,no,{label},no"),  # a table's own numbering has no name
    ("path,label", "files/{i}.png,{label},,"),
    ("path,label,note", "files/{i}.png,{label}"),
    ('"path";"label";"a, b, c, d";e', '"files/{i}.png";{label};"x, y";z'),
    ("\n\npath\tlabel", "files/{i}.png\t{label}\n"),
])  # fmt: skip
def test_columns_are_found_by_their_place(tmp_path, header, line):
    path = write_csv(tmp_path, [line.format(i=i, label="xyz"[i % 3]) for i in range(24)], header)
    data = open_set("csv", path)
    assert data.classes == ("x", "y", "z")
    for split in every_split(data):
        assert split.labels.tolist() == [int(name[6:-4]) % 3 for name in split.ids]


def test_boxes_of_images_that_are_written_otherwise(tmp_path):
    path = write_csv(tmp_path, [f"./files/{i}.png,{'xyz'[i % 3]}" for i in range(24)])
    boxes = tmp_path / "boxes.json"
    named = {f"{'./' if i % 2 else ''}files/{i}.png": [[0, 0, 6, 5]] for i in range(24)}
    boxes.write_text(json.dumps({"boxes": named}))
    for split in open_set("csv", path, boxes=str(boxes)).clients:
        assert split.masks[:, :8, :8].all()


def test_a_text_in_the_place_of_a_file_is_not_repeated_as_a_whole(tmp_path):
    text = "no focal\nconsolidation " * 50
    path = write_csv(tmp_path, ["files/0.png,a", f'"{text}",b'])
    with pytest.raises(UserError, match=r"no focal consolidation .*\.\.\. of .*\.csv, line 53, is missing") as caught:
        open_set("csv", path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path)) * 2
    assert "\n" not in str(caught.value)


def test_clients_for_some_images_only(tmp_path):
    path = write_csv(
        tmp_path, [f"files/{i}.png,{i % 2},{'a' if i < 20 else ''}" for i in range(24)], "path,label,client"
    )
    with pytest.raises(UserError, match="some training images name a client and others do not"):
        open_set("csv", path, partition="attribute")


def test_which_csv_file(tmp_path):
    with pytest.raises(UserError, match="name it with --data-root"):
        open_set("csv", None)
    with pytest.raises(UserError, match="holds no CSV file"):
        open_set("csv", tmp_path)
    with pytest.raises(UserError, match="neither a CSV file nor a folder"):
        open_set("csv", tmp_path / "nowhere")
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("path,label\n")
    with pytest.raises(UserError, match=r"several CSV files \(a\.csv, b\.csv\)"):
        open_set("csv", tmp_path)


# segmentation


def write_pairs(root, values=(0, 255), images=12, size=(12, 10), kind="L"):
    for i in range(images):
        picture(root / "images" / f"{i}.png", 10 * i, size)
        array = np.zeros((size[1], size[0]), np.uint8)
        array[2:8, 3 : 4 + i % 6] = values[1 + i % (len(values) - 1)]
        picture_mask = Image.fromarray(array)
        if kind == "P":
            picture_mask.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0] * 85 + [0] * 3)
        if kind == "1":
            picture_mask = picture_mask.convert("1")
        (root / "masks").mkdir(exist_ok=True)
        picture_mask.save(root / "masks" / f"{i}.png")


@pytest.mark.parametrize(
    ("values", "kind", "classes"), [((0, 255), "L", 2), ((0, 255), "1", 2), ((0, 1, 2), "L", 3), ((0, 1, 2), "P", 3)]
)
def test_masks_become_the_class_of_every_pixel(tmp_path, values, kind, classes):
    write_pairs(tmp_path, values, kind=kind, size=(16, 16))
    data = open_set("segmentation", tmp_path)
    assert data.task.name == "segmentation"
    assert data.classes == tuple(str(label) for label in range(classes))
    for split in every_split(data):
        assert split.labels.dtype == torch.int64
        assert split.labels.shape == (len(split), 16, 16)
        for name, labels in zip(split.ids, split.labels, strict=True):
            i = int(name[7:-4])
            expected = torch.zeros(16, 16, dtype=torch.int64)
            expected[2:8, 3 : 4 + i % 6] = 1 + i % (classes - 1)
            assert torch.equal(labels, expected)
    assert data.statistics.counts.sum() == sum(data.client_sizes)
    two = data.clients[0].subset(torch.tensor([1, 0]))
    assert torch.equal(two.labels, data.clients[0].labels[[1, 0]])


def test_masks_are_resized_to_the_nearest_pixel(tmp_path):
    write_pairs(tmp_path, (0, 7), size=(48, 32))
    data = open_set("segmentation", tmp_path, names="|".join("abcdefgh"))
    assert data.classes == tuple("abcdefgh")
    assert {int(v) for split in every_split(data) for v in split.labels.unique()} == {0, 7}


def test_segmentation_from_a_csv_file_by_client(tmp_path):
    write_pairs(tmp_path)
    lines = [f"images/{i}.png,masks/{i}.png,{'test' if i > 8 else 'train'},{'pq'[i % 2]}" for i in range(12)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,mask,split,client", *lines]))
    data = open_set("segmentation", tmp_path, partition="attribute", names="background|tumour")
    assert data.classes == ("background", "tumour")
    assert [{int(name[7:-4]) % 2 for name in client.ids} for client in data.clients] == [{0}, {1}]
    assert len(data.tests[""]) == 3


@pytest.mark.parametrize("splits", [("train", "test"), ("TRAIN", "TEST")])
def test_segmentation_in_split_folders(tmp_path, splits):
    for split, count in zip(splits, (10, 4), strict=True):
        write_pairs_into = tmp_path / split
        write_pairs_into.mkdir()
        write_pairs(write_pairs_into, images=count)
    data = open_set("segmentation", tmp_path)
    assert all(name.startswith(f"{splits[1]}/") for name in data.tests[""].ids)
    assert sum(data.client_sizes) + len(data.validation) == 10


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: (t / "masks" / "3.png").unlink(), r"images/3\.png has no mask"),
    (lambda t: (t / "masks" / "3.png").write_text("no"), r"cannot read the mask or its image .*masks/3"),
    (lambda t: picture(t / "masks" / "3.png", 3), r"masks/3\.png has colours"),
    (lambda t: mask(t / "masks" / "3.png", np.zeros((4, 5))), r"masks/3\.png has 5x4 pixels, its image .* 12x10"),
    (lambda t: Image.new("I;16", (12, 10), 700).save(t / "masks" / "3.png"), "holds 700, expected class numbers"),
    (lambda t: mask(t / "masks" / "3.tif", np.zeros((10, 12))), r"masks/3\.png and .*3\.tif are two masks of"),
    (lambda t: (t / "masks").rename(t / "labels"), "has no folder masks"),
    (lambda t: [p.unlink() for p in (t / "images").iterdir()], "no image found in"),
])  # fmt: skip
def test_bad_masks_are_one_sentence(tmp_path, change, words):
    write_pairs(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        open_set("segmentation", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "words"), [
    ({"names": "a"}, "two or more different classes"),
    ({"names": "a|a|b"}, "two or more different classes"),
    ({"partition": "dirichlet:0.5"}, 'none for an image, so "dirichlet:0.5" cannot share it'),
    ({"cue_clients": 1}, "option cue_clients is for classification"),
    ({"partition": "attribute"}, "has no attribute"),
])  # fmt: skip
def test_what_segmentation_cannot_do_is_one_sentence(tmp_path, settings, words):
    write_pairs(tmp_path, images=20)
    with pytest.raises(UserError, match=words):
        open_set("segmentation", tmp_path, **settings)


def test_what_is_not_known_is_ignored(tmp_path):
    write_pairs(tmp_path, (0, 1, 2), size=(16, 16))
    margin = np.asarray(Image.open(tmp_path / "masks" / "3.png")).copy()
    margin[:, 0] = 255
    mask(tmp_path / "masks" / "3.png", margin)
    data = open_set("segmentation", tmp_path, size=16, ignore=255)
    assert data.classes == ("0", "1", "2")
    for split in every_split(data):
        for name, labels in zip(split.ids, split.labels, strict=True):
            assert bool((labels[:, 0] == IGNORE).all()) == (name == "images/3.png")
            assert not (labels[:, 1:] == IGNORE).any()
    mask(tmp_path / "masks" / "3.png", np.full((16, 16), 255))
    with pytest.raises(UserError, match=r"masks/3\.png holds nothing but 255"):
        open_set("segmentation", tmp_path, size=16, ignore=255)


@pytest.mark.parametrize(("method", "settings", "words"), [
    ("fedgid", {}, r"fedgid is for classification, but .* is for segmentation"),
    ("fedavg", {"model": "cnn"},
     r"network cnn gives classes of images, .* choose one of unet, unet-small, .* with"),
    ("oneshot-fedavg", {"options": {"calibrate": True}}, "calibrate draws .* this run is for segmentation"),
    ("feddf", {"options": {"source": "generator"}}, "segmentation needs --public-samples"),
])  # fmt: skip
def test_what_needs_whole_images_refuses_them(refuses, tmp_path, method, settings, words):
    write_pairs(tmp_path)
    plain = {"data": "segmentation", "data_root": str(tmp_path), "clients": 2, "threads": 1, "public_samples": 0}
    config = RunConfig.make(method, **plain, data_options={"size": 16}, **settings)
    with refuses(words):
        run(config, out=tmp_path / "run")


def test_a_run_on_ones_own_masks(tmp_path):
    write_pairs(tmp_path / "data", images=14)
    settings = {
        "data_options": {"size": 16}, "width": 2, "rounds": 1, "clients": 2, "threads": 1, "model": "unet-small",
    }  # fmt: skip
    root = str(tmp_path / "data")
    config = RunConfig.make("fedavg", data="segmentation", data_root=root, augment="crop-flip", **settings)
    metrics = run(config, out=tmp_path / "run")["metrics"]
    assert {"dice", "iou", "hd95", "loss"} <= set(metrics)
    assert "accuracy" not in metrics


# Tables of other systems


def listed_images(root, header, line, rows=20):
    for i in range(rows):
        (root / "img").mkdir(exist_ok=True)
        Image.new("L", (8, 8), i).save(root / "img" / f"{i}.png")
    text = "\n".join([header, *(line.format(i=i, label="ab"[i % 2]) for i in range(rows))])
    (root / "list.csv").write_text(text + "\n")


@pytest.mark.parametrize("prefix", ["img\\", ".\\img\\"])
def test_backslashes_are_named(tmp_path, prefix):
    listed_images(tmp_path, "path,label", prefix + "{i}.png,{label}")
    written = f"{prefix}0.png".replace("\\", "/")
    with pytest.raises(UserError, match=rf"line 2, is missing; names of folders end with / .* write {written}$"):
        load("csv", root=tmp_path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("column", ["score [0;1;2]", "score (a,b,c,d)", '"a;b;c,d,e\tf"', "a;b;c\td\te\tf"])
def test_a_column_is_no_separator(tmp_path, separator, column):
    if any(character in column.replace('"', "") for character in separator) and '"' not in column:
        column = f'"{column}"'
    listed_images(tmp_path, separator.join(["path", column, "label"]), separator.join(["img/{i}.png", "1", "{label}"]))
    assert load("csv", root=tmp_path, options={"size": 8}, partition="iid", clients=2).classes == ("a", "b")
