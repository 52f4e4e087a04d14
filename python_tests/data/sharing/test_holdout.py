"""Tests of held-out sites and images of one patient: no other set keeps or shows them."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import FederatedData, Pool, Source, Split, load
from fedkern.data.dataset_registry import DATASETS, register_data
from fedkern.data.sharing.holdout import hold_out, limit_patients
from fedkern.engine.client import Client
from fedkern.engine.context import RunContext
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.methods import FedDRA
from fedkern.methods.fediod import method
from fedkern.settings.config import RunConfig
from python_tests.data.image_sets import write_image, write_mask, write_table
from python_tests.hearing import Hearing

SITES = ("Aachen", "Bonn", "Celle")


def value(site, i):
    """Return a grey value that identifies the site."""
    return 80 * site + i


def table(name, root, splits):
    rows = [
        {"name": f"{title}{i}.png", "value": value(site, i), "label": "ab"[i % 2], "hospital": title,
         "split": splits[i % len(splits)]}
        for site, title in enumerate(SITES) for i in range(20)
    ]  # fmt: skip
    write_table(root, f"{name},hospital,split", rows)


def folders(name, root, splits):
    for site, title in enumerate(SITES):
        for split in {*splits}:
            tree = root / title / split
            for i in range(20):
                if name == "segmentation":
                    write_image(tree / "images" / f"{i}.png", value(site, i))
                    write_mask(tree / "masks" / f"{i}.png")
                else:
                    path = tree / "ab"[i % 2] / f"{i}{split}.png"
                    write_image(path, value(site, i))
                    if name == "pairs":
                        path.with_suffix(".txt").write_text(f"text {i}")


def make_opener(write, name):
    def make(root, splits, **settings):
        write(name, root, splits)
        return load(name, root=root, options={"size": 8, "colour": "grey"}, **settings)

    return make


def in_memory(root, splits, **settings):
    def pair(site, start, count):
        images = np.stack([np.full((8, 8), value(site, i), np.uint8) for i in range(start, start + count)])
        return images, np.arange(count) % 2

    def all_sites(start, count):
        parts = [pair(site, start, count) for site in range(3)]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    clients = {title: pair(site, 0, 20) for site, title in enumerate(SITES)}
    return FederatedData.from_arrays(clients, all_sites(4, 4), validation=all_sites(0, 4))


def pools(groups=True):
    """Return a data set whose pools name the site of every image."""

    def pool(start, count):
        rows = [(site, i) for site in range(3) for i in range(start, start + count)]
        images = torch.stack([torch.full((1, 8, 8), value(site, i), dtype=torch.uint8) for site, i in rows])
        return Pool(
            labels=torch.tensor([i % 2 for _, i in rows]),
            ids=tuple(f"{SITES[site]}/{i}" for site, i in rows),
            read=lambda wanted: (images[wanted], None),
            groups=torch.tensor([site for site, _ in rows]),
        )

    return Source(("a", "b"), pool(0, 20), pool(20, 4), {"": pool(24, 6)}, (0.5,), (0.25,), "none", 3, sites=SITES,
                  named_by="the function")  # fmt: skip


def plugin(root, splits, **settings):
    register_data("sited")(pools_of_the_plugin)
    try:
        return load("sited", **settings)
    finally:
        del DATASETS["sited"]


def pools_of_the_plugin():
    """Return images of three sites."""
    return pools()


SOURCES = {
    **{name: make_opener(table, name) for name in ("csv", "pairs", "segmentation")},
    **{f"{name} folders": make_opener(folders, name) for name in ("folder", "pairs", "segmentation")},
    "arrays": in_memory,
    "plugin": plugin,
}


def sites_of(split):
    return sorted({int(image.max()) // 80 for image in split.images})


@pytest.mark.sampled
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("splits", [("",), ("train", "train", "test"), ("train", "test", "val", "train", "train")])
@pytest.mark.parametrize("absent", [0, "Celle"])
def test_no_other_set_keeps_an_image(tmp_path, name, splits, absent):
    data = SOURCES[name](tmp_path, splits)
    number = SITES.index(absent) if isinstance(absent, str) else absent
    kept = sorted({0, 1, 2} - {number})
    holdout = hold_out(data, held_out=absent, share=0, seed=0)
    assert [sites_of(split) for split in holdout.clients] == [[site] for site in kept]
    assert sites_of(holdout.validation) == sites_of(holdout.tests[""]) == kept
    assert sites_of(holdout.tests["held_out"]) == [number]
    assert set(holdout.tests) == {"", "held_out"}
    before, after = ((*d.clients, d.validation, *d.tests.values()) for d in (data, holdout))
    if name == "arrays":  # its validation and test sets show images of the clients
        assert len(holdout.tests["held_out"]) == 20
    else:
        assert sum(map(len, before)) == sum(map(len, after))
    assert holdout.statistics.held_out[1] == len(holdout.tests["held_out"])
    for split in (holdout.validation, holdout.tests[""]):  # clients are numbered anew
        if split.homes is not None:
            assert [kept[home] for home in split.homes.tolist()] == [int(image.max()) // 80 for image in split.images]


@pytest.mark.parametrize("name", ["csv", "folder folders", "plugin"])
def test_public_samples_are_of_the_others(tmp_path, name):
    data = SOURCES[name](tmp_path, ("train", "train", "test"), public_samples=12)
    assert sites_of(data.public) == [0, 1, 2]
    assert sites_of(hold_out(data, held_out=1, share=0, seed=0).public) == [0, 2]


def test_a_test_set_of_that_client_alone_is_left_out(tmp_path):
    table("csv", tmp_path, ("train",))
    path = tmp_path / "list.csv"
    path.write_text(path.read_text().replace("Bonn,train", "Bonn,test", 6))
    data = load("csv", root=tmp_path, options={"size": 8})
    holdout = hold_out(data, held_out="Bonn", share=0, seed=0)
    assert list(holdout.tests) == ["held_out"]
    assert len(holdout.tests["held_out"]) == 20


def test_another_partition_has_other_clients(tmp_path):
    table("csv", tmp_path, ("",))
    data = load("csv", root=tmp_path, options={"size": 8}, partition="iid", clients=2)
    holdout = hold_out(data, held_out=1, share=0, seed=0)
    assert holdout.validation.ids == data.validation.ids
    assert holdout.tests[""].ids == data.tests[""].ids


@pytest.mark.parametrize("name", ["colordigits", "captions"])
def test_images_in_the_look_of_the_client(name):
    settings = {"clients": 3, "train_samples": 90, "options": {"test_samples": 30, "validation_samples": 12}}
    data = load(name, **settings)
    holdout = hold_out(data, held_out=2, share=0, seed=0)
    for split in (data.validation, next(iter(data.tests.values()))):
        assert set(split.homes.tolist()) == {0, 1, 2}
    for split in (holdout.validation, next(iter(holdout.tests.values()))):
        assert set(split.homes.tolist()) == {0, 1}
    assert "minority" not in holdout.tests
    assert load(name, partition="iid", **settings).validation.homes is None


def test_copies_with_patches_leave_too(tmp_path):
    table("csv", tmp_path, ("",))
    options = {"size": 8, "backdoor_clients": 1, "backdoor_size": 2}
    holdout = hold_out(load("csv", root=tmp_path, options=options), held_out="Bonn", share=0, seed=0)
    assert not any("Bonn" in name for name in (*holdout.tests[""].ids, *holdout.tests["backdoor"].ids))
    assert len(set(holdout.tests["held_out"].ids)) == len(holdout.tests["held_out"]) == 20


def test_equal_images_of_another_client_are_refused(tmp_path):
    data = in_memory(tmp_path, ())
    split = data.clients[0]
    copied = Split(split.images[:3].clone(), split.labels[:3].clone())
    data = replace(data, clients=(split, copied, data.clients[2]))
    with pytest.raises(UserError, match=r"Client 0 \(Aachen\) cannot be held out: 3 of its images belong to client 1"):
        hold_out(data, held_out=0, share=0, seed=0)
    hold_out(data, held_out=2, share=0, seed=0)


def named_sites(*names, tests=("",)):
    pair = np.arange(8 * 16, dtype=np.uint8).reshape(8, 4, 4), np.arange(8) % 2
    pairs = {name: (pair[0] + k, pair[1]) for k, name in enumerate(names)}
    return FederatedData.from_arrays(pairs, dict.fromkeys(tests, (pair[0] + 99, pair[1])))


@pytest.mark.parametrize(
    ("names", "wanted", "client"),
    [
        ("123", "01", "1"), ("123", "3", "3"), ("123", 1, "1"), (("01", "02", "3"), "1", "01"),
        (("01", "1", "2"), "1", "1"), (("01", "1", "2"), "01", "01"), (("10", "0", "b"), "00", "0"), ("abc", "1", "b"),
        ("abc", "01", "b"), (("1a", "b"), 1, "b"), ("012", "2", "2"),
    ],
)  # fmt: skip
def test_a_number_that_equals_a_name_is_that_name(names, wanted, client):
    holdout = hold_out(named_sites(*names), held_out=wanted, share=0, seed=0)
    assert holdout.statistics.held_out[0] == client
    assert holdout.client_names == tuple(name for name in names if name != client)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [("123", "0"), ("123", "04"), (("01", "1", "2"), "001"), (("7", "b"), "1"), ("abc", "3"), ("123", "1.0"),
     ("123", "-1")],
)  # fmt: skip
def test_a_number_that_may_be_another_client_is_refused(names, wanted):
    with pytest.raises(UserError, match=f"^--held-out-client must be one of the clients, .*, not {wanted}\\."):
        hold_out(named_sites(*names), held_out=wanted, share=0, seed=0)


def test_a_test_set_of_that_name_is_not_replaced():
    with pytest.raises(UserError, match='makes the test set "held_out", which the data have'):
        hold_out(named_sites("a", "b", tests=("held_out", "")), held_out="a", share=0, seed=0)


# -- patients ----------------------------------------------------------------------------------------------------------


PARTITIONS = ["iid", "stratified", "dirichlet:0.5:min=2", "classes:1"]
EACH = 5  # images of a patient


def write(root, column="subject_id", patients=30, owner=lambda i: i % 30, header="", cell=lambda i: ""):
    """Write images, those of one patient far from each other in the file."""
    rows = [
        {"text": f"text {i} here", "label": "xyz"[i % 3], "owner and more": f"{owner(i)}{cell(i)}"}
        for i in range(patients * EACH)
    ]
    path = write_table(root, "path,image,mask,text,label,owner and more", rows) / "list.csv"
    path.write_text(path.read_text().replace("owner and more", f"{column}{header}"))
    return path


def open_set(name, path, **settings):
    options = {"size": 8, "colour": "grey", **settings.pop("options", {})}
    return load(name, root=path, **{"clients": 3, "partition": "iid", "options": options, **settings})


def people(split):
    """Return the patients of a split's images, by their names."""
    return {int(name.split("#")[0].removesuffix(".png")) % 30 for name in split.ids}


