"""Tests of data sets that users register as functions."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import (
    DATASETS,
    READING,
    FederatedData,
    Listing,
    Option,
    PartitionStatistics,
    Source,
    Split,
    load,
    memory_pool,
    register_data,
    to_source,
)
from fedkern.data.dataset_registry import open_code
from fedkern.data.forms import ImageForm
from fedkern.data.images import image_cache
from fedkern.errors import UserError
from fedkern.tasks import CLASSIFICATION, TASKS

N = 40
SIDE = Option(8, "side", low=4, high=64)
GREY = Option("grey", "channels", choices=("rgb", "grey"))

FORM = ImageForm((1, 8, 8), (0.5,), (0.5,))


def pools(count=N, classes=2, channels=1, dtype=torch.uint8, shift=0):
    labels = torch.arange(count) % classes + shift
    images = (labels * 100)[:, None, None, None].expand(count, channels, 8, 8).contiguous().to(dtype)
    return {
        "train": memory_pool(images, labels, "train"),
        "validation": memory_pool(images[:8], labels[:8], "validation"),
        "tests": {"": memory_pool(images[:16], labels[:16], "test")},
    }


def source(**changed):
    made = Source(classes=("a", "b"), **pools(), mean=(0.5,), std=(0.5,), augment="none")
    return dataclasses.replace(made, **changed)


def split(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    return Split(torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator), labels)


def make_clients(clients=3, **changed):
    splits = tuple(split(10 + k, k) for k in range(clients))
    made = FederatedData(
        name="any", classes=("a", "b"), clients=splits, validation=split(8, 90), tests={"": split(12, 91)},
        form=FORM,
        statistics=PartitionStatistics.of([split.labels.numpy() for split in splits], ("a", "b"), "own"),
    )  # fmt: skip
    return dataclasses.replace(made, **changed)


@pytest.fixture
def register(registries):
    """Register functions during a test."""
    return register_data


def register_own(function, **settings):
    """Register a function without a description as the data set "own"."""
    function.__doc__ = "A source."
    register_data("own", **settings)(function)


def test_a_source_is_shared_out_like_fedkerns_own(register):
    seen = {}

    def own(root=None, *, noise=0.5, name="x", size=SIDE):
        seen.update(root=root, noise=noise, name=name, size=size)
        return source()

    own.__doc__ = "A source of a test."
    register("own", clients=4, partition="iid")(own)
    data = load("own", root="somewhere", options={"noise": "0.25", "size": "16"})
    assert seen == {"root": "somewhere", "noise": 0.25, "name": "x", "size": 16}
    assert data.name == "own"
    assert data.client_sizes == (10, 10, 10, 10)
    assert data.statistics.partition == "iid"
    again = load("own", root="somewhere", options={"noise": "0.25", "size": "16"})
    for mine, theirs in zip(data.clients, again.clients, strict=True):
        assert torch.equal(mine.images, theirs.images)
    assert len(load("own", clients=2, train_samples=20, options={"test_samples": 5}).tests[""]) == 5
    assert DATASETS["own"].description == "A source of a test."


@pytest.mark.parametrize(("options", "message"), [
    ({"nois": 1}, 'has no option "nois".*Did you mean "noise"'),
    ({"noise": "much"}, 'option noise of data set "own" must be a number'),
    ({"size": 100}, r"must be in \[4, 64\]"),
])  # fmt: skip
def test_options_are_checked(register, options, message):
    register_own(lambda noise=0.5, size=SIDE: source())
    with pytest.raises(UserError, match=message):
        load("own", options=options)


def test_federated_data_keep_their_clients(register):
    register_own(lambda: make_clients())
    data = load("own", options={"test_samples": 6, "validation_samples": 4, "backdoor_clients": 1})
    assert (data.name, data.client_sizes, len(data.validation)) == ("own", (10, 11, 12), 4)
    assert set(data.tests) == {"", "backdoor"}
    assert len(data.tests[""]) == 6
    assert load("own", clients=3).client_sizes == (10, 11, 12)
    for given, message in (
        ({"clients": 7}, "has 3 clients, not 7"),
        ({"partition": "classes:1"}, "leave --partition out"),
        ({"train_samples": 10}, "leave --train-samples out"),
        ({"public_samples": 10}, "leave --public-samples out"),
    ):
        with pytest.raises(UserError, match=message):
            load("own", **given)


def test_a_function_may_take_clients_partition_and_seed(register):
    @register("own", clients=2, partition="iid")
    def own(clients, partition, seed):
        """Return as many clients as asked for."""
        assert (partition, seed) == ("classes:1", 5)
        return make_clients(clients)

    assert len(load("own", clients=5, partition="classes:1", seed=5).clients) == 5


def test_a_function_that_makes_another_number_of_clients_is_told(register):
    register_own(lambda clients: make_clients(3), clients=2, partition="iid")
    with pytest.raises(UserError, match="has 3 clients, not 2"):
        load("own")


WRONG = {
    "nothing": (lambda: None, "returns NoneType, expected fedkern.data.Source, FederatedData, or a pair of"),
    "exception": (lambda: 1 // 0, r"fails \(ZeroDivisionError"),
    "user error": (lambda: (_ for _ in ()).throw(UserError("the file is not there")), "^the file is not there$"),
    "task": (lambda: make_clients(validation=Split(torch.zeros(2, 1, 8, 8).byte(), torch.zeros(2, 8, 8).long())),
             "returns data for segmentation, but is registered for classification"),
    "label": (lambda: source(classes=("a",)), "returns the label 1 in train, where the classes are 0 to 0"),
    "negative label": (lambda: source(**pools(shift=-1)), "returns the label -1 in train"),
    "label of a client": (lambda: make_clients(classes=("a",)), "returns the label 1 in client 0"),
    "images": (lambda: source(**pools(dtype=torch.float32)), "cannot be read .*images: expected uint8"),
    "channels": (lambda: source(**pools(channels=3)), "images of 3 channels with 1 means"),
    "channels of clients": (lambda: make_clients(form=dataclasses.replace(FORM, mean=(0.5, 0.5))),
                            "images of 1 channels with 2 means and 1 standard"),
    "no test": (lambda: source(tests={}), "returns no test set"),
    "no client": (lambda: dataclasses.replace(make_clients(), clients=()), "no client"),
    "no sample": (lambda: source(train=memory_pool(torch.zeros(0, 1, 8, 8).byte(), torch.zeros(0).long(), "x")),
                  "returns no training sample"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_a_function_gets_wrong_is_one_sentence(register, make, message, **settings):
    register_own(lambda: make(), **settings)
    with pytest.raises(UserError, match=message) as told:
        load("own")
    assert "\n" not in str(told.value)


def test_a_registered_task_is_that_of_labels_which_can_have_it(register, monkeypatch):
    task = type("Other", (type(CLASSIFICATION),), {"name": "other"})()
    monkeypatch.setitem(TASKS, "other", task)

    register_own(lambda: source(), clients=2, task="other")
    data = load("own")
    assert all(split.task is task for split in (*data.clients, data.validation, data.tests[""]))


def label_sets(count, classes=2):
    return torch.stack([torch.arange(count) // (k + 1) % 2 for k in range(classes)], 1).to(torch.uint8)


def several(count=N, classes=2, **changed):
    """Return a source of images with several labels."""
    images, labels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8), label_sets(count, classes)
    parts = {name: memory_pool(images, labels, name) for name in ("train", "validation", "test")}
    all_parts = {"train": parts["train"], "validation": parts["validation"], "tests": {"": parts["test"]}}
    return source(**{**all_parts, **changed})


def test_several_labels_an_image(register):
    register_own(lambda: several(), clients=4, task="multilabel")
    data = load("own")
    assert (data.task.name, data.statistics.partition, data.client_sizes) == ("multilabel", "iid", (10, 10, 10, 10))
    assert data.tests[""].labels.tolist() == label_sets(N).tolist()
    with pytest.raises(UserError, match="has several labels an image and no single class"):
        load("own", partition="dirichlet:0.5")

    @register("mine", task="multilabel")
    def mine():
        """Return arrays."""
        own = torch.zeros(6, 8, 8, dtype=torch.uint8), label_sets(6)
        return FederatedData.from_arrays({"north": own, "south": own}, own, classes=("a", "b"))

    data = load("mine")
    assert (data.task.name, data.client_names, data.classes) == ("multilabel", ("north", "south"), ("a", "b"))
    with pytest.raises(UserError, match="option cue_clients is for classification"):
        load("mine", options={"cue_clients": 1})


WRONG_SETS = {
    "task": (source, "returns data for classification, but is registered for multilabel"),
    "names": (lambda: several(classes=3), r"labels \[40, 3\] in train, expected a column for each of the 2 labels"),
    "value": (lambda: several(validation=memory_pool(torch.zeros(3, 1, 8, 8).byte(), 2 * label_sets(3), "x")),
              "returns the label 2 in validation, expected 0 and 1"),
    "dtype": (lambda: several(validation=memory_pool(torch.zeros(3, 1, 8, 8).byte(), label_sets(3).long(), "x")),
              "returns labels of torch.int64 in validation, expected uint8"),
    "single": (lambda: several(validation=memory_pool(torch.zeros(3, 1, 8, 8).byte(), label_sets(3)[:, 0], "x")),
               "returns data for classification, but is registered for multilabel"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG_SETS.values(), ids=WRONG_SETS)
def test_wrong_sets_of_labels_are_one_sentence(register, make, message):
    test_what_a_function_gets_wrong_is_one_sentence(register, make, message, task="multilabel")


def test_registering_wrongly(register):
    def plain():
        """Return a source."""

    with pytest.raises(ValueError, match='data set "digits" is already registered'):
        register("digits")(plain)
    with pytest.raises(UserError, match='unknown partition "iidd"'):
        register("own", partition="iidd")
    with pytest.raises(ValueError, match="task: expected one of"):
        register("own", task="regression")
    with pytest.raises(ValueError, match="clients: expected at least 1"):
        register("own", clients=0)
    with pytest.raises(TypeError, match="test_samples is an option of every data set"):

        @register("own")
        def common(test_samples=3):
            """Return a source."""

    with pytest.raises(TypeError, match="expected a default for the option size"):

        @register("own")
        def open_ended(size):
            """Return a source."""

    for default in (True, None, (1, 2)):
        with pytest.raises(TypeError, match="expected a text, a number or an Option"):

            @register("own")
            def odd(size=default):
                """Return a source."""

    with pytest.raises(TypeError, match="expected options as named parameters"):

        @register("own")
        def anything(**options):
            """Return a source."""

    assert "own" not in DATASETS
    register("own")(plain)
    register("own")(plain)  # a notebook's cell, run again


DECLARED = """
import fedkern
from fedkern.data import FederatedData, Reading

