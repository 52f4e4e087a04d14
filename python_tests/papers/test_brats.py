"""Tests of NIfTI volumes: slices, classes, intensities, whole cases.

Every mistake is one sentence.
"""

import gzip
import os
import re
import struct

import numpy as np
import pytest
import torch

from fedkern.data import load
from fedkern.data.sharing.holdout import hold_out
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from python_tests.in_time import in_time
from python_tests.papers_data import BRATS, function

nibabel = pytest.importorskip("nibabel", reason="writes volumes with nibabel (the extra medical)")

read_volume, square, to_bytes = (function(BRATS, name) for name in ("read_volume", "square", "to_bytes"))
SHAPE = (12, 10, 6)  # x, y, z


def save(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def write_case(folder, number, modalities=("t1", "flair"), affine=None, separator="_", shape=SHAPE):
    """Write a head of value 100 and more, with a tumour of three parts in slices 2 to 4 at the case's own place."""
    rng = np.random.default_rng(number)
    head = np.zeros(shape, np.float32)
    head[1:11, 1:9] = 100 + 20 * rng.random((10, 8, shape[2]))
    head[:, :, 0] = 0
    classes = np.zeros(shape, np.uint8)
    x = 2 + number % 5
    classes[x : x + 3, 3:6, 2:5] = 2
    classes[x, 3:5, 2:4] = 1
    classes[x + 2, 5, 3] = 4
    for i, name in enumerate(modalities):
        own = head + 50 * (i + 1) * (classes > 0)
        save(folder / f"{folder.name}{separator}{name}.nii.gz", own, affine)
    save(folder / f"{folder.name}{separator}seg.nii.gz", classes, affine)
    return head, classes


def write_cases(root, count=10, **settings):
    return [write_case(root / f"case{i}", i, **settings) for i in range(count)]


def open_set(root, clients=2, partition="iid", **options):
    plain = {"modalities": "t1,flair", "size": 12}
    return load(BRATS, root=root, clients=clients, partition=partition, options={**plain, **options})


def every_split(data):
    return [*data.clients, data.validation, *data.tests.values()]


def cases_of(split):
    return {name.rpartition("/")[0] for name in split.ids}


def test_cases_beside_the_folders_of_splits(tmp_path):
    names = ("train/A", "train/B", "train/C", "test/D", "E", "extra/F", "extra/G", "extra/H")
    for i, name in enumerate(names):
        write_case(tmp_path / name, i)
    with pytest.raises(UserError, match=r"cases outside of them, E, extra/F, extra/G and 1 more: put every case into"):
        open_set(tmp_path)


@pytest.mark.parametrize("share", ["test_share", "validation_share"])
def test_a_share_of_0_holds_no_case_of_a_site_out(tmp_path, share):
    for i in range(8):
        write_case(tmp_path / "AB"[i % 2] / f"case{i}", i)
    data = open_set(tmp_path, partition="attribute", **{share: 0})
    empty, filled = (data.tests[""], data.validation)[:: 1 if share == "test_share" else -1]
    assert len(empty) == 0
    assert len(filled) > 0


def test_what_macos_puts_beside_volumes_is_left_out_and_told(tmp_path):
    write_cases(tmp_path)
    plain, told = open_set(tmp_path), []
    for path in [*tmp_path.rglob("*")]:
        if path.is_file():
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    data = load(
        BRATS, root=tmp_path, clients=2, partition="iid", options={"modalities": "t1,flair", "size": 12},
        notice=told.append,
    )  # fmt: skip
    assert [split.ids for split in every_split(data)] == [split.ids for split in every_split(plain)]
    example = "case0/._case0_flair.nii.gz"
    assert told == [f"Files under {tmp_path} that are not read: 30 ._* of macOS, such as {example}."]


def test_slices_of_whole_cases(tmp_path):
    written = write_cases(tmp_path)
    data = open_set(tmp_path, clients=3)
    assert data.task.name == "segmentation"
    assert data.classes == ("background", "object")
    assert data.form.shape == (2, 12, 12)
    held = [cases_of(split) for split in every_split(data)]
    assert sum(len(names) for names in held) == len(set.union(*held)) == 10
    assert [len(names) for names in held[-2:]] == [1, 2]
    for split in every_split(data):
        assert len(split) == 3 * len(cases_of(split))
        assert len(split.cases.unique()) == len(cases_of(split))
        for name, image, labels in zip(split.ids, split.images, split.labels, strict=True):
            folder, _, z = name.rpartition("/")
            head, classes = written[int(folder[4:])]
            plane = classes[:, ::-1, int(z)].T > 0  # the front on top
            assert torch.equal(labels, square(torch.from_numpy(plane.astype(np.uint8)), 12, smooth=False).long())
            assert int(labels.sum()) == 9
            for i in range(2):
                values = head + 50 * (i + 1) * (classes > 0)
                expected = to_bytes(values.transpose(2, 1, 0)[:, ::-1])[int(z)]
                assert torch.equal(image[i], square(torch.from_numpy(expected.copy()), 12, smooth=True))
            assert image[1][labels > 0].float().mean() > image[1][(labels == 0) & (image[1] > 0)].float().mean() + 50


@pytest.mark.parametrize(("labels", "classes", "sizes"), [
    ("parts", ("necrotic core", "oedema", "enhancing tumour"), [4, 22, 1]), ("2|4", ("2", "4"), [22, 1]),
])  # fmt: skip
def test_parts_of_a_tumour(tmp_path, labels, classes, sizes):
    write_cases(tmp_path)
    data = open_set(tmp_path, labels=labels)
    assert data.classes == ("background", *classes)
    split = next(split for split in every_split(data) if len(split) == 3)
    assert torch.bincount(split.labels.flatten(), minlength=len(classes) + 1)[1:].tolist() == sizes


@pytest.mark.parametrize(
    ("slices", "stride", "count"), [("all", 1, 6), ("tissue", 1, 5), ("tissue", 2, 3), ("object", 2, 2)]
)
def test_which_slices(tmp_path, slices, stride, count):
    write_cases(tmp_path)
    data = open_set(tmp_path, slices=slices, every=stride)
    assert all(len(split) == count * len(cases_of(split)) for split in every_split(data))


def test_slices_are_axial_however_they_are_stored(tmp_path):
    head, _ = write_case(tmp_path / "a", 1)
    permuted = np.zeros((4, 4))
    permuted[0, 2], permuted[1, 0], permuted[2, 1], permuted[3, 3] = -1, 1, 1, 1  # axes y, z, x with x to the left
    permuted[0, 3] = SHAPE[0] - 1
    save(tmp_path / "other.nii", head.transpose(1, 2, 0)[:, :, ::-1], permuted)
    save(tmp_path / "same.nii", head[..., None])
    expected = head.transpose(2, 1, 0)[:, ::-1]
    assert np.array_equal(read_volume(tmp_path / "same.nii")[0], expected)
    assert np.array_equal(read_volume(tmp_path / "other.nii")[0], expected)


def test_intensities_are_those_of_the_volume():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((4, 20, 20)) < 0.5, 0, 300 + 40 * rng.standard_normal((4, 20, 20))).astype(np.float32)
    made = to_bytes(values)
    assert ((made == 0) == (values == 0)).all()
    assert made.max() == 255
    assert made[values > 0].min() == 1
    assert np.array_equal(made, to_bytes(3 * values))  # scanners differ in scale
    assert 100 < made[values > 0].mean() < 156
    assert not to_bytes(np.zeros((2, 3, 3), np.float32)).any()
    assert to_bytes(np.full((1, 2, 2), 7, np.float32)).max() <= 255


