"""The part of figures that the server reports."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedkern.engine.parts.part import Summary
from fedkern.engine.parts.server_figures import ServerFigures
from fedkern.errors import UserError
from fedkern.privacy.disclosure import About, Disclosure
from python_tests.stand_ins import Context, about, record, round_trip, run_objects, values


def figures_of(server, disclosure=None):
    return ServerFigures(run_objects(Context(disclosure=disclosure), server=server))


@pytest.mark.parametrize("told", [False, True])
def test_figures_that_the_server_reports(told):
    server, disclosure = SimpleNamespace(report={}), Disclosure(False, told)
    part, setup, noted = figures_of(server, disclosure), record(-1), record()
    part.restore({"norm": 1, "spread": None})
    part.round_end(setup)
    part.round_end(noted)
    assert setup.entries == {}
    assert about(noted, About.SERVER) == {"norm", "spread"}
    assert server.report["norm"] == 1.0
    assert type(server.report["norm"]) is float
    assert server.report["spread"] != server.report["spread"]  # NaN, which a resumed run gets as None
    summary = Summary(nn.Identity())
    part.finish(summary)
    assert summary.metrics.keys() == ({"norm", "spread"} if told else set())


def test_the_servers_figures_go_on_from_a_checkpoint():
    part, again = (figures_of(SimpleNamespace(report=report)) for report in ({"norm": 1.0}, {}))
    again.restore(round_trip(part.state()))
    assert again.state() == {"norm": 1.0}


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)])
def test_numbers_that_the_server_reports_become_pythons(value):
    server, noted = SimpleNamespace(report={"x": value}), record()
    figures_of(server).round_end(noted)
    assert type(server.report["x"]) is float
    assert values(noted) == {"x": 0.5}


@pytest.mark.parametrize("value", [None, "0.5", [0.5], np.zeros(2), 1j])
def test_what_the_server_reports_must_be_numbers(value):
    server, noted = SimpleNamespace(report={"x": value}), record()
    with pytest.raises(UserError, match=r'server.report\["x"\] must be a number, not .*: report a number, or leave'):
        figures_of(server).round_end(noted)
    assert noted.entries == {}


@pytest.mark.parametrize("name", ["accuracy", "round", "seconds"])
def test_the_server_may_report_no_name_of_the_engines(name):
    noted = record()
    noted.put({"accuracy": 0.5})
    part = figures_of(SimpleNamespace(report={name: 1.0}))
    with pytest.raises(UserError, match=rf'server.report\["{name}"\] has a name of the engine\'s: choose one besides'):
        part.round_end(noted)