@fedkern.register_data("shapes", clients=3, partition="iid", task="segmentation", prompts="{class}")
def shapes(size=8):
    \"\"\"Squares and their masks.\"\"\"
    import numpy as np
    images = np.random.default_rng(0).integers(0, 256, (12, size, size), dtype=np.uint8)
    pair = images, (images > 128).astype(np.int64)
    return FederatedData.from_arrays([pair] * 3, pair)

def plain(size=8):
    return shapes(size)
"""


def test_a_named_function_keeps_what_its_decorator_says(registries, tmp_path):
    (tmp_path / "mine.py").write_text(DECLARED)
    for _ in range(2):  # a file is run once for each content
        name = open_code(f"{tmp_path}/mine.py:shapes")
        info = DATASETS[name]
        assert (info.clients, info.partition, info.task.name, info.prompts) == (3, "iid", "segmentation", "{class}")
        data = load(name, options={"size": 16})
        assert (data.name, data.task.name, len(data.clients)) == (name, "segmentation", 3)
        del DATASETS[name], DATASETS["shapes"]
        DATASETS["shapes"] = info
    plain = DATASETS[open_code(f"{tmp_path}/mine.py:plain")]
    assert (plain.clients, plain.task.name) == (10, "classification")


def test_image_files_in_another_layout(registries, tmp_path):
    """The function of docs/plugins.md decodes when needed, and has the options of image files, sites and copies."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "plugins.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def wards" in block)
    (tmp_path / "mine.py").write_text(code)
    for i in range(40):
        pixels = bytes((7 * i + k) % 256 for k in range(64))
        Image.frombytes("L", (8, 8), pixels).save(tmp_path / f"{'AB'[i % 2]}_{'xy'[i // 2 % 2]}_{i}.png")
    name = open_code(f"{tmp_path}/mine.py:wards")
    notices = []
    data = load(name, root=tmp_path, options={"size": 16, "colour": "grey", "test_share": 0.4}, notice=notices.append)
    assert (data.classes, data.client_names, data.form.shape) == (("x", "y"), ("A", "B"), (1, 16, 16))
    assert len(data.tests[""]) == 16
    assert {split.ids[0][0] for split in data.clients} == {"A", "B"}
    assert set(READING) <= set(DATASETS[name].options)
    assert load(name, root=tmp_path, partition="iid", clients=5, public_samples=4).public is not None
    (tmp_path / "A_y_99.png").write_bytes((tmp_path / "A_x_0.png").read_bytes())
    with pytest.raises(UserError, match=r"are the same image with .*leave one of the two out"):
        load(name, root=tmp_path, identify=True)
    with pytest.raises(UserError, match="window"):
        load(name, root=tmp_path, options={"window": "nonsense"})


