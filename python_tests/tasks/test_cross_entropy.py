"""Tests of tasks as objects, of names of figures and test sets, and of means over pixels on a pretended GPU."""

import ast
import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fedkern
from fedkern.data import IGNORE
from fedkern.errors import UserError
from fedkern.methods import METHODS, Batch, FedAvg, Method
from fedkern.tasks import CLASSIFICATION, MULTILABEL, RETRIEVAL, SEGMENTATION, TASKS, cross_entropy, figure_names
from fedkern.tasks.user_tasks import OwnTask
from python_tests import own_data

CLASSES = 5
WEIGHT = torch.tensor([0.1, 2.0, 1.0, 0.0, 7.0])


@pytest.fixture
def fake_gpu(monkeypatch):
    """Pretend that every tensor of pixels is on a GPU."""
    for where in ("cross_entropy", "segmentation"):
        monkeypatch.setattr(f"fedkern.tasks.{where}.added_in_any_order", lambda logits: logits.dim() > 2)


class Reductions(TorchDispatchMode):
    """Mode that records the reductions inside the kernels of losses."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "nll_loss" in func.__name__ and "backward" not in func.__name__:
            self.found.append(args[3])
        return func(*args, **(kwargs or {}))


def pixels(*shape, ignored=IGNORE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], CLASSES, *shape[1:], generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, shape, generator=generator)
    labels.flatten()[::3] = ignored
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("ignored", [IGNORE, 255, 1])
@pytest.mark.parametrize("shape", [(2, 7, 9), (3, 11), (2, 2, 3, 5)])
def test_the_mean_is_pytorchs(shape, ignored, weight, smoothing, fake_gpu):
    logits, labels = pixels(*shape, ignored=ignored)
    how = {"ignore_index": ignored, "label_smoothing": smoothing}
    module = nn.CrossEntropyLoss(weight if weight is None else weight.double(), **how)
    expected = module(logits, labels)
    gradient = torch.autograd.grad(expected, logits)[0]
    task = OwnTask(module)
    with Reductions() as kernels:
        found = task.criterion(logits, Batch(logits, labels, None))
    assert kernels.found == [0]
    assert torch.allclose(found, expected, rtol=1e-13, atol=0)
    assert torch.allclose(torch.autograd.grad(found, logits)[0], gradient, rtol=1e-12, atol=1e-16)


def test_nothing_counted_is_pytorchs_nan_and_segmentations_zero(fake_gpu):
    logits, labels = pixels(2, 4, 4)
    labels.fill_(IGNORE)
    assert F.cross_entropy(logits, labels).isnan()
    assert cross_entropy.cross_entropy(logits, labels).isnan()
    assert SEGMENTATION.criterion(logits, Batch(logits, labels, None)) == 0


def test_segmentations_loss_is_the_mean(fake_gpu):
    logits, labels = pixels(2, 7, 9, ignored=-1)
    with Reductions() as kernels:
        found = SEGMENTATION.criterion(logits, Batch(logits, labels, None))
    assert kernels.found == [0]
    assert torch.allclose(found, F.cross_entropy(logits, labels.clamp_min(IGNORE).where(labels >= 0, IGNORE)))


@pytest.mark.parametrize("loss", [cross_entropy.cross_entropy, nn.CrossEntropyLoss()])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(4,), (2, 8, 8)])
def test_only_pixels_on_a_gpu_are_apart(loss, device, shape):
    task = OwnTask(loss)
    with FakeTensorMode(), Reductions() as kernels:  # tensors without values, of a device that is not there
        logits = torch.empty(shape[0], CLASSES, *shape[1:], device=device)
        task.criterion(logits, Batch(logits, torch.empty(shape, dtype=torch.int64, device=device), None))
    assert kernels.found == [0 if device == "cuda" and len(shape) > 1 else 1]


def test_other_losses_and_probabilities_are_pytorchs(fake_gpu):
    logits, labels = pixels(2, 7, 9)
    summed = nn.CrossEntropyLoss(reduction="sum")
    assert torch.equal(OwnTask(summed).criterion(logits, Batch(logits, labels, None)), summed(logits, labels))
    shares = logits.detach().softmax(1)
    assert torch.equal(cross_entropy.cross_entropy(logits, shares), F.cross_entropy(logits, shares))


# -- tasks -------------------------------------------------------------------------------------------------------------


SERVED = {
    "afl": "cmsr", "ccvr": "c", "centralised": "cmsr", "dense": "c", "ditto": "cmsr", "ensemble": "cs",
    "fedavg": "cmsr", "fedcgs": "c", "feddf": "cs", "feddra": "r", "feddyn": "cmsr", "fedgid": "c", "fediod": "cs",
    "fedlora": "cmsr", "fedlpfm": "c", "fedntd": "c", "fedper": "cm", "fedprox": "cmsr", "fedproto": "c", "fml": "c",
    "fusefl": "c", "local": "cmsr", "moon": "c", "oneshot-fedavg": "cs", "qffl": "cmsr", "scaffold": "cmsr",
}  # fmt: skip
LETTERS = {"c": CLASSIFICATION, "m": MULTILABEL, "s": SEGMENTATION, "r": RETRIEVAL}


def test_every_method_serves_the_tasks_that_it_can_learn():
    served = {
        name: "".join(letter for letter, task in LETTERS.items() if kind.serves(task)) for name, kind in METHODS.items()
    }
    assert {name: served[name] for name in SERVED} == SERVED


class Inheriting(FedAvg):
    """Method that declares nothing of its own."""


class Asking(Inheriting):
    """Method that needs the loss of a batch and nothing else."""

    requires = frozenset({"loss"})


def test_what_a_method_inherits_is_no_promise():
    assert [task for task in LETTERS.values() if Inheriting.serves(task)] == [CLASSIFICATION]
    assert all(Asking.serves(task) for task in LETTERS.values())
    assert [task for task in LETTERS.values() if Method.serves(task)] == [CLASSIFICATION]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_stays_one_object(name):
    task = TASKS[name]
    assert pickle.loads(pickle.dumps(task)) is copy.deepcopy(task) is copy.copy(task) is task
    assert task.name == name
    assert task.better in ("max", "min")
    assert "loss" in task.offers


@pytest.mark.parametrize(("old", "new"), [("images", "inputs"), ("labels", "targets"), ("tokens", "targets")])
def test_a_batch_tells_what_its_parts_are_called(old, new):
    batch = Batch(torch.zeros(1), torch.zeros(1), np.arange(1))
    with pytest.raises(AttributeError, match=f"a batch has no {old}: say batch.{new}"):
        getattr(batch, old)
    with pytest.raises(AttributeError, match="a batch has no anything: expected one of inputs, targets"):
        batch.anything  # noqa: B018


# -- questions -----------------------------------------------------------------------------------------------------

LABELS, TEXTS, KNOWN = ("labels", "targets"), ("texts", "tokens"), ("name", "main", "better", "noun", "code")


def last_word(node):
    """Return the last word of a name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_task(node):
    if isinstance(node, ast.Attribute) and node.attr == "name":
        return is_task(node.value)
    if isinstance(node, ast.Call) and last_word(node.func) == "getattr" and len(node.args) > 1:
        return isinstance(node.args[1], ast.Constant) and node.args[1].value == "task"
    return last_word(node) in ("task", "_task")