def test_sites_are_clients(tmp_path):
    for i in range(12):
        write_case(tmp_path / ("HGG" if i < 7 else "LGG") / f"case{i}", i)
    data = open_set(tmp_path, partition="attribute")
    assert [{name.split("/")[0] for name in client.ids} for client in data.clients] == [{"HGG"}, {"LGG"}]
    for held in (data.validation, data.tests[""]):
        assert sorted(name.split("/")[0] for name in cases_of(held)) == ["HGG", "LGG"]


def test_split_folders(tmp_path):
    for i in range(9):
        write_case(tmp_path / ("val" if i < 3 else "train") / f"case{i}", i, separator="-")
    data = open_set(tmp_path)
    assert cases_of(data.tests[""]) == {"val/case0", "val/case1", "val/case2"}
    assert all(name.startswith("train/") for split in (*data.clients, data.validation) for name in split.ids)


def test_a_clients_own_test_set_has_whole_cases(tmp_path):
    write_cases(tmp_path, 30)
    data = open_set(tmp_path)
    reduced = hold_out(data, held_out=None, share=0.3, seed=0)
    held = [cases_of(split) for split in (*reduced.clients, *reduced.client_tests)]
    assert sum(map(len, held)) == len(set.union(*held)) == sum(len(cases_of(split)) for split in data.clients)
    assert [len(test) for test in held[2:]] == [round(0.3 * len(cases_of(split))) for split in data.clients]


