"""Tests of NICO's protocols on a generated tree of classes × 10 contexts, and of Tiny-ImageNet's folders."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import Split, load
from fedkern.errors import UserError
from fedkern.run import main
from python_tests.papers_data import NICO, TINYIMAGENET

CLASSES, CONTEXTS, IMAGES = 3, 10, 5


def contexts_of(split: Split) -> set[tuple[str, str]]:
    return {(name.split("/")[0], name.split("/")[1]) for name in split.ids}


def contexts_at(position: int) -> set[tuple[str, str]]:
    """Return every class's context at one position in sorted order."""
    return {(f"class{c}", f"context{position:02d} of {c}") for c in range(CLASSES)}


@pytest.mark.sampled
@pytest.mark.parametrize("layout", ["", "nico", "NICO"])
@pytest.mark.parametrize(("protocol", "offset", "ood"), [("F7", 0, (7, 8, 9)), ("L7", 3, (0, 1, 2))])
def test_who_holds_which_context(tmp_path: Path, write_nico, layout: str, protocol: str, offset: int, ood) -> None:
    write_nico(tmp_path / layout)
    data = load(NICO, root=tmp_path, seed=1, options={"protocol": protocol, "size": 16})
    assert len(data.clients) == 7
    for i, split in enumerate(data.clients):
        assert contexts_of(split) == contexts_at(offset + i)
        assert set(split.labels.tolist()) == set(range(CLASSES))
    training = set.union(*(contexts_at(offset + i) for i in range(7)))
    assert contexts_of(data.tests["id"]) == training
    assert contexts_of(data.validation) == training
    assert contexts_of(data.tests["ood"]) == set.union(*(contexts_at(position) for position in ood))
    assert len(data.tests["ood"]) == CLASSES * 3 * IMAGES


def test_nothing_is_held_out(tmp_path: Path, write_nico) -> None:
    write_nico(tmp_path)
    data = load(NICO, root=tmp_path, options={"size": 16, "held_out": 0})
    assert data.client_sizes == (CLASSES * IMAGES,) * 7
    assert len(data.validation) == 0
    assert set(data.tests) == {"ood"}


def test_every_image_is_used_once(tmp_path: Path, write_nico) -> None:
    write_nico(tmp_path)
    data = load(NICO, root=tmp_path, options={"size": 16})
    names = [name for split in (*data.clients, data.validation, *data.tests.values()) for name in split.ids]
    assert len(names) == len(set(names)) == CLASSES * CONTEXTS * IMAGES
    assert data.image_ids == frozenset(names)


def test_what_macos_puts_beside_images_is_left_out_and_told(tmp_path: Path, write_nico) -> None:
    write_nico(tmp_path)
    for path in [*tmp_path.rglob("*")]:
        if path.is_file():
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    told: list[str] = []
    data = load(NICO, root=tmp_path, options={"size": 16}, notice=told.append)
    assert len(data.image_ids) == CLASSES * CONTEXTS * IMAGES
    assert told == [
        f"Files under {tmp_path} that are not read: 150 ._* of macOS, such as class0/context00 of 0/._0.jpg."
    ]


def test_pixels_labels_and_sizes(tmp_path: Path, write_nico) -> None:
    write_nico(tmp_path, size=(20, 12))
    data = load(NICO, root=tmp_path, options={"size": 16})
    assert data.form.shape == (3, 16, 16)
    for split in (*data.clients, data.tests["ood"]):
        for row, name in enumerate(split.ids):
            c, k, i = int(name[5]), int(name.split("/context")[1][:2]), int(Path(name).stem)
            assert split.labels[row] == c
            colour = torch.tensor([20, 20, 40]) * torch.tensor([c, k, i])
            assert (split.images[row].float().mean((1, 2)) - colour).abs().max() <= 4  # JPEG rounding
            assert split.sizes[row].tolist() == [20, 12]


def test_the_held_out_images_do_not_depend_on_the_seed(tmp_path: Path, write_nico) -> None:
    write_nico(tmp_path)
    data, two = (load(NICO, root=tmp_path, seed=seed, options={"size": 8}) for seed in (0, 1))
    assert data.tests["id"].ids == two.tests["id"].ids
    assert data.validation.ids == two.validation.ids
    assert torch.equal(data.tests["ood"].images, two.tests["ood"].images)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.33])
def test_share_held_out(tmp_path: Path, write_nico, share: float) -> None:
    write_nico(tmp_path, classes=2, images=20, size=(8, 8))
    data = load(NICO, root=tmp_path, options={"size": 8, "held_out": share})
    assert len(data.tests["id"]) == len(data.validation) == 2 * 7 * min(round(20 * share), 6)


def test_a_part_of_a_download(tmp_path: Path, write_nico) -> None:
    write_nico(tmp_path / "NICO" / "Animal", classes=2)
    write_nico(tmp_path / "NICO" / "Vehicle", classes=4)
    assert len(load(NICO, root=tmp_path, options={"size": 8, "part": "vehicle"}).classes) == 4
    assert len(load(NICO, root=tmp_path, options={"size": 8, "part": "Animal"}).classes) == 2
    with pytest.raises(UserError, match='no folder "plants"'):
        load(NICO, root=tmp_path, options={"size": 8, "part": "plants"})


def spoil(path: Path) -> None:
    """Write a JPEG that ends amid its pixels."""
    Image.effect_noise((200, 200), 80).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:500])


CONTEXT = "class1/context04 of 1"


