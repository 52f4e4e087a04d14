"""Tests of sites in users' files: a column of a CSV file or a folder per site makes the clients."""

import re
from collections import Counter

import pytest

from fedkern.data import load
from fedkern.data.sharing.holdout import hold_out
from fedkern.errors import UserError
from python_tests.data.image_sets import write_image, write_mask, write_table

SITES = ("Aachen", "Bonn", "Celle")


def caption(path, text):
    path.with_suffix(".txt").write_text(text)


def open_set(name, root, clients=None, partition=None, notice=None, **options):
    return load(name, root=root, clients=clients, partition=partition, options={"size": 8, **options}, notice=notice)


def table(root, header="path,label,site", rows=30, sites=SITES, line="{i}.png,{label},{site}"):
    lines = [header]
    for i in range(rows):
        write_image(root / f"{i}.png", 8 * i)
        site = sites[i % len(sites)]
        lines.append(line.format(i=i, label="cd"[i // 3 % 2], site=site, split="train" if i < rows - 6 else "test"))
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    return root


def held_by(data):
    """Return the site of every client, where image ``i.png`` belongs to site ``i % 3``."""
    found = [{int(name.removesuffix(".png")) % 3 for name in split.ids} for split in data.clients]
    assert all(len(sites) == 1 for sites in found)
    return [sites.pop() for sites in found]


# CSV files

READ = {"csv": ("path,label", "{i}.png,{label}"), "pairs": ("image,text", "{i}.png,a caption {label}")}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("column", ["client", "Site", "HOSPITAL"])
def test_a_column_makes_the_clients(tmp_path, name, column):
    header, line = READ[name]
    said = []
    data = open_set(name, table(tmp_path, f"{header},{column}", line=f"{line},{{site}}"), notice=said.append)
    assert data.client_names == SITES
    assert held_by(data) == [0, 1, 2]
    assert data.statistics.partition == "attribute"
    assert data.statistics.labels == list(SITES)
    assert said == []


def test_the_first_of_the_columns_and_the_one_that_is_named(tmp_path):
    root = table(tmp_path, "path,label,hospital,site,client,ward", line="{i}.png,{label},X,{site},,W{site}")
    assert open_set("csv", root).client_names == SITES  # client is empty, and site comes before hospital
    data = open_set("csv", root, client_column="Ward")
    assert data.client_names == tuple(f"W{site}" for site in SITES)
    with pytest.raises(UserError, match=r'option client_column names the column "yard".*it has path, .*ward.*"ward"'):
        open_set("csv", root, client_column="yard")
    with pytest.raises(UserError, match=r'option client_column names the column "client" of .*, which is empty'):
        open_set("csv", root, client_column="client")


def test_sites_as_domains_of_other_clients(tmp_path):
    notices = []
    data = open_set("csv", table(tmp_path, rows=60), clients=6, partition="domain:0", notice=notices.append)
    assert sorted(held_by(data)) == [0, 0, 1, 1, 2, 2]
    assert (data.client_names, notices) == (None, [])
    mixed = open_set("csv", tmp_path, clients=2, partition="domain:1")
    for split in mixed.clients:
        assert set(Counter(int(name.removesuffix(".png")) % 3 for name in split.ids).values()) <= {7, 8, 9}


def test_another_partition_says_that_the_column_is_not_used(tmp_path):
    said = []
    data = open_set("csv", table(tmp_path), partition="iid", notice=said.append)
    assert data.client_names is None
    assert len(data.clients) == 5
    assert said == [
        'The column "site" of list.csv names 3 clients and is not used: --partition iid shares the samples out.'
    ]


def test_a_number_of_clients_that_contradicts_the_sites(tmp_path):
    root = table(tmp_path)
    with pytest.raises(UserError, match=r'by the column "site" of list.csv to 3 clients, not 4; take --clients 3 or'):
        open_set("csv", root, clients=4)
    assert open_set("csv", root, clients=3).client_names == SITES
    assert len(open_set("csv", root, clients=4, partition="iid").clients) == 4


def test_rows_that_nobody_trains_on_need_no_client(tmp_path):
    root = table(tmp_path, "path,label,split,site", line="{i}.png,{label},{split},{site}")
    text = (root / "list.csv").read_text()
    (root / "list.csv").write_text(re.sub(r"test,\w+", "test,", text))
    data = open_set("csv", root)
    assert data.client_names == SITES
    assert len(data.tests[""]) == 6
    assert data.client_tests == ()


def test_training_rows_without_a_client(tmp_path):
    root = table(tmp_path, sites=("Aachen", "Bonn", ""))
    words = r'some training images name a client and others do not \(\d+ of \d+ in the column "site" of list.csv\)'
    for partition in (None, "attribute"):
        with pytest.raises(UserError, match=words):
            open_set("csv", root, partition=partition)
    said = []
    assert len(open_set("csv", root, partition="iid", notice=said.append).clients) == 5
    assert "names clients and is not used" in said[0]


def test_a_single_site_is_no_partition(tmp_path):
    said = []
    data = open_set("csv", table(tmp_path, sites=("Aachen",)), partition=None, clients=2, notice=said.append)
    assert data.statistics.partition == "dirichlet:0.5"
    assert "names 1 client and is not used" in said[0]


def test_a_site_that_is_drawn_into_the_held_out_sets_as_a_whole(tmp_path):
    """The site's two patients are also patients of other sites, and are held out."""
    line = "{i}.png,{label},{site},{i}"
    root = table(tmp_path, "path,label,site,patient", line=line)
    data = open_set("csv", root)
    path, held = root / "list.csv", [name.removesuffix(".png") for name in data.tests[""].ids[:2]]
    for i, patient in enumerate(held):
        write_image(root / f"z{i}.png", i)
        path.write_text(path.read_text() + f"z{i}.png,c,Zell,{patient}\n")
    with pytest.raises(UserError, match=r"all images of Zell in the column .* were drawn into the test or validation"):
        open_set("csv", root)
    said = []
    assert open_set("csv", root, partition="attribute", notice=said.append).client_names == SITES
    assert "names Zell too, which has no training image left and is no client" in said[-1]


# Sets that are drawn


def by_site(root, name, counts, patients=1):
    """Write a data set of sites with so many images each.

    Images of a patient follow each other.
    """
    rows = [
        {"name": f"{site}{i}.png", "label": "ab"[i % 2], "site": site, "patient": f"{site}{i // patients}"}
        for site, count in counts.items() for i in range(count)
    ]  # fmt: skip
    return write_table(root, f"{name},site,patient", rows)


def shares(split):
    """Return the number of images of a split by site."""
    return dict(sorted(Counter(name[0] for name in split.ids).items()))


@pytest.mark.parametrize("name", ["csv", "pairs", "segmentation"])
def test_the_sets_are_drawn_of_every_site(tmp_path, name):
    said = []
    data = open_set(name, by_site(tmp_path, name, {"A": 10, "B": 10, "C": 40}), notice=said.append)
    assert shares(data.tests[""]) == {"A": 2, "B": 2, "C": 8}
    assert shares(data.validation) == {"A": 1, "B": 1, "C": 3}
    assert said == []
    iid = open_set(name, tmp_path, partition="iid", clients=2)
    assert iid.tests[""].ids == data.tests[""].ids


def test_folders_of_sites_are_drawn_of_every_site(tmp_path):
    for k, site in enumerate(SITES):
        for label in "ab":
            for i in range(5):
                write_image(tmp_path / site / label / f"{i}.png", 40 * k + 20 * (label == "a") + i)
    data = open_set("folder", tmp_path)
    assert shares(data.tests[""]) == {"A": 2, "B": 2, "C": 2}
    assert shares(data.validation) == {"A": 1, "B": 1, "C": 1}
    assert data.tests[""].labels.bincount().tolist() == [3, 3]


@pytest.mark.parametrize(("counts", "test", "validation", "told"), [
    ({"A": 3, "B": 3}, {"A": 1, "B": 1}, {"A": 1, "B": 1}, []),
    ({"A": 2, "B": 3}, {"A": 1, "B": 1}, {"B": 1}, ["The validation set has no image of A."]),
    (
        {"A": 1, "B": 1, "C": 30},
        {"C": 6},
        {"C": 2},
        ["The test set has no image of A, B.", "The validation set has no image of A, B."],
    ),
])  # fmt: skip
def test_small_sites(tmp_path, counts, test, validation, told):
    said = []
    data = open_set("csv", by_site(tmp_path, "csv", counts), partition="attribute", notice=said.append)
    assert (shares(data.tests[""]), shares(data.validation), said) == (test, validation, told)
    assert list(shares(data.clients[0])) == ["A"]


def test_patients_of_every_site_are_held_out_whole(tmp_path):
    data = open_set("csv", by_site(tmp_path, "csv", {"A": 12, "B": 12, "C": 60}, patients=3))
    assert shares(data.tests[""]) == {"A": 3, "B": 3, "C": 12}
    held = set(data.tests[""].patients.tolist())
    assert not held & {patient for split in (*data.clients, data.validation) for patient in split.patients.tolist()}


def test_a_rare_class_is_in_what_is_held_out(tmp_path):
    """Two of 60 images show the class c, at sites whose other classes are common."""
    root = by_site(tmp_path, "csv", {"A": 20, "B": 20, "C": 20})
    path = root / "list.csv"
    path.write_text(path.read_text().replace("A3.png,b", "A3.png,c").replace("C5.png,b", "C5.png,c"))
    data = open_set("csv", root)
    assert data.classes == ("a", "b", "c")
    assert int((data.tests[""].labels == 2).sum()) == 1
    assert sum(int((split.labels == 2).sum()) for split in data.clients) == 1


@pytest.mark.parametrize("count", [3, 4, 6])
def test_fewer_test_images_still_show_every_site(tmp_path, count):
    root = by_site(tmp_path, "csv", {"A": 5, "B": 5, "C": 60})
    data = open_set("csv", root, test_samples=count, validation_samples=3)
    assert list(shares(data.tests[""])) == list(shares(data.validation)) == ["A", "B", "C"]
    assert len(data.tests[""]) == count


# Columns by other names


@pytest.mark.parametrize(("name", "header", "line", "options"), [
    ("csv", "file,kind", "{i}.png,{label}", {"path": "file", "label": "Kind"}),
    ("csv", "label,path", "{i}.png,{label}", {"path": "label", "label": "path"}),
    ("pairs", "photo,report", "{i}.png,some {label}", {"image": "photo", "text": "report"}),
])  # fmt: skip
def test_columns_by_other_names(tmp_path, name, header, line, options):
    data = open_set(name, table(tmp_path, header, line=line), partition="iid", clients=2, **options)
    for split in (*data.clients, data.validation, data.tests[""]):
        numbers = [int(name.removesuffix(".png")) for name in split.ids]
        if name == "csv":
            assert split.labels.tolist() == [i // 3 % 2 for i in numbers]
        else:
            assert [text[-1] for text in split.texts] == ["cd"[i // 3 % 2] for i in numbers]
            assert all(text.startswith("some") for text in split.texts)


def test_patients_and_splits_in_columns_by_other_names(tmp_path):
    line = "{i}.png,{label},{split},{split} {site}"
    root = table(tmp_path, "path,label,set,person", line=line)
    data = open_set("csv", root, split="set", patient="person", clients=2, partition="iid")
    assert {int(name.removesuffix(".png")) for name in data.tests[""].ids} == set(range(24, 30))
    patients = [set(split.patients.tolist()) for split in data.clients]
    assert not patients[0] & patients[1]


def test_masks_in_a_column_by_another_name(tmp_path):
    root = table(tmp_path, "image,outline", line="{i}.png,m{i}.png")
    for i in range(30):
        write_mask(root / f"m{i}.png", value=255)
    assert open_set("segmentation", root, clients=2, mask="outline").classes == ("0", "1")


@pytest.mark.parametrize(("name", "options", "words"), [
    ("csv", {"label": "site", "path": "nowhere"}, r'the option path names the column "nowhere", which .*list\.csv'),
    ("csv", {"text": "site"}, 'data set "csv" has no option "text"'),
    ("pairs", {}, 'has no column "image".*--data-option image=COLUMN'),
])  # fmt: skip
def test_columns_that_are_not_there(tmp_path, name, options, words):
    with pytest.raises(UserError, match=words):
        open_set(name, table(tmp_path), **options)


def test_a_column_without_a_csv_file(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i)
        caption(tmp_path / f"{i}.png", "a text")
    with pytest.raises(UserError, match=r'option text names the column "report" of a CSV file, and .* holds none'):
        open_set("pairs", tmp_path, text="report")


# Folders


def site_folders(root, splits=("",), classes=("cat", "dog"), images=10, sites=SITES):
    for s, site in enumerate(sites):
        for split in splits:
            for c, name in enumerate(classes):
                for i in range(images):
                    write_image(root / site / split / name / f"{split or 'all'}{i}.png", 80 * s + 20 * c + i)
    return root


def test_a_folder_for_every_site(tmp_path):
    said = []
    data = open_set("folder", site_folders(tmp_path), notice=said.append)
    assert (data.client_names, data.classes, said) == (SITES, ("cat", "dog"), [])
    for split, site in zip(data.clients, SITES, strict=True):
        assert {name.split("/")[0] for name in split.ids} == {site}
        assert [name.split("/")[1] == "dog" for name in split.ids] == split.labels.bool().tolist()
    assert sum(data.client_sizes) + len(data.validation) + len(data.tests[""]) == 60
    assert data.client_tests == ()
    open_set("folder", tmp_path, partition="iid", notice=said.append)
    assert said == [
        f"The layout of {tmp_path} names 3 clients and is not used: --partition iid shares the samples out."
    ]


@pytest.mark.parametrize("splits", [("train", "test"), ("Train", "val", "Test"), ("training", "valid")])
def test_own_test_folders(tmp_path, splits):
    data = open_set("folder", site_folders(tmp_path, splits))
    assert sum(data.client_sizes) == (54 if len(splits) == 2 else 60)  # a tenth is drawn for validation
    assert [len(split) for split in data.client_tests] == [20] * 3
    for split, site in zip(data.client_tests, SITES, strict=True):
        assert {tuple(name.split("/")[:2]) for name in split.ids} == {(site, splits[-1])}
    joined = {name for split in data.client_tests for name in split.ids}
    assert set(data.tests[""].ids) == joined
    assert data.statistics.own_tests == (20, 20, 20)
    with pytest.raises(UserError, match=r"test_samples=2 leaves the site .* without a test image"):
        open_set("folder", tmp_path, test_samples=2)
    assert open_set("folder", tmp_path, partition="iid").client_tests == ()


def test_a_site_may_lack_a_class(tmp_path):
    site_folders(tmp_path)
    for path in (tmp_path / "Bonn" / "dog").iterdir():
        path.unlink()
    data = open_set("folder", tmp_path)
    assert data.statistics.counts[1].tolist()[1] == 0


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


WHOLE, SPLIT = ("",), ("train", "test")


@pytest.mark.parametrize(("splits", "change", "words"), [
    (WHOLE, lambda t: write_image(t / "Bonn" / "x.png", 1), "Bonn holds images and .*Aachen holds folders of images"),
    (WHOLE, lambda t: (t / "Dorf").mkdir(), "Aachen is laid out as a site and .*Dorf beside it is not"),
    (WHOLE, lambda t: [remove(t / name) for name in SITES[1:]], "holds the single site Aachen; name .*--data-root"),
    (SPLIT, lambda t: remove(t / "Bonn" / "test"), "Bonn has a folder train, but no folder test"),
    (
        SPLIT,
        lambda t: write_image(t / "Bonn" / "val" / "cat" / "0.png", 1),
        "the site Bonn has a folder val and the site Aachen has none for that split",
    ),
    (
        SPLIT,
        lambda t: [remove(t / "Bonn" / "test"), remove(t / "Bonn" / "train"), write_image(t / "Bonn/cat/0.png", 1)],
        "the site Aachen has a folder t.* and the site Bonn has none",
    ),
    (
        SPLIT,
        lambda t: [path.unlink() for path in (t / "Bonn" / "test").rglob("*.png")],
        "the site Bonn has no image in .*Bonn/test",
    ),
    (
        SPLIT,
        lambda t: write_image(t / "Bonn/test/cow/0.png", 1),
        "no site has a training image of the class cow; leave .*Bonn/test/cow out",
    ),
    (WHOLE, lambda t: [(t / s / "emu").mkdir() for s in SITES], "no site has a training image of the class emu"),
    (
        WHOLE,
        lambda t: [(t / s / c).rename(t / s / f"{c}{s}") for s in SITES for c in ("cat", "dog")],
        "no two of the folders Aachen, Bonn, Celle in .* have a class in common",
    ),
])  # fmt: skip
def test_trees_that_are_ambiguous_or_not_alike(tmp_path, splits, change, words):
    change(site_folders(tmp_path, splits))
    with pytest.raises(UserError, match=words) as caught:
        open_set("folder", tmp_path)
    assert "\n" not in str(caught.value)


def site_masks(root, splits=("",), images=6):
    for s, site in enumerate(SITES):
        for split in splits:
            for i in range(images):
                write_image(root / site / split / "images" / f"{i}.png", 60 * s + i)
                write_mask(root / site / split / "masks" / f"{i}.png", value=255)
    return root


def site_texts(root, splits=("",), labels=("a", "b"), images=4):
    for s, site in enumerate(SITES):
        for split in splits:
            for name in labels:
                for i in range(images):
                    path = root / site / split / name / f"{i}.png"
                    write_image(path, 60 * s + i)
                    caption(path, f"{site} shows {name} {i}")
    return root


@pytest.mark.parametrize(("name", "make"), [("segmentation", site_masks), ("pairs", site_texts)])
@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_sites_of_masks_and_texts(tmp_path, name, make, splits):
    data = open_set(name, make(tmp_path, splits))
    assert data.client_names == SITES
    for split, site in zip(data.clients, SITES, strict=True):
        assert {name.split("/")[0] for name in split.ids} == {site}
    assert len(data.client_tests) == (3 if splits[0] else 0)
    for split, site in zip(data.client_tests, SITES, strict=bool(splits[0])):
        assert {name.split("/")[0] for name in split.ids} == {site}
    assert name == "segmentation" or data.classes == ("a", "b")


def test_texts_of_sites_without_labels(tmp_path):
    data = open_set("pairs", site_texts(tmp_path, ("train", "test"), labels=("",)))
    assert (data.client_names, data.classes) == (SITES, ("any",))


def test_labels_of_texts_are_no_sites(tmp_path):
    """The layout without sites is read as before, also with another folder beside the labels."""
    site_texts(tmp_path, labels=("",), images=8)
    write_image(tmp_path / "backup" / "deeper" / "0.png", 1)
    data = open_set("pairs", tmp_path, partition="iid", clients=2)
    assert data.classes == SITES
    assert data.client_names is None


# What is set aside


def test_the_table_counts_what_clients_train_on(tmp_path):
    data = open_set("csv", table(tmp_path, rows=60))
    holdout = hold_out(data, held_out=1, share=0.25, seed=0)
    assert holdout.client_names == ("Aachen", "Celle")
    table_ = holdout.statistics
    assert table_.sizes.tolist() == list(holdout.client_sizes)
    assert table_.counts.tolist() == [
        [int((split.labels == label).sum()) for label in (0, 1)] for split in holdout.clients
    ]
    assert table_.own_tests == tuple(len(split) for split in holdout.client_tests)
    assert table_.held_out == ("Bonn", len(holdout.tests["held_out"]))
    header, rows = table_.header(), table_.rows()
    assert header == ["client", "name", "samples", "own test", "skew", "c", "d"]
    assert [row[:2] for row in rows] == [["0", "Aachen"], ["1", "Celle"], ["held out", "Bonn"], ["all", ""]]
    assert [row[header.index("samples")] for row in rows[2:]] == ["", str(sum(holdout.client_sizes))]
    assert sum(int(row[3]) for row in rows[:3]) == int(rows[3][3])


def test_clients_without_names_are_numbers(tmp_path):
    data = open_set("csv", table(tmp_path, rows=60), partition="iid", clients=3)
    holdout = hold_out(data, held_out=1, share=0, seed=0)
    assert holdout.client_names is None
    assert [row[0] for row in holdout.statistics.rows()] == ["0", "1", "held out (1)", "all"]
    assert holdout.statistics.sizes.tolist() == list(holdout.client_sizes)
    assert data.statistics.header() == ["client", "samples", "skew", "c", "d"]


def test_segmentation_counts_the_largest_object(tmp_path):
    data = open_set("segmentation", site_masks(tmp_path, images=10))
    holdout = hold_out(data, held_out=None, share=0.3, seed=0)
    assert holdout.statistics.sizes.tolist() == list(holdout.client_sizes)
    assert holdout.statistics.counts[:, 0].tolist() == [0, 0, 0]
    assert data.statistics.counts.tolist() == [
        [0, len(split) + test] for split, test in zip(holdout.clients, holdout.statistics.own_tests, strict=True)
    ]


def test_messages_name_the_client(tmp_path):
    root = table(tmp_path, rows=60, sites=("Aachen",) * 14 + ("Bonn",))
    sparse = hold_out(open_set("csv", root), held_out=None, share=0, seed=0)
    assert sparse.client_label(1) == "1 (Bonn)"
    assert sparse.pooled().client_label(0) == "0"
    with pytest.raises(UserError, match=r"Client 1 \(Bonn\) has \d+ samples, too few for a test set of its own"):
        hold_out(sparse, held_out=None, share=0.3, seed=0)