def test_public_cases_are_nobodys(tmp_path):
    write_cases(tmp_path)
    data = load(BRATS, root=tmp_path, clients=2, public_samples=4, options={"modalities": "t1", "size": 12})
    assert len(data.public) == 4
    assert not cases_of(data.public) & set.union(*(cases_of(client) for client in data.clients))


def test_dice_is_that_of_a_case(tmp_path):
    write_cases(tmp_path / "data", 8)
    settings = {"model": "unet-small", "width": 2, "rounds": 1, "local_epochs": 1, "clients": 2, "threads": 1}
    options = {"modalities": "t1,flair", "size": 16}
    config = RunConfig.make("fedavg", data=BRATS, data_root=str(tmp_path / "data"), data_options=options, **settings)
    assert {"dice", "hd95"} <= set(run(config, out=tmp_path / "run")["metrics"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: (c / "case3_flair.nii.gz").unlink(), r"case .*case3 has no file \*flair\.nii"),
        (lambda c: (c / "case3_seg.nii.gz").unlink(), r"case3 has no file \*seg\.nii"),
        (lambda c: (c / "case3_t1.nii.gz").write_bytes(b"no volume"), r"cannot read the volume .*case3_t1"),
        (lambda c: cut(c / "case3_seg.nii.gz"), r"cannot read the volume .*case3_seg"),
        (lambda c: header(c / "case3_t1.nii.gz", 70, "<h", 999), r"cannot read the volume .*case3_t1"),
        (lambda c: header(c / "case3_t1.nii.gz", 108, "<f", 1e30), r"cannot read the volume .*case3_t1"),
        (lambda c: header(c / "case3_t1.nii.gz", 280, "<f", np.nan), r"cannot read the volume .*case3_t1"),
        (lambda c: save(c / "case3_t1.nii.gz", np.ones((4, 4, 6), np.float32)), r"case3_t1\S+ has another shape than"),
        (lambda c: save(c / "case3_t1.nii.gz", np.ones((4, 4), np.float32)), "has 2 dimensions, expected three"),
        (lambda c: save(c / "case3_t1.nii.gz", np.full(SHAPE, np.nan, np.float32)), "are no finite numbers"),
        (lambda c: save(c / "case3_seg.nii.gz", np.full(SHAPE, 0.5, np.float32)), "are no class numbers"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, change, words):
    write_cases(tmp_path)
    change(tmp_path / "case3")
    with pytest.raises(UserError, match=words) as caught:
        open_set(tmp_path)
    assert "\n" not in str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:60])


