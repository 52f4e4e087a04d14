"""Tests of tasks as objects: which method serves which task, a task's messages, and questions about its kind."""

import ast
import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedkern
from fedkern.methods import METHODS, Batch, FedAvg, Method
from fedkern.tasks import CLASSIFICATION, MULTILABEL, RETRIEVAL, SEGMENTATION, TASKS

SERVED = {
    "afl": "cmsr", "ccvr": "c", "centralised": "cmsr", "dense": "c", "ditto": "cmsr", "ensemble": "cs",
    "fedavg": "cmsr", "fedcgs": "c", "feddf": "cs", "feddra": "r", "feddyn": "cmsr", "fedgid": "c", "fediod": "cs",
    "fedlpfm": "c", "fedntd": "c", "fedper": "cm", "fedprox": "cmsr", "fedproto": "c", "fml": "c", "fusefl": "c",
    "local": "cmsr", "moon": "c", "oneshot-fedavg": "cs", "scaffold": "cmsr",
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
