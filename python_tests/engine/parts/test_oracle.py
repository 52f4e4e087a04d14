"""The part of figures that only an experimenter can have."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fedkern.engine.parts.oracle import Oracle
from fedkern.engine.parts.part import Summary
from fedkern.errors import UserError
from fedkern.privacy.disclosure import Disclosure
from python_tests.engine.parts.judged import Judged, code
from python_tests.stand_ins import PRIVATE, Context, run_objects


def oracle(method, context, **given):
    return Oracle(run_objects(context, method=method, code=code(method), **given))


@pytest.mark.parametrize(
    ("disclosure", "told"),
    [
        (Disclosure(), {"paid": 2.0, "id_paid": 2.0, "unpaid": 4.0}),
        (Disclosure(clients=False, derived_figures=("paid",)), {"paid": 2.0, "id_paid": 2.0}),
        (PRIVATE, {}),
    ],
)
def test_figures_that_only_an_experimenter_can_have(disclosure, told, monkeypatch):
    method, summary = Judged(), Summary(nn.Identity(), metrics={"accuracy": 0.5})
    if not told:
        monkeypatch.setattr(method, "oracle_metrics", None)  # nobody computes what nobody may know
    part = oracle(method, Context(3, disclosure), server=1.0, sets={"id_": None})
    part.finish(summary)
    assert summary.metrics == {"accuracy": 0.5, **told}


def test_an_experimenters_figures_are_numbers(monkeypatch):
    method, summary = Judged(), Summary(nn.Identity())
    part = oracle(method, Context(), server=None, sets={})
    monkeypatch.setattr(method, "oracle_metrics", lambda *_: {"half": np.float32(0.5), "two": torch.tensor(2)})
    part.finish(summary)
    assert json.dumps(summary.metrics) == '{"half": 0.5, "two": 2.0}'
    monkeypatch.setattr(method, "oracle_metrics", lambda *_: {"both": [0.5, 1.0]})
    with pytest.raises(UserError, match=r'oracle_metrics\["both"\] must be a number, not list: report a number'):
        part.finish(summary)