def is_axes(node):
    """Return whether one side is the number of axes of labels or targets."""
    if isinstance(node, ast.Call) and last_word(node.func) == "len" and node.args:
        shape = node.args[0]
        return isinstance(shape, ast.Attribute) and shape.attr == "shape" and last_word(shape.value) in LABELS
    node = node.func if isinstance(node, ast.Call) else node
    return isinstance(node, ast.Attribute) and node.attr in ("ndim", "dim") and last_word(node.value) in LABELS


def is_question(node):
    """Return whether a piece of code asks for the kind of the task."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        absent = any(isinstance(side, ast.Constant) and side.value is None for side in sides)
        return any(is_task(side) or is_axes(side) or (absent and last_word(side) in TEXTS) for side in sides)
    if isinstance(node, (ast.If, ast.While, ast.Assert, ast.IfExp)):
        read = [attr for attr in ast.walk(node.test) if isinstance(attr, ast.Attribute) and is_task(attr.value)]
        return any(attr.attr not in KNOWN for attr in read)
    if isinstance(node, ast.Call):
        return last_word(node.func) == "isinstance" and bool(node.args) and is_task(node.args[0])
    return isinstance(node, ast.Match) and is_task(node.subject)


@pytest.mark.parametrize(("code", "count"), [
    ('data.task == "segmentation"', 1),
    ("task in (A, B) and x", 1),
    ('getattr(data, "task", "") == x', 1),
    ("labels.dim() == 3", 1),
    ("split.labels.ndim > 1 or len(batch.targets.shape) == 2", 2),
    ("batch.tokens is None", 1),
    ('if "classes" not in data.task.offers: pass', 1),
    ("1 if task.pair else 2", 1),
    ("isinstance(task, Own)", 1),
    ("match task:\n    case _: pass", 1),
    ("if task.name: pass", 0),
    ("data.task.loss(model, batch)", 0),
    ("images.dim() == 4", 0),
    ("texts = None", 0),
])  # fmt: skip
def test_the_parser_knows_a_question(code, count):
    assert sum(map(is_question, ast.walk(ast.parse(code)))) == count


def test_few_ask_what_kind_of_task_there_is():
    """Code outside `fedkern.tasks` leaves decisions to the task's own methods, refusals excepted."""
    root = Path(fedkern.__file__).parent
    words = re.compile("|".join(("task", *LABELS, *TEXTS)))
    questions = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0] != "tasks" and words.search(text := path.read_text())
        for node in ast.walk(ast.parse(text))
        if is_question(node)
    ]
    assert len(questions) <= 26, questions


# -- figure names ------------------------------------------------------------------------------------------------------


