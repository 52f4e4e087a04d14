"""Tests of held-out sites: no other set keeps an image of the held-out client, whatever the data come from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkern.data import FederatedData, Pool, Source, Split, load
from fedkern.data.dataset_registry import DATASETS, register_data
from fedkern.data.sharing.holdout import hold_out
from fedkern.errors import UserError
from python_tests.data.image_sets import write_image, write_mask, write_table

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
