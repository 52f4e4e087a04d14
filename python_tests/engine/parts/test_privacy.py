"""The part of privacy: secrets, figures, and the cost of more rounds."""

from types import SimpleNamespace

import pytest
from torch import nn

from fedkern.engine.parts.part import Summary
from fedkern.engine.parts.privacy import Privacy
from fedkern.engine.rounds.progress import Progress
from fedkern.privacy import Guarantee, server_secret
from fedkern.privacy.disclosure import About
from python_tests.stand_ins import Context, record, round_trip, run_objects

GUARANTEE = Guarantee(1e-5, {"networks": "the networks"})


class Kept:
    """The part of privacy with stand-ins for its run."""

    def __init__(self, out, *, said=GUARANTEE, private=True, rounds=3, draws="seed"):
        self.calls, self.context = [], Context(dp_draws=draws, trained_clients=2)
        report = {"epsilon": 2.0, "delta": 1e-5, "clip": 1.0}
        self.private = SimpleNamespace(
            planned=rounds / 2,
            secret="",
            figures_after=lambda rounds: {"epsilon": rounds / 2},
            report=lambda rounds: report,
        )
        self.private.keep = lambda secret: setattr(self.private, "secret", secret)
        checkpoints = SimpleNamespace(
            folder=out, write_at_once=lambda: self.calls.append("at once"), client_state=lambda k: {}
        )
        releases = None if said is None else SimpleNamespace(open=lambda plan: self.calls.append(f"open {plan}"))
        self.part = Privacy(run_objects(
            self.context, guarantee=said, private=self.private if private else None, releases=releases,
            checkpoints=checkpoints, progress=Progress(done=2, planned=4), rounds=rounds,
        ))  # fmt: skip


@pytest.mark.parametrize("draws", ["seed", "secret"])
def test_what_a_private_run_needs_before_it_releases_anything(draws, tmp_path):
    kept = Kept(tmp_path, draws=draws)
    kept.part.begin(resumed=False)
    assert kept.calls == ["open 4", "at once"]
    assert kept.private.secret == (server_secret.read_secret(tmp_path) if draws == "secret" else "")
    again = Kept(tmp_path, draws=draws)
    again.part.begin(resumed=True)
    assert again.private.secret == kept.private.secret
    public = Kept(tmp_path, said=None, private=False)
    public.part.begin(resumed=False)
    assert public.calls == []
    assert public.part.state() == {}


def test_figures_of_a_run_with_private_clients(tmp_path):
    kept, noted, setup, summary = Kept(tmp_path), record(), record(-1), Summary(nn.Identity())
    kept.part.round_end(noted)
    kept.part.round_end(setup)
    assert noted.entries == {"epsilon": (About.RUN, 1.0)}
    assert setup.entries == {}
    kept.part.finish(summary)
    assert summary.metrics == {"epsilon": 2.0, "delta": 1e-5}
    assert summary.entries == {"privacy": {"epsilon": 2.0, "delta": 1e-5, "clip": 1.0}}
    nothing = Summary(nn.Identity())
    Kept(tmp_path, said=None, private=False).part.finish(nothing)
    assert (nothing.metrics, nothing.entries) == ({}, {})


def test_a_run_that_goes_on_for_more_rounds_says_what_that_costs(tmp_path):
    state = round_trip(Kept(tmp_path).part.state())
    for rounds, warned in ((3, False), (4, True)):
        again = Kept(tmp_path, rounds=rounds)
        again.part.restore(state)
        again.part.begin(resumed=True)
        assert [*again.context.notices.warnings] == (["larger-epsilon"] if warned else [])
    assert (
        "planned for 3 rounds with epsilon 1.5: its 4 rounds have epsilon 2."
        in again.context.notices.warnings["larger-epsilon"]
    )