@pytest.mark.parametrize(
    ("change", "clients", "message"),
    [
        (lambda root: None, 5, "assigns its contexts or sites to 7 clients, not 5"),
        (
            lambda root: [shutil.rmtree(path) for path in root.glob("*/context0[789]*")],
            None,
            "class0 has 7 contexts, exp",
        ),
        (lambda root: [path.rename(f"{path}.txt") for path in (root / CONTEXT).iterdir()], None, "1 holds no image"),
        (lambda root: spoil(root / CONTEXT / "2.jpg"), None, rf"cannot read the image .*{CONTEXT}/2.jpg"),
        (lambda root: [*map(shutil.rmtree, root.iterdir())], None, "expected folders class/context/image"),
    ],
)
def test_bad_trees(tmp_path: Path, write_nico, change, clients: int | None, message: str) -> None:
    write_nico(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        load(NICO, root=tmp_path, clients=clients, options={"size": 8})


def test_one_image_in_two_contexts(tmp_path: Path, write_nico) -> None:
    write_nico(tmp_path)
    contexts = sorted((tmp_path / "class0").iterdir())
    (contexts[9] / "9.png").symlink_to(contexts[0] / "1.png")
    with pytest.raises(UserError, match="are one file"):
        load(NICO, root=tmp_path, options={"size": 8})
    (contexts[9] / "9.png").unlink()
    (tmp_path / "class0" / "zoo").symlink_to(contexts[0])
    with pytest.raises(UserError, match="are one file"):
        load(NICO, root=tmp_path, options={"size": 8})


@pytest.mark.usefixtures("undrawn")
def test_a_finished_run_is_evaluated_on_its_own_data(tmp_path: Path, write_nico) -> None:
    """A run folder may not name code alone: the user names the same file again, and no more."""
    write_nico(tmp_path / "data")
    out = tmp_path / "run"
    words = ["--data-option", "size=16", "--model", "resnet8", "--width", "4", "--rounds", "1", "--local-epochs", "1"]
    assert main(["fedavg", "--data", NICO, "--data-root", str(tmp_path / "data"), *words, "--out", str(out)]) == 0
    assert main(["evaluate", str(out), "--data", NICO]) == 0
    figures = json.loads((out / "evaluate-nico.json").read_text())["metrics"]
    told = json.loads((out / "summary.json").read_text())["metrics"]
    assert {name: figures[name] for name in ("id_accuracy", "ood_loss")} == {
        name: told[name] for name in ("id_accuracy", "ood_loss")
    }


# -- tinyimagenet ------------------------------------------------------------------------------------------------------


WNIDS = ("n02", "n01", "n03")
WORDS = {"n01": "crane, a bird", "n02": "crane", "n03": "desk, table", "n99": "unused"}


def picture(path, label, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (60 * label, 20 * number % 256, 10)
    Image.new("L" if number == 1 else "RGB", (64, 64), 60 * label if number == 1 else colour).save(path, quality=95)


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        for i in range(10):
            picture(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label, i)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("x\t0\t0\t9\t9\n")
    lines = []
    for i in range(6):
        picture(folder / "val" / "images" / f"val_{i}.JPEG", i % 3, i)
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t61\t61\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (folder / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in WORDS.items()))
    return folder


@pytest.mark.parametrize("above", [False, True])
def test_content(tree, above):
    data = load(TINYIMAGENET, root=tree.parent if above else tree, clients=3, partition="iid")
    assert data.classes == ("crane (n02)", "crane (n01)", "desk")
    assert data.form.shape == (3, 64, 64)
    assert data.tests[""].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert sorted(data.validation.labels.tolist()) == [0, 1, 2]
    assert sum(data.client_sizes) == 27
    names = [name for split in (*data.clients, data.validation) for name in split.ids]
    assert len(set(names)) == 30
    for split in (*data.clients, data.tests[""]):
        red = split.images[:, 0].float().mean((1, 2))  # tells the label, up to JPEG
        assert np.allclose(red, 60 * split.labels, atol=4)


def test_what_is_missing_is_named(tree):
    (tree / "val" / "images" / "val_3.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_3\.JPEG of .*val_annotations\.txt, line 4, is missing"):
        load(TINYIMAGENET, root=tree)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: (t / "words.txt").unlink(), r"cannot read .*words\.txt"),
        (lambda t: (t / "wnids.txt").unlink(), r"no file wnids\.txt .*found under"),
        (lambda t: (t / "wnids.txt").write_text("n01\nn01\n"), "two or more different classes"),
        (lambda t: (t / "wnids.txt").write_text("n01\nn02\nn03\nn07\n"), "n07/images is missing or holds no image"),
        (lambda t: (t / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn55\n"), "line 1, names no class"),
        (lambda t: (t / "val" / "val_annotations.txt").write_text("\n"), r"val_annotations\.txt lists no image"),
        (lambda t: (t / "train" / "n01" / "images" / "n01_2.JPEG").write_text("no"), r"cannot read the image .*n01_2"),
        (lambda t: (t / "words.txt").write_bytes(b"\xff\xfe\x00"), "not UTF-16"),
    ],
)
def test_incomplete_folders_are_one_sentence(tree, change, words):
    change(tree)
    with pytest.raises(UserError, match=words) as caught:
        load(TINYIMAGENET, root=tree, clients=2, partition="iid")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_image_under_two_names(tree, link):
    (tree / "val" / "images" / "val_0.JPEG").unlink()
    link(tree / "train" / "n01" / "images" / "n01_0.JPEG", tree / "val" / "images" / "val_0.JPEG")
    with pytest.raises(UserError, match=r"are one file, .*remove the link"):
        load(TINYIMAGENET, root=tree, clients=2, partition="iid")
