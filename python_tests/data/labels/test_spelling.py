"""Tests of values that are spelt in several ways, and of cells that stand for a missing value."""

import unicodedata

import pytest
from PIL import Image

import fedkern
from fedkern.data import load
from fedkern.data.labels.spelling import MISSING, unify_spelling
from fedkern.errors import UserError
from fedkern.tasks import CLASSIFICATION, TASKS

ACCENT = "café", unicodedata.normalize("NFD", "café")
TABLES = {"csv": ("path,label", "{i}.png,{label}"), "pairs": ("image,text,label", "{i}.png,a caption,{label}")}


def picture(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (i, 7, 255 - i)).save(path)


def read(name, root, lines, said=None, **settings):
    """Return a data set of pictures 0.png, 1.png, … that a table lists line by line."""
    for i in range(len(lines) - 1):
        picture(root / f"{i}.png", i)
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    options = {"size": 8, **settings.pop("options", {})}
    return load(name, root=root, options=options, notice=(said if said is None else said.append), **settings)


def read_labels(name, root, labels, said=None):
    header, line = TABLES[name]
    return read(
        name, root, [header, *(line.format(i=i, label=label) for i, label in enumerate(labels))], said, partition="iid"
    )


@pytest.mark.sampled
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("spellings", "classes", "told"), [
    (("0", "1", "0.0", "1.0"), ("0", "1"), '"0", "0.0"'),
    (("00", "01", "0", "1", "+1", "1."), ("0", "1"), '"+1", "01", "1"'),
    (("00", "01"), ("00", "01"), ""),
    (("1.0", "2.0", "10.0"), ("1.0", "2.0", "10.0"), ""),
    (("-1", "2", "10"), ("-1", "2", "10"), ""),
    (("0", "1.000000000000000000e+00", "1"), ("0", "1"), '"1"'),
    ((*ACCENT, "tea"), ("café", "tea"), r"'cafe\u0301'"),
    (("1_0", "10", "x"), ("10", "1_0", "x"), ""),
    (("Cat", "cat", "dog"), ("Cat", "cat", "dog"), 'do not count as one: "Cat", "cat"'),
    (("no  finding", "no finding", "x"), ("no  finding", "no finding", "x"), "do not count as one"),
])  # fmt: skip
def test_one_label_in_several_spellings(tmp_path, name, spellings, classes, told):
    said = []
    data = read_labels(name, tmp_path, spellings * 8, said)
    assert data.classes == classes
    rows = [int(image.removesuffix(".png")) for split in data.clients for image in split.ids]
    labels = [int(label) for split in data.clients for label in split.labels]
    plain = [unicodedata.normalize("NFC", text) for text in spellings]
    names = unify_spelling(plain, "")[0]
    assert [classes[label] for label in labels] == [names[row % len(names)] for row in rows]
    assert (told in said[0] and "label" in said[0]) if told else said == []


