"""Tests of drawings by artist, and of persons with a smartwatch, on tiny files and on the real ones."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import FederatedData, load
from fedkern.data.dataset_registry import open_code
from fedkern.data.sharing.holdout import hold_out
from fedkern.errors import UserError
from python_tests.papers_data import FOLDER

SVG = """<svg xmlns="s" xmlns:rdf="r" xmlns:cc="c" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><cc:Work>
<dc:title>{}</dc:title><rdf:li>Round_Thing</rdf:li><rdf:li>hash(0x1)</rdf:li>
<dc:creator><cc:Agent><dc:title>{}</dc:title></cc:Agent></dc:creator></cc:Work></metadata></svg>"""
ARTISTS = {"Ann Lee": 12, "Bo [bo@x.org]": 10, "Cy": 5, "Lee Ann Senior": 3, "": 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write drawings of 8 x 4 pixels whose left half is transparent, and photographs of one colour each."""
    for artist, count in ARTISTS.items():
        for i in range(count):
            name = f"{('animals', 'food')[i % 2]}/{artist[:5]}{i}"
            for kind in ("svg", "png"):
                (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "svg" / f"{name}.svg").write_text(SVG.format(f"Thing_{min(i, 8)}", artist))
            picture = Image.new("RGBA", (8, 4), (200, 10, 5 * i, 255))
            picture.paste((0, 0, 0, 0), (0, 0, 4, 4))
            picture.save(tmp_path / "png" / f"{name}.png")
    (tmp_path / "png" / "animals" / "Cy0.png").unlink()
    (tmp_path / "png" / "animals" / "Cy0.png").symlink_to("Cy2.png")
    (tmp_path / "grounds").mkdir()
    for i in range(3):
        Image.new("RGB", (96, 64), (0, 100 + 50 * i, 0)).save(tmp_path / "grounds" / f"{i}.png")
    return tmp_path


def open_set(name: str, root: Path, clients: int, **options: object) -> FederatedData:
    given = {"size": 16, "series": 3, "rendered": str(root / "kept"), **options}
    return load(open_code(f"{FOLDER / 'openclipart.py'}:{name}"), root=root, clients=clients, options=given)


def test_artists_are_clients_and_other_artists_are_unseen(registries: None, root: Path) -> None:
    data = open_set("openclipart", root, 2, own_test=3)
    assert data.client_names == ("Bo", "Ann Lee")  # a name of four drawings is that of a set
    assert [len(test) for test in data.client_tests] == [3, 3]
    assert sorted(data.tests["unseen"].texts) == [f"Thing {i}: round thing" for i in (1, 2, 3, 4)]
    assert torch.equal(data.tests["unseen"].images[0, :, 8, 4], torch.tensor([255, 255, 255]))
    assert data.tests["unseen"].images[0, 0, 8, 12] == 200
    (kept,) = (root / "kept").iterdir()
    kept.write_bytes(b"damaged")
    classes = open_set("openclipart_classes", root, 2, own_test=3)
    assert torch.equal(classes.clients[1].images, data.clients[1].images)
    assert classes.classes == ("animals", "food")


def test_grounds_are_tied_to_class_and_client(registries: None, root: Path) -> None:
    data = open_set("openclipart_scenes", root, 2, artists=2, least=1, correlation=1.0)
    for split in data.clients:
        assert torch.equal(split.masks, (split.images[:, 0] == 200))
        greens = {(int(label), int(image[1, 0, 0])) for image, label in zip(split.images, split.labels, strict=True)}
        assert len(greens) == 2 == len({green for _, green in greens})
    with pytest.raises(UserError, match="2 classes need as many photographs"):
        open_set("openclipart_scenes", root, 2, artists=2, least=1, grounds=str(root / "none"))


def test_folders_and_clients_that_do_not_fit(registries: None, root: Path) -> None:
    with pytest.raises(UserError, match="3 clients need as many artists with 7 drawings, and there are 2"):
        open_set("openclipart", root, 3, own_test=3)
    with pytest.raises(UserError, match="has no folders svg and png"):
        open_set("openclipart", root / "svg", 2)
    (root / "png" / "food" / "Cy1.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"cannot read the picture .*Cy1\.png"):
        open_set("openclipart", root, 2)


def test_windows_of_persons(registries: None, tmp_path: Path) -> None:
    file, name = tmp_path / "watch.npy", open_code(f"{FOLDER / 'watch.py'}:watch")
    recordings = {"X": [np.full((600, 6), float(i)) for i in range(4)], "y": np.array([0, 1, 0, 1]),
                  "subject": np.array([1, 1, 2, 2])}  # fmt: skip
    np.save(file, np.array(recordings, dtype=object))
    data = load(name, root=file)
    assert data.client_names == ("1", "2")
    assert data.client_sizes == (10, 10)
    assert [len(test) for test in data.client_tests] == [6, 6]
    assert len(data.validation) == 4
    assert len(hold_out(data, held_out="2", share=0, seed=0).validation) == 2
    np.save(file, np.array({"X": os.getcwd}, dtype=object))
    with pytest.raises(UserError, match=r"posix\.getcwd is no part of an array"):
        load(name, root=file)


@pytest.mark.data
def test_the_real_drawings(registries: None) -> None:
    root = Path(os.environ.get("FEDKERN_DATA_ROOT", "/nowhere")) / "openclipart"
    if not root.is_dir():
        pytest.skip("FEDKERN_DATA_ROOT names no folder with openclipart")
    data = load(open_code(f"{FOLDER / 'openclipart.py'}:openclipart"), root=root, options={"size": 16})
    assert len(data.classes) == 22
    assert data.client_names[0] == "Gerald G."
    assert len(data.tests["unseen"]) > 1000