def assert_apart(*splits):
    found = [people(split) for split in splits]
    assert all(found)
    assert sum(map(len, found)) == len(set.union(*found))


@pytest.mark.parametrize(("name", "column"), [
    ("csv", "subject_id"), ("pairs", "Patient ID"), ("segmentation", "patient_id"), ("csv", "PatientID"),
    ("pairs", "patient"),
])  # fmt: skip
def test_a_patient_is_in_one_split_and_at_one_client(name, column, tmp_path):
    data = open_set(name, write(tmp_path, column))
    splits = [*data.clients, data.validation, data.tests[""]]
    assert_apart(*splits)
    assert sum(map(len, splits)) == 30 * EACH
    assert len(data.tests[""]) == 6 * EACH  # a fifth of the patients
    subset = hold_out(data, held_out=0, share=0.2, seed=0)
    assert_apart(*subset.clients, *subset.client_tests, subset.tests["held_out"], subset.validation, subset.tests[""])


@pytest.mark.parametrize("spec", PARTITIONS)
def test_every_partition_leaves_patients_whole(spec, tmp_path):
    data = open_set("pairs", write(tmp_path), partition=spec, train_samples=80, public_samples=11)
    assert_apart(*data.clients, data.public)
    assert sum(data.client_sizes) == 80


