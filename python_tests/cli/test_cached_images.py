"""Commands on finished runs with a cache of decoded images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fedkern
from fedkern.data.images import image_cache
from fedkern.data.images.image_cache import recall_cache
from fedkern.engine.run import run
from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from python_tests.image_files import count_gathered, two_brightnesses, watch_decoded

IMAGES, SIDE = 60, 8
SMALL = {"partition": "iid", "clients": 2, "rounds": 1, "local_steps": 1, "threads": 1, "workers": "1", "model": "mlp",
         "grad_cam": 0}  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """Return sixty images of two classes, and a cache folder of the user."""
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "home"))
    return two_brightnesses(tmp_path / "root", IMAGES)


@pytest.fixture
def reads(monkeypatch):
    return watch_decoded(monkeypatch)


def play(cache=None, **data):
    """Play a run into the folder ``run``, without pictures."""
    folder = {"data": "folder", "data_root": str(Path("root").absolute()), "data_options": {"size": SIDE}}
    where = None if cache is None else str(Path(cache).absolute())
    run(RunConfig.make("fedavg", cache=where, **(data or folder), **SMALL), out="run")


def figures(result, *words):
    text, _ = result("evaluate", "run", *words, "--json")
    return json.loads(text)["metrics"]


def summary(tmp_path):
    return json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]


@pytest.mark.usefixtures("undrawn")
def test_evaluate_and_extend_use_the_cache_of_the_run_and_do_not_make_it_again(result, reads, tmp_path, monkeypatch):
    play("decoded")
    assert len(reads) == IMAGES
    reads.clear()
    largest = count_gathered(monkeypatch)
    monkeypatch.setattr("fedkern.engine.evaluate.CPU_BATCH", 4)
    found = figures(result)
    assert found["accuracy"] == summary(tmp_path)["accuracy"]
    assert found["loss"] == pytest.approx(summary(tmp_path)["loss"])
    assert reads == []
    assert largest
    assert max(largest) <= 5
    _, said = result("evaluate", "run")
    assert f"{IMAGES} decoded images are read from {tmp_path / 'decoded'}" in said
    # Nothing of it stands in the run folder, which may go to other people.
    shutil.copytree("run", "copy")
    assert recall_cache("copy") is None
    assert not any(str(tmp_path / "decoded") in path.read_text() for path in (tmp_path / "run").glob("*.toml"))
    reads.clear()
    result("extend", "run", "--rounds", "2", "--cache", "decoded", "--quiet")
    assert reads == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 2
    shutil.rmtree("decoded")
    assert figures(result)["accuracy"] == summary(tmp_path)["accuracy"]
    assert len(reads) == IMAGES
    assert not (tmp_path / "decoded").exists()


def test_a_new_run_in_the_place_of_another_has_its_own_cache(tmp_path):
    play("decoded")
    assert recall_cache("run") == recall_cache(tmp_path / "run") == str(tmp_path / "decoded")
    shutil.rmtree("run")
    play()
    assert recall_cache("run") is None


@pytest.mark.parametrize("own", [True, False], ids=["own", "other"])
def test_evaluate_fills_a_cache(result, reads, tmp_path, own):
    play()
    options = [] if own else ["--data", "folder", "--data-root", "root", "--data-option", f"size={SIDE}"]
    expected = figures(result, *options)
    reads.clear()
    for count in (IMAGES, 0):
        assert figures(result, *options, "--cache", "mine") == expected
        assert len(reads) == count
        reads.clear()
    assert sorted(path.suffix for path in (tmp_path / "mine").iterdir()) == [".images", ".lock", ".sizes"]
    assert "60 decoded images are read from" in result("evaluate", "run", *options, "--cache", "mine")[1]
    assert recall_cache("run") is None  # a note is made by a run alone


def test_from_python(result, reads, tmp_path):
    settings = {"data_root": "root", "data_options": {"size": SIDE}, "progress": False, "pictures": False, **SMALL}
    run = fedkern.simulate("fedavg", data="folder", cache=tmp_path / "own", out="run", **settings)
    reads.clear()
    expected = run.evaluate()
    assert run.evaluate(cache=tmp_path / "own") == expected
    run.extend(2, cache="own", progress=False, pictures=False, workers=1)
    assert reads == []
    assert run.evaluate(cache="other").keys() == expected.keys()
    assert len(reads) == IMAGES
    pictures = np.resize(np.arange(9, dtype=np.uint8), (4, SIDE, SIDE, 3)), np.array([0, 1, 0, 1])
    memory = fedkern.FederatedData.from_arrays([pictures], test=pictures, classes=["a", "b"])
    with pytest.raises(UserError, match="these data are in memory: leave it out"):
        run.evaluate(memory, cache="other")


@pytest.mark.exhaustive
def test_tasks_on_image_text_runs_take_a_cache(result, reads, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pairs").mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "pairs" / f"{number}.png")
        (tmp_path / "pairs" / f"{number}.txt").write_text(f"picture of the number {number}")
    command = ["fedavg", "--data", "pairs", "--data-root", "pairs", "--data-option", "size=16", "--partition", "iid",
               "--clients", "2", "--rounds", "1", "--local-steps", "1", "--batch-size", "4", "--width", "8",
               "--threads", "1", "--workers", "1", "--quiet", "--out", "run"]  # fmt: skip
    result(*command, "--cache", "decoded")
    reads.clear()
    expected, said = result("evaluate", "run", "--task", "retrieval")
    assert reads == []
    assert "decoded images are read from" in said
    assert result("evaluate", "run", "--task", "retrieval", "--cache", "mine")[0] == expected
    assert len(reads) == 40
    assert "decoding 40 images" in result("evaluate", "run", "--task", "retrieval", "--cache", "other")[1]
    assert result("evaluate", "run", "--task", "retrieval", "--cache", "third", "--json")[1] == ""


def test_large_data_are_in_a_file_and_mistakes_are_one_sentence(result, fails, tmp_path, monkeypatch):
    play()
    expected = figures(result)
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "MEMORY_BYTES", 0)
        assert figures(result) == expected
        assert "decoding 60 images (0.0 MB) into a temporary file" in result("evaluate", "run")[1]
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert "name another folder with --cache DIR" in fails("evaluate", "run", "--cache", "file")
    assert "--cache" in fails("evaluate", "run", "--cache", "")
    assert "--cache" in fails("extend", "run", "--rounds", "2", "--cache", "")
    assert "--cache" in fails("evaluate", "run", "--task", "retrieval", "--cache", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_data_without_image_files_say_that_the_cache_is_not_used(result, tmp_path):
    play(data="digits", train_samples=100)
    assert "--cache is not used" in result("evaluate", "run", "--cache", "mine")[1]
    assert not (tmp_path / "mine").exists()
