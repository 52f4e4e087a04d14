"""Tests of nested folders: sites or patients, and skipped files."""

from types import SimpleNamespace

import pytest

from fedkern.data import load
from fedkern.errors import UserError
from fedkern.report.live.progress_bar import run_headline
from fedkern.settings.config import RunConfig
from python_tests.data.image_sets import write_mask


def picture(path, value=1, text=True):
    write_mask(path, box=(0, 0, 4, 5), value=value % 256)
    if text:
        path.with_suffix(".txt").write_text(f"text {value}")


def open_set(name, root, said=None, **settings):
    options = {"size": 8, "colour": "grey", **settings.pop("options", {})}
    return load(name, root=root, options=options, notice=None if said is None else said.append, **settings)


def make_tree(root, outer=("cat", "dog"), inner=("patient0", "patient1", "patient2", "patient3", "patient4"), count=3):
    for k, folder in enumerate(outer):
        for j, two in enumerate(inner):
            for i in range(count):
                picture(root / folder / two / f"{i}.png", 60 * k + 5 * j + i)
    return root


@pytest.mark.parametrize("name", ["folder", "pairs"])
@pytest.mark.parametrize(
    "inner", [("patient0", "patient1"), ("P12", "P13"), ("case_1", "Case 2"), ("0001", "0002"), ("img001", "img002")]
)
def test_folders_of_patients_are_refused(tmp_path, name, inner):
    make_tree(tmp_path, inner=inner)
    with pytest.raises(UserError, match=r"looks like the folder of a patient, and cat, dog would be sites; .*layout="):
        open_set(name, tmp_path)
    data = open_set(name, tmp_path, options={"layout": "sites"})
    assert (data.client_names, data.classes) == (("cat", "dog"), tuple(sorted(inner)))


@pytest.mark.parametrize("name", ["folder", "pairs"])
@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_patients_in_class_folders(tmp_path, name, splits):
    people = [f"patient{k}" for k in range(10)]
    for split in splits:
        for k, patient in enumerate(people):
            if split != "test" or k > 7:
                make_tree(tmp_path / split, inner=(patient,)) if split != "train" or k < 8 else None
    picture(tmp_path / splits[0] / "cat" / "alone.png", 200)
    picture(tmp_path / splits[0] / "cat" / "patient1" / "study1" / "deep.png", 201)
    said = []
    options = {"layout": "patients"}
    data = open_set(name, tmp_path, said, options=options, partition="iid", clients=2)
    assert (data.classes, said) == (("cat", "dog"), [])
    sets = (*data.clients, data.validation, data.tests[""])
    assert sum(map(len, sets)) == 62
    held = [{name.split("patient")[1][0] for name in split.ids if "patient" in name} for split in sets]
    assert sum(map(len, held)) == len(set.union(*held)) == 10
    for split in sets:
        assert [data.classes[label] in name for label, name in zip(split.labels.tolist(), split.ids, strict=True)]


@pytest.mark.parametrize("name", ["folder", "pairs"])
def test_a_patient_in_two_spellings(tmp_path, name):
    make_tree(tmp_path, outer=("cat",), inner=[f"{k:03}" for k in range(10)])
    make_tree(tmp_path, outer=("dog",), inner=[f"{k}" for k in range(10)])
    said = []
    data = open_set(name, tmp_path, said, options={"layout": "patients"}, partition="iid", clients=2)
    assert [text.partition(" writes one value in several ways")[0] for text in said] == [f"The layout of {tmp_path}"]
    sets = [
        {int(name.split("/")[1]) for name in split.ids} for split in (*data.clients, data.validation, data.tests[""])
    ]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 10


@pytest.mark.parametrize("name", ["folder", "pairs"])
def test_images_in_linked_folders(tmp_path, name):
    root = make_tree(tmp_path / "root")
    picture(tmp_path / "elsewhere" / "deep" / "linked.png", 200)
    (tmp_path / "elsewhere" / "deep" / "volume.dcm").write_text("")
    (root / "cat" / "patient0" / "study").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    said = []
    data = open_set(name, root, said, options={"layout": "patients"}, partition="iid", clients=2)
    found = [name for split in (*data.clients, data.validation, data.tests[""]) for name in split.ids]
    assert len(found) == 31
    assert "cat/patient0/study/deep/linked.png" in found
    assert said == [f"Files under {root} that are not read: 1 .dcm, such as cat/patient0/study/deep/volume.dcm."]