def test_a_partition_counts_the_images_of_patients(tmp_path):
    data = open_set("csv", write(tmp_path), partition="dirichlet:1", clients=8)
    assert min(data.client_sizes) >= 10  # of 21 or so patients
    assert_apart(*data.clients)
    with pytest.raises(UserError, match=r"100 clients are more than the \d\d training patients"):
        open_set("csv", write(tmp_path), clients=100)
    with pytest.raises(UserError, match=r"has \d+ training images of \d+ patients, so it cannot give 900"):
        open_set("csv", write(tmp_path), train_samples=900)


def test_another_patient_in_the_file_changes_no_draw(tmp_path):
    path = write(tmp_path, header=",split", cell=lambda i: f",{'test' if i % 30 > 20 else 'train'}")
    header, *rows = path.read_text().splitlines()
    settings = {"clients": 1, "options": {"validation_share": 0}}

    def list_kept():
        data = limit_patients(open_set("csv", path, **settings), 2, seed=0)
        return [name for name in data.clients[0].ids if name != "new.png"]

    before = list_kept()
    assert len(before) == 2 * 21
    Image.new("L", (8, 8), 255).save(tmp_path / "new.png")
    new = rows[0].replace(rows[0].split(",")[0], "new.png").split(",")
    new[5] = "somebody else"
    path.write_text("\n".join([header, ",".join(new), *rows]))
    assert list_kept() == before


@pytest.mark.parametrize("column", ["subject", "other"])
def test_other_columns_say_nothing_of_patients(column, tmp_path):
    """A column of the image's subject is no column of patients."""
    data = open_set("csv", write(tmp_path, column))
    assert data.clients[0].patients is None
    assert len(data.tests[""]) == 30
    assert people(data.tests[""]) & people(data.clients[0])