def header(path, at, kind, value):
    """Put a value into the file's header: of the voxels' kind (70), their place (108) or the affine (280)."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(kind, raw, at, value)
    path.write_bytes(gzip.compress(raw))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modalities": "t1,t1"}, "different names"),
        ({"labels": "1|x"}, "labels must be whole, parts, or"),
        ({"labels": "7"}, "no slice under .* holds any class"),
        ({"modalities": "pet", "target": "roi"}, r"no folder with files \*roi"),
        ({"modalities": "pet"}, r"has no file \*pet"),
        ({"test_share": 0.9}, "too few"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, words):
    write_cases(tmp_path, 3)
    with pytest.raises(UserError, match=words):
        open_set(tmp_path, **options)


def test_without_nibabel(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(UserError, match="nibabel, which is not installed: pip install "):
        open_set(tmp_path)


def make_affine(shift=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0)):
    affine = np.diag([*scale, 1.0])
    affine[:3, 3] = shift
    return affine


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["t1", "flair", "seg"])
@pytest.mark.parametrize("slices", ["object", "tissue", "all"])
@pytest.mark.parametrize(
    "affine",
    [
        make_affine(scale=(-1, -1, 1)),
        make_affine((0, 0, 5)),
        make_affine((0.5, 0, 0)),
        make_affine(scale=(1, 1, 2)),
        make_affine(scale=(1.05, 1, 1)),
        np.array([[0.995, -0.0998, 0, 0], [0.0998, 0.995, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),  # turned by 5.7 degrees
    ],
    ids=["mirrored", "origin", "half a voxel", "thicker slices", "wider voxels", "turned"],
)
def test_a_file_at_another_place_than_its_mask_is_refused(tmp_path, name, slices, affine):
    write_cases(tmp_path)
    path = tmp_path / "case3" / f"case3_{name}.nii.gz"
    save(path, np.asarray(nibabel.load(path).dataobj), affine)
    file = "case3_(t1|flair)" if name == "seg" else "case3_seg"
    with pytest.raises(UserError, match=r"the affine of .* mm away from those of .*; resample") as caught:
        open_set(tmp_path, slices=slices)
    assert re.search(file, str(caught.value))
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rounded_affines_and_other_axes_are_one_place(tmp_path):
    """One mask is stored along other axes, as its affine says, and one has a rounded affine."""
    place = make_affine((-88.123456, 40.2, 17.7), (0.9765625, 0.9765625, 3.0))
    write_cases(tmp_path, affine=place)
    expected = open_set(tmp_path)
    path = tmp_path / "case3" / "case3_seg.nii.gz"
    stored = np.asarray(nibabel.load(path).dataobj)
    turned = place @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    save(path, stored[::-1], turned)
    rounded = tmp_path / "case4" / "case4_seg.nii.gz"
    save(rounded, np.asarray(nibabel.load(rounded).dataobj), place + 1e-3)
    for got, wanted in zip(every_split(open_set(tmp_path)), every_split(expected), strict=True):
        assert torch.equal(got.labels, wanted.labels)
        assert torch.equal(got.images, wanted.images)


# Files that are not what they are called


def nifti(path, shape=(4, 4, 3), number=0, kind="Nifti1Image", mask=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(1, 100, shape).astype(np.uint8 if mask else np.int16)
    nibabel.save(getattr(nibabel, kind)((values % 2).astype(np.uint8) if mask else values, np.eye(4)), path)
    return path


def cases(root, count=6, ending=".nii.gz"):
    for i in range(count):
        nifti(root / f"case{i}" / f"case{i}_t1{ending}", number=i)
        nifti(root / f"case{i}" / f"case{i}_seg{ending}", number=i, mask=True)
    return root


def cut_out(root):
    return open_set(root, size=8, modalities="t1")


@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_both_versions_of_nifti(tmp_path, kind, ending):
    path = nifti(tmp_path / f"a{ending}", kind=kind)
    expected = np.random.default_rng(0).integers(1, 100, (4, 4, 3)).astype(np.float32)
    assert np.array_equal(read_volume(path)[0], expected.transpose(2, 1, 0)[:, ::-1])
    with pytest.raises(UserError, match=r"has 4x4x3 voxels, more than 47: .*--max-image-pixels 48"):
        read_volume(path, 47)


@pytest.mark.sampled
@pytest.mark.parametrize(("harm", "words"), [
    (lambda made: made[:-8] + bytes([made[-8] ^ 1]) + made[-7:], "CRC check failed"),
    (lambda made: made[:-1] + bytes([made[-1] ^ 1]), "Incorrect length of data"),
    (lambda made: made[:-8], "ended before the end"), (lambda made: made[:-3], "ended before the end"),
    (lambda made: made + b"more", "Not a gzipped file"),
    (lambda made: gzip.compress(gzip.decompress(made) + b"\0"), "more than the|stand behind its last voxel"),
    (lambda made: made + gzip.compress(bytes(1_000_000)), "more than the"),
    (lambda made: gzip.compress(gzip.decompress(made)[:-1]), "Expected"),
    (lambda made: gzip.compress(gzip.decompress(made)[:100]), "wrong size"),
    (lambda made: gzip.compress(b""), "wrong size"),
])  # fmt: skip
@pytest.mark.parametrize("modality", ["t1", "seg"])
def test_a_compressed_volume_is_whole(tmp_path, harm, words, modality):
    cases(tmp_path)
    path = tmp_path / "case0" / f"case0_{modality}.nii.gz"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=f"case0_{modality}.nii.gz .*({words})"):
        cut_out(tmp_path)


@pytest.mark.parametrize(("sides", "words"), [
    ((3, 4, 0, 3), "dimension of 0"), ((3, 4, 4, -1), "dimension of -1"), ((0, 4, 4, 3), "dimension"),
    ((3, 32767, 32767, 32767), "has 32767x32767x32767 voxels, more than 50,000,000"),
    ((9, 4, 4, 3), "voxels, more than 50,000,000"),
    ((2, 4, 12, 1), "has 2 dimensions, expected three"),
])  # fmt: skip
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_volumes_of_sizes_that_are_none(tmp_path, sides, words, ending):
    cases(tmp_path, ending=ending)
    path = tmp_path / "case0" / f"case0_seg{ending}"
    raw = path.read_bytes() if ending == ".nii" else gzip.decompress(path.read_bytes())
    raw = raw[:40] + struct.pack("<4h", *sides) + raw[48:]
    path.write_bytes(raw if ending == ".nii" else gzip.compress(raw))
    with pytest.raises(UserError, match=words):
        cut_out(tmp_path)


def test_folders_of_cases_that_loop(tmp_path):
    """Such folders once made 246 cases of 6, with the slices of one patient in training and test."""
    cases(tmp_path)
    cut_out(tmp_path)
    (tmp_path / "b").symlink_to(".")
    assert "are one folder" in in_time(lambda: cut_out(tmp_path))
    (tmp_path / "b").unlink()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "again").symlink_to("../case3")
    assert "are one folder" in in_time(lambda: cut_out(tmp_path))
    (tmp_path / "site" / "again").unlink()
    (tmp_path / "site" / "again").symlink_to("..")
    assert "are one folder" in in_time(lambda: cut_out(tmp_path))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_volume_of_two_cases(tmp_path, link):
    cases(tmp_path)
    mask = tmp_path / "case1" / "case1_seg.nii.gz"
    mask.unlink()
    link(tmp_path / "case0" / "case0_seg.nii.gz", mask)  # equal masks may be one file
    cut_out(tmp_path)
    own = tmp_path / "case1" / "case1_t1.nii.gz"
    own.unlink()
    link(tmp_path / "case0" / "case0_t1.nii.gz", own)
    with pytest.raises(UserError, match=r"case0 and .*case1 have one volume"):
        cut_out(tmp_path)