def test_numbers_are_sorted_as_numbers(tmp_path):
    numbers = tuple(str(k) for k in range(12))
    make_tree(tmp_path, outer=("9", "10"), inner=numbers, count=4)
    data = open_set("folder", tmp_path, options={"layout": "sites"})
    assert data.classes == numbers
    assert data.client_names == ("9", "10")


def test_patients_with_images_and_masks(tmp_path):
    for k in range(8):
        for i in range(3):
            for folder in ("images", "masks"):
                picture(tmp_path / f"patient{k}" / folder / f"{i}.png", 1 if folder == "masks" else 20 * k + i, False)
    with pytest.raises(UserError, match=r"patient0 in .* looks like the folder of a patient, .* be sites"):
        open_set("segmentation", tmp_path)
    assert len(open_set("segmentation", tmp_path, options={"layout": "sites"}).clients) == 8
    data = open_set("segmentation", tmp_path, options={"layout": "patients"}, clients=2)
    sets = (*data.clients, data.validation, data.tests[""])
    held = [{name.split("/")[0] for name in split.ids} for split in sets]
    assert sum(map(len, held)) == len(set.union(*held)) == 8
    assert sum(map(len, sets)) == 24


def test_other_names_are_sites_as_ever_and_the_heading_names_them(tmp_path):
    data = open_set("folder", make_tree(tmp_path, ("Berlin", "Bonn"), ("0", "1", "n01440764")))
    assert (data.client_names, data.classes) == (("Berlin", "Bonn"), ("0", "1", "n01440764"))
    info = SimpleNamespace(
        config=RunConfig.make("fedavg", data="folder", clients=2), samples=[1, 1], test_sets={"": 1}, private=False,
        data=data, model="cnn", parameters=1, out="run", workers=1, worker_bytes=0, guarantee=None, first_round=0,
        rounds=(), frozen=0, frozen_norms=0,
    )  # fmt: skip
    words = "local training: SGD, learning rate 0.05, momentum 0.9, batch size 32, 2 local epochs"
    assert {"sites: Berlin, Bonn", words} <= {*run_headline(info)}


@pytest.mark.parametrize("name", ["folder", "pairs", "segmentation"])
def test_what_is_left_out_is_counted(tmp_path, name):
    tree = tmp_path / "images" if name == "segmentation" else tmp_path / "cat"
    for k in range(12):
        picture(tree / f"{k}.png", k)
        folder = tmp_path / ("masks" if name == "segmentation" else "dog")
        picture(folder / f"{k}.png", 1 if name == "segmentation" else 100 + k)
    said = []
    settings = {"partition": "iid", "clients": 2}
    open_set(name, tmp_path, said, **settings)
    assert said == []
    picture(tree / "more" / "x.png", 99)
    picture(tree / "more" / "y.png", 98)
    for path in ("a.pgm", "b.jfif", "c.jfif", "._0.png", ".DS_Store", "README.md"):
        (tree / path).write_bytes(b"?")
    picture(tmp_path / "__MACOSX" / "cat" / "0.png", 5)
    open_set(name, tmp_path, said, **settings)
    kinds = "2 .jfif, 2 .png, 1 ._* of macOS, 1 .pgm"
    assert said == [f"Files under {tmp_path} that are not read: {kinds}, such as {tree.name}/._0.png."]


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_what_macos_adds_is_no_site(tmp_path, splits):
    for split in splits:
        for k, site in enumerate(("A", "B")):
            for label in ("cat", "dog"):
                for i in range(4):
                    picture(tmp_path / site / split / label / f"{i}{split}.png", 40 * k + 10 * (label == "cat") + i)
    (tmp_path / "__MACOSX" / "A").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "A" / "._0.png").write_bytes(b"?")
    assert open_set("folder", tmp_path).client_names == ("A", "B")


@pytest.mark.parametrize("name", ["pairs", "segmentation"])
def test_a_table_has_no_layout(tmp_path, name):
    (tmp_path / "list.csv").write_text("image,text,mask\na.png,a,b.png\n")
    with pytest.raises(UserError, match=r"the option layout is for folders, and .*list.csv lists the images; leave"):
        open_set(name, tmp_path, options={"layout": "patients"})