def test_images_of_nobody_named_are_apart(tmp_path):
    data = open_set("csv", write(tmp_path, owner=lambda i: "" if i % 30 > 9 else i % 30))
    named = [{person for person in people(split) if person < 10} for split in (*data.clients, data.tests[""])]
    assert sum(map(len, named)) == len(set.union(*named))
    assert len(people(data.tests[""]) & people(data.clients[0])) > 3


def test_a_column_without_names_changes_nothing(tmp_path):
    empty = open_set("csv", write(tmp_path, owner=lambda i: ""), seed=3)
    absent = open_set("csv", write(tmp_path, "other", owner=lambda i: ""), seed=3)
    singles = open_set("csv", write(tmp_path, owner=lambda i: i), seed=3)  # a patient for every image
    for data in (empty, singles):
        assert [split.ids for split in data.clients] == [split.ids for split in absent.clients]
        assert data.tests[""].ids == absent.tests[""].ids


def test_the_tables_own_clients_and_splits_are_kept(tmp_path):
    """A patient who was at two hospitals belongs to both."""

    def where(i):
        return f",{'AB'[i // 75]},{'test' if i % 10 == 9 else 'train'}"

    path = write(tmp_path, header=",client,split", cell=where)
    data = open_set("pairs", path, clients=2, partition="attribute")
    assert set(data.tests[""].ids) == {f"{i}.png" for i in range(150) if i % 10 == 9}
    for split, own in zip(data.clients, (range(75), range(75, 150)), strict=True):
        assert {int(name.removesuffix(".png")) for name in split.ids} <= set(own)
    assert not people(data.validation) & set.union(*(people(split) for split in data.clients))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"client_test": 0.3}, ["the clients' own test sets"]),
        ({"held_out_client": "B"}, ["the held-out client"]),
        ({}, []),
    ],
    ids=str,
)
def test_a_run_says_who_is_both_held_out_and_trained_on(settings, told, tmp_path):
    """The warning counts patients who were at both hospitals."""
    path = write(tmp_path, header=",client", cell=lambda i: f",{'AB'[i // 75]}")
    heard = Hearing()
    options = {"size": 8, "colour": "grey"}
    config = RunConfig.make(
        "fedavg", data="csv", data_root=str(path), rounds=1, model="mlp", data_options=options, **settings
    )
    run(config, out=tmp_path / "run", listener=heard)
    found = [text for text in heard.notices if text.startswith("Patients")]
    assert len(found) == len(told)
    for text, part in zip(found, told, strict=True):
        counts = re.match(rf"Patients whose images are trained on are also in {part} \((\d+) of (\d+)\), so that", text)
        assert 0 < int(counts[1]) < int(counts[2])


def test_too_few_patients_are_named(tmp_path):
    with pytest.raises(UserError, match="1 patients are too few to hold some out as test set"):
        open_set("csv", write(tmp_path, owner=lambda i: 7))
    sparse = open_set("csv", write(tmp_path, owner=lambda i: i % 6), clients=2)
    with pytest.raises(UserError, match=r"Client 0 has \d patients, too few for a test set of its own"):
        hold_out(sparse, held_out=None, share=0.2, seed=0)


@pytest.mark.parametrize(("patients", "share", "held"), [(30, 0.2, 1), (30, 0.05, 1), (30, 0, 0), (1, 0.5, 0)])
def test_fediods_teachers_are_judged_on_patients_that_they_do_not_know(patients, share, held, tmp_path):
    data = open_set("csv", write(tmp_path))
    own = data.clients[0]
    own = own.subset(torch.nonzero(own.patients == own.patients[0])[:, 0]) if patients == 1 else own
    context = RunContext(RunConfig.make("fediod", data="csv", clients=1), replace(data, clients=(own,)))
    trained, out = (own.subset(torch.from_numpy(rows)) for rows in method.split_holdout(Client(context, 0, {}), share))
    assert len(trained) + len(out) == len(own)
    assert not people(trained) & people(out)
    assert len(people(out)) >= held
    assert len(out) <= max(held * EACH, share * len(own))


@pytest.mark.parametrize("loss_share", [0.1, 0.4])
def test_losses_are_taken_on_patients_that_are_not_trained_on(loss_share, tmp_path):
    data = open_set("pairs", write(tmp_path))
    options = {"loss_share": loss_share}
    context = RunContext(RunConfig.make("feddra", data="pairs", clients=3, width=4, options=options), data)
    method = FedDRA(FedDRA.Options.parse(options))
    for k, split in enumerate(data.clients):
        kept, judged = method.rows(Client(context, k, {}))
        assert np.array_equal(np.sort(np.concatenate([kept, judged])), np.arange(len(split)))
        assert_apart(split.subset(torch.from_numpy(kept)), split.subset(torch.from_numpy(judged)))