def test_an_image_file_is_decoded_when_it_is_needed(registries, tmp_path, monkeypatch):
    made = []
    for i in range(40):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:02}.png")

    @register_data("files", partition="iid", clients=2)
    def files(root, reading, colour=GREY):
        """Return files of a test."""
        paths = sorted(root.glob("*.png"))
        names, labels = tuple(path.name for path in paths), np.arange(len(paths)) % 2
        assert (reading.colour, reading.size) == (colour, 64)
        made.append(to_source("files", Listing(paths, names, labels, [""] * 40, [""] * 40), ("a", "b"), reading))
        return made[0]

    data = load("files", root=tmp_path, train_samples=8, options={"test_samples": 4, "validation_samples": 2})
    assert data.form.shape == (1, 64, 64)
    with monkeypatch.context() as small:  # images of some rows in a file, and then all from the same source
        small.setattr(image_cache, "MEMORY_BYTES", 0)
        load("files", root=tmp_path, train_samples=8)
    for split in load("files", root=tmp_path).clients:
        assert [f"{int(image[0, 0, 0]):02}.png" for image in split.images] == [*split.ids]
    used = {name for split in (*data.clients, data.validation, *data.tests.values()) for name in split.ids}
    (tmp_path / min(data.image_ids - used)).write_bytes((tmp_path / min(used)).read_bytes()[:-30])
    load("files", root=tmp_path, train_samples=8, options={"test_samples": 4, "validation_samples": 2})