def test_a_metric_is_split_into_test_set_and_figure():
    assert figure_names.split_metric("ood_accuracy") == ("ood", "accuracy")
    assert figure_names.split_metric("accuracy") == ("", "accuracy")
    assert figure_names.split_metric("id_gradcam_in_object") == ("id", "gradcam_in_object")
    assert figure_names.split_metric("north_accuracy") == ("", "north_accuracy")
    assert figure_names.split_metric("north_accuracy", ["north"]) == ("north", "accuracy")


@pytest.mark.parametrize(("name", "title", "short"), [
    ("macro_auroc", "AUROC, mean of the labels", "macro AUROC"),
    ("i2t_r1", "image to text, recall at 1", "recall at 1, image to text"),
    ("lowest_i2t_r1", "lowest: image to text, recall at 1", "lowest: recall at 1, image to text"),
    ("worst_client_dice", "worst client: Dice, mean of the classes", "worst client: Dice"),
    ("worst_client_loss", "worst client loss", "worst client loss"),
    ("north_t2i_r20", "north: text to image, recall at 20", "north: text to image, recall at 20"),
    ("level1_up_bytes", "level1 (sent by a client)", "level1 (sent by a client)"),
    ("proxy_inference_mflops", "proxy inference (operations)", "proxy inference (operations)"),
    ("my_figure", "my figure", "my figure"),
])  # fmt: skip
def test_a_figure_has_a_title_for_people(name, title, short):
    assert figure_names.figure_title(name) == title
    assert figure_names.short_title(name) == short


@pytest.mark.parametrize(("name", "short", "noun"), [
    ("", "", "test set"),
    ("id", "ID", "in-distribution test set"),
    ("held_out", "held-out client", "held-out client"),
    ("minority", "minority", "minority test set"),
    ("validation", "validation", "validation set"),
    ("north", "north", 'test set "north"'),
])  # fmt: skip
def test_a_test_set_has_a_name_in_columns_and_in_sentences(name, short, noun):
    assert (figure_names.short_set_title(name), figure_names.set_noun(name)) == (short, noun)


@pytest.mark.parametrize(("names", "owner"), [
    (["validation"], "the validation set"),
    (["north", "validation", ""], "the validation set"),
    (["", "test"], "the test set without a name"),
    (["test", ""], "the test set without a name"),
    (["mean_client"], "the clients"),
    (["worst_client", "a"], "the clients"),
    (["", "balanced"], "the test set without a name"),
    (["mean", ""], "the test set without a name"),
    (["a", "a_balanced"], 'the test set "a"'),
    (["id_macro", "id"], "the in-distribution test set"),
    (["a", "a_b"], 'the test set "a"'),
    (["b", ""], "the test set without a name"),
    (["validation_b"], "the validation set"),
])  # fmt: skip
def test_a_name_that_means_something_is_refused(names, owner):
    with pytest.raises(UserError, match=f"^The test set .* would have the names of those of {owner}: give it another"):
        figure_names.check_set_names(names, ["b_accuracy", "top2"])


@pytest.mark.parametrize(
    "names",
    [
        [""], ["test"], ["id", "ood"], ["", "minority", "unseen", "held_out"], ["validation_north", "x"],
        ["a", "a_c", "c"], ["loss", "accuracy", ""], ["balanced", "macro", "mean", "worst"], ["own", "best", "run"],
        ["_", "__", "a_", "a"], ["id_north", "north", "ood"], ["validation_", "Validation", "valid"],
    ],
)  # fmt: skip
def test_the_figures_of_every_set_are_found_again(names):
    figure_names.check_set_names(names, ["top2"])
    figures = [*figure_names.FRACTIONS, "loss", "top2", "vote_accuracy"]
    for name in [*names, "validation"]:
        for figure in figures:
            assert figure_names.split_metric(f"{name}_{figure}" if name else figure, names) == (name, figure)
    for name in ("mean_client_accuracy", "worst_client_loss"):
        assert figure_names.split_metric(name, names) == ("", name)


@pytest.mark.parametrize(("metric", "tests", "said"), [
    ("bytes_up", [""], 'The metric "bytes_up" has the name of an entry of the records'),
    ("validation_gap", [""], 'The metric "validation_gap" begins with "validation_", as the figures of a test set'),
    ("worst_client_gap", [""], 'The metric "worst_client_gap" begins with "worst_client_"'),
    ("lowest_gap", [""], 'The metric "lowest_gap" has the name of an entry'),
    ("up", ["bytes", "other"], 'The test set "bytes" would have a figure bytes_up, which records have'),
    ("north_gap", ["", "north"], 'The test set "north" cannot have this name'),
    ("south_gap", ["north", "north_south"], 'The test set "north_south" cannot have this name'),
])  # fmt: skip
def test_no_two_figures_have_one_name(metric, tests, said, refuses, tmp_path):
    sites, test = own_data.table()
    metrics = dict.fromkeys((metric, "gap"), lambda outputs, targets: 1.0)
    with refuses(said):
        fedkern.simulate(
            "fedavg", data=sites, test=test if tests == [""] else dict.fromkeys(tests, test), model=own_data.Rows(),
            metrics=metrics, main="gap", better="max", out=tmp_path / "run", progress=False,
        )  # fmt: skip
