"""Tests of a run's data: a private run has no figure on validation sets that are drawn from the clients' images."""

import pytest
from PIL import Image

from fedkern.data import FederatedData, load
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import declared_data, kept_data

PRIVATE = {
    "client-level": ("fedavg", {"dp_clip": 0.5, "dp_noise": 2.0}),
    "scaffold": ("scaffold", {"dp_clip": 0.5, "dp_noise": 2.0}),
    "fediod": ("fediod", {"options": {"epsilon": 5.0}}),
    "dp-sgd": ("fediod", {"options": {"epsilon": 5.0, "teacher_dp": True}}),
    "asked for": ("fedavg", {"records": "private"}),
}
HEADERS = {"csv": "path,label", "pairs": "image,text,label", "segmentation": "image,mask"}


def write_list(name, root, splits=("",)):
    lines = [f"{HEADERS[name]},client,split"]
    for i in range(40):
        picture = Image.new("L", (8, 8), i)
        picture.save(root / f"{i}.png")
        picture.paste(1, (0, 0, 8, 8))
        picture.paste(0, (0, 0, 4, 4))
        picture.save(root / f"m{i}.png")
        row = {
            "path": f"{i}.png", "image": f"{i}.png", "mask": f"m{i}.png", "text": f"text {i}",
            "label": "ab"[i // 2 % 2],
        }  # fmt: skip
        row |= {"client": "AB"[i % 2], "split": splits[i % len(splits)]}
        lines.append(",".join(row[column] for column in lines[0].split(",")))
    (root / "list.csv").write_text("\n".join(lines))
    return load(name, root=root, options={"size": 8, "colour": "grey"})


def folders(root):
    for k, site in enumerate("AB"):
        for label in "ab":
            for i in range(8):
                (root / site / label).mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 100 * k + 50 * (label == "a") + i).save(root / site / label / f"{i}.png")
    return load("folder", root=root, options={"size": 8, "colour": "grey"})


def keep(kind, data):
    method, settings = PRIVATE[kind]
    return kept_data(RunConfig.make(method, data="csv", clients=2, **settings), data)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", PRIVATE)
@pytest.mark.parametrize("name", [*HEADERS, "folder"])
def test_a_drawn_validation_set_is_withheld(tmp_path, kind, name):
    data = folders(tmp_path) if name == "folder" else write_list(name, tmp_path)
    assert len(data.validation)
    found = keep(kind, data)
    assert len(found.validation) == 0
    assert (found.task, found.form.shape) == (data.task, data.form.shape)
    assert [split.ids for split in found.clients] == [split.ids for split in data.clients]
    assert len(kept_data(RunConfig.make("fedavg", data="csv", clients=2), data).validation)


@pytest.mark.parametrize("kind", PRIVATE)
def test_a_validation_set_of_its_own_stays(tmp_path, kind):
    """A set that a column names, the caller gives or a published data set has counts as public, like test sets."""
    named = write_list("csv", tmp_path, ("train", "train", "train", "train", "val", "val", "test", "test"))
    train = named.clients[0]
    pair = train.images, train.labels
    given = FederatedData.from_arrays([pair, pair], pair, validation=pair)
    for data in (named, given, load("digits", clients=2)):
        assert len(keep(kind, data).validation) == len(data.validation) > 0


@pytest.mark.parametrize("noted", ["private", "all"])
def test_no_file_of_a_private_run_tells_of_it(tmp_path, noted):
    data = write_list("csv", tmp_path)
    config = RunConfig.make(
        "fedavg", data="csv", data_root=str(tmp_path), data_options={"size": 8, "colour": "grey"}, rounds=2, threads=1,
        model="cnn", width=2, local_epochs=1, batch_size=4, workers=1, dp_clip=0.5, dp_noise=0.0, records=noted,
        clients=2, partition="attribute", grad_cam=0,
    )  # fmt: skip
    out = tmp_path / "run"
    run(config, out=out)
    told = [name for record in read_metrics(out) for name in record if name.startswith("validation_")]
    told += [name for name in read_summary(out)["metrics"] if name.startswith("validation_")]
    assert bool(told) == (noted == "all")
    texts = [path.read_text() for path in out.iterdir() if path.suffix in (".json", ".jsonl", ".csv")]
    assert any('"validation_' in text for text in texts) == (noted == "all")
    assert len(data.validation)


def test_data_of_which_only_the_sizes_are_known(tmp_path):
    data = folders(tmp_path)
    found = declared_data(data, [5, 7])
    assert found.client_sizes == (5, 7)
    assert found.task == data.task
    assert list(found.statistics.sizes) == [5, 7]
    assert sum(split.images.numel() for split in found.clients) < 100