def test_labels_of_a_set_in_several_spellings(tmp_path):
    said = []
    cells = ["1|2", "01.0", "", "2.0|NA", "10|1"] * 8
    lines = ["path,labels", *(f"{i}.png,{cell}" for i, cell in enumerate(cells))]
    data = read("csv", tmp_path, lines, said, partition="iid")
    assert data.classes == ("1", "2", "10")
    row = {name: label.tolist() for split in data.clients for name, label in zip(split.ids, split.labels, strict=True)}
    expected = [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert all(label == expected[int(name.removesuffix(".png")) % 5] for name, label in row.items())
    assert "count as one" in said[-1]


def test_class_folders_in_several_spellings(tmp_path):
    for k, (site, classes) in enumerate({"A": ("0", "1"), "B": ("00", "01"), "C": ("0.0", "1.0")}.items()):
        for j, name in enumerate(classes):
            for i in range(6):
                picture(tmp_path / site / name / f"{i}.png", 40 * k + 20 * j + i)
    said = []
    data = load("folder", root=tmp_path, options={"size": 8}, notice=said.append)
    assert data.classes == ("0", "1")
    assert [split.labels.unique().tolist() for split in data.clients] == [[0, 1]] * 3
    assert 'count as one: "0", "0.0", "00"' in said[0]


def test_clients_patients_and_splits_in_several_spellings(tmp_path):
    said = []
    sites = [*ACCENT, "Bonn", "bonn "]
    lines = ["path,label,site,patient_id,split"]
    splits = "Train", " TRAIN", "\uff54\uff52\uff41\uff49\uff4e", "test"
    lines += [f"{i}.png,{i // 4 % 2},{sites[i % 4]},{'' if i % 2 else '0'}{i // 2},{splits[i // 8]}" for i in range(32)]
    data = read("csv", tmp_path, lines, said)
    assert data.client_names == ("Bonn", "bonn", "café")
    assert len(data.tests[""]) == 8
    assert all(split.patients.unique().numel() * 2 >= len(split) for split in data.clients)
    assert [text.split('"')[1] for text in said] == ["patient_id", "site", "site"]
    assert said[2].endswith('do not count as one: "Bonn", "bonn".')


# Missing values


@pytest.mark.sampled
@pytest.mark.parametrize("name", [*TABLES, "segmentation"])
@pytest.mark.parametrize("value", sorted(MISSING)[::4])
def test_missing_values_count_as_empty_in_every_column(tmp_path, name, value):
    header, line = TABLES.get(name, ("image,mask", "{i}.png,{i}.png"))
    lines = [f"{header},client,patient_id,split,age"]
    lines += [f"{line.format(i=i, label=i % 2)},{value},{value if i % 3 else i},{value}, {value} " for i in range(30)]
    if name == "segmentation":
        for i in range(30):
            mask = Image.new("L", (8, 8))
            mask.paste(1, (1, 1, 4, 4))
            mask.save(tmp_path / f"m{i}.png")
        lines = [line.replace(".png,", ".png,m", 1) for line in lines]
        lines[0] = lines[0].replace(",mmask", ",mask")
    said = []
    data = read(name, tmp_path, lines, said, partition="iid")
    assert data.client_names is None
    assert said == [f"Cells of list.csv that count as empty: {value} (110)."]
    patients = [number for split in data.clients for number in split.patients.tolist()]
    assert len(set(patients)) == len(patients)  # an image without a name stands alone


@pytest.mark.parametrize("name", ["csv", "pairs"])
def test_a_required_cell_that_counts_as_empty(tmp_path, name):
    column = "label" if name == "csv" else "text"
    with pytest.raises(UserError, match=rf"line 3, has no {column} \(NA, NULL, None and nan count as empty\)"):
        read(name, tmp_path, [f"{'path' if name == 'csv' else 'image'},{column}", "0.png,a", "1.png,NA", "2.png,b"])


def test_a_class_that_is_missing_is_no_class(tmp_path):
    said = []
    data = read_labels("pairs", tmp_path, ["cat", "NA", "N/A"] * 8, said)
    assert data.classes == ("any", "cat")
    assert said == ["Cells of list.csv that count as empty: NA (8), N/A (8)."]


GRADES = [("mild", "none", "severe")[i % 3] for i in range(30)]


def read_grades(root, labels=GRADES, column="label", **options):
    lines = [f"path,{column}", *(f"{i}.png,{label}" for i, label in enumerate(labels))]
    return read("csv", root, lines, [], clients=2, partition="iid", **options)


@pytest.mark.parametrize(("labels", "order", "classes"), [
    (GRADES, "none|mild|severe", ("none", "mild", "severe")),
    (GRADES, " severe |none|mild", ("severe", "none", "mild")),
    (["10", "9.0", "9"] * 10, "10|9", ("10", "9")),
    (["10", "9.0", "9"] * 10, "", ("9", "10")),
    (["none|mild", "severe", ""] * 10, "none|mild|severe", ("none", "mild", "severe")),
])  # fmt: skip
def test_the_order_of_classes(tmp_path, labels, order, classes):
    column = "labels" if "" in labels else "label"
    data = read_grades(tmp_path, labels, column, options={"order": order})
    assert data.classes == classes
    for split in (*data.clients, data.validation, data.tests[""]):
        for name, label in zip(split.ids, split.labels, strict=True):
            text = data.task.label_text(label, classes)
            own = labels[int(name.removesuffix(".png"))].replace(".0", "") or "none"
            assert {*text.split("|")} == {*own.split("|")}


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize(("order", "wrong"), [
    ("none|mild", '"severe" is missing'),
    ("none|mild|severe|mild", '"mild" is there 2 times'),
    ("none|mild|severe|1e3", '"1e3" is no class'),
    ("none||mild|severe|", '"" is no class'),
    (
        "none,mild,severe",
        '"none,mild,severe" is no class, "mild" is missing, "none" is missing, "severe" is missing',
    ),
    ("none|grave|none", '"grave" is no class, "none" is there 2 times, "mild" is missing, "severe" is missing'),
])  # fmt: skip
def test_an_order_that_is_none_is_refused(tmp_path, column, order, wrong):
    labels = [*GRADES[:-1], "none|mild"] if column == "labels" else GRADES
    with pytest.raises(UserError) as told:
        read_grades(tmp_path, labels, column, options={"order": order})
    assert str(told.value).startswith("order must name every class once, and of those of the column ")
    assert str(told.value).endswith(f"list.csv, {wrong}." if column == "labels" else f", {wrong}.")


@pytest.fixture
def grades(monkeypatch):
    """Register another task with a class per image that needs the order of the classes."""

    class Grades(type(CLASSIFICATION)):
        name = "grades"

        def check_classes(self, names, ordered):
            if not ordered:
                raise UserError(f"{', '.join(names)} have no order")

    monkeypatch.setitem(TASKS, "grades", Grades())
    return TASKS["grades"]


def test_a_task_that_the_user_names(tmp_path, monkeypatch, grades):
    option = fedkern.data.DATASETS["csv"].options["task"]
    assert set(option.choices) >= {"auto", "classification", "multilabel", "ordinal"}
    assert not {"segmentation", "retrieval"} & set(option.choices)
    monkeypatch.setitem(option.__dict__, "choices", (*option.choices, "grades"))
    with pytest.raises(UserError, match="mild, none, severe have"):
        read_grades(tmp_path, options={"task": "grades"})
    data = read_grades(tmp_path, options={"task": "grades", "order": "none|mild|severe"})
    assert {split.task for split in (*data.clients, data.validation, data.tests[""])} == {grades}
    assert read_grades(tmp_path, ["10", "9"] * 10, options={"task": "grades"}).classes == ("9", "10")
    assert read_grades(tmp_path).task is CLASSIFICATION


@pytest.mark.parametrize(("options", "given"), [
    ({"label": "label", "labels": "label"}, "label and labels"),
    ({"label": "label", "task": "multilabel"}, "task and label"),
    ({"labels": "label", "task": "classification"}, "task and labels"),
])  # fmt: skip
def test_columns_that_contradict_are_refused(tmp_path, options, given):
    with pytest.raises(UserError, match=f"leave out one of the options {given}: label is for one class an image"):
        read_grades(tmp_path, options=options)
