"""The round loop with a plan, parts and clients that only note their calls, without a run."""

from types import SimpleNamespace

import pytest
from torch import nn

from fedkern.engine.executors.executor import Answer
from fedkern.engine.participation import Assignment, Participation
from fedkern.engine.parts.part import Part, Stop
from fedkern.engine.rounds.loop import Loop
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.rounds.round_log import ClientStates, RoundLog
from fedkern.engine.uploads.filters import Filter
from fedkern.errors import UserError
from fedkern.listeners.events import Listener
from fedkern.methods.base import Phase, Round
from python_tests.stand_ins import Checkpoints, Context, Executor, run_objects, values

ENOUGH = Stop("enough", "It is enough.")
PLAN = (Round("setup", one_off=True, participants=(0,)), Round("train"), Round("train"), Round("train"))


class Hooks:
    """The method or the pooling: notes its calls, and sends one message to all clients, or to some."""

    own = True

    def __init__(self, callee, calls, network=None):
        self.callee, self._calls, self._network = callee, calls, network
        self.phases, self.sends_to, self.serve, self.uploads = [], None, None, []

    def send(self, phase):
        self._calls.append(f"{self.callee} send {phase.exchange}")
        self.phases.append(phase)
        return {"x": phase.round}

    def messages(self, outgoing, clients):
        return {k: outgoing for k in clients if self.sends_to is None or k in self.sends_to}

    def declare_upload(self, phase, client, message):
        return message

    def cohort_update(self, clients, phase, sent):
        return None

    def server_update(self, phase, uploads):
        arrived = list(uploads)
        self._calls.append(f"{self.callee} update {phase.exchange} {[upload.client_id for upload in arrived]}")
        self.uploads.append(arrived)
        if self.serve is not None:
            self.serve(phase)

    def check_model(self):
        self._calls.append("check")

    def network(self):
        return self._network


class Noting(Part):
    """A part that notes the rounds, and stops the run before or after one of them."""

    def __init__(self, name, calls, before=None, after=None):
        self.name, self._calls, self._before, self._after = name, calls, before, after
        self.records, self.stops, self.summary = [], [], None

    def before_round(self, record):
        self._calls.append(f"{self.name} before {record.number}")
        return ENOUGH if record.number == self._before else None

    def round_end(self, record):
        self._calls.append(f"{self.name} end {record.number}")
        self.records.append(record)
        self.stops.append(record.stop)
        return ENOUGH if record.number == self._after else None

    def finish(self, summary):
        self._calls.append(f"{self.name} finish")
        self.summary = summary


class Watching(Filter):
    """A filter that keeps requests, and the messages of clients that never answer."""

    def __init__(self):
        self.asked, self.lost = [], []

    def on_sent(self, asked, client, message):
        if client not in asked.participants:
            self.lost.append((asked.phase.exchange, client, message))

    def encoders(self, asked):
        self.asked.append(asked)
        return {}


class Given(Participation):
    """A policy with given assignments by round, in which client 2 answers the message before."""

    def __init__(self, given):
        self._given, self._before, self.asked, self._choice = given, {}, [], None

    def assign(self, entry, round, traffic):
        self.asked.append((entry.name, round))
        return self._given[round]

    def messages(self, clients, send):
        sent, self._before = {**send(clients), **self._before}, {2: send([2])[2]}
        return {k: sent[k] for k in clients}

    def figures(self):
        return {"clock": float(len(self.asked))}


class Bench:
    """A loop over three clients that return their messages, unless ``given`` has their answers."""

    def __init__(self, plan=PLAN, parts=(), *, given=None, pooling=None, policy=None, planned=0, done=0, **settings):
        self.calls, self.context, self.given = [], Context(**settings), given or {}
        local = Executor(self.work)
        self.executor, self.progress = Executor(self.work, here=local), Progress(planned=planned, done=done)
        self.checkpoints = Checkpoints()
        states = ClientStates(self.executor, self.checkpoints, self.context, self.progress, False)
        self.log = RoundLog(self.context, self.progress, states, Listener())
        self.server = SimpleNamespace(refused=[], round_cache={})
        self.method, self.statistics = (Hooks(name, self.calls, nn.Identity()) for name in ("method", "pooling"))
        self.filter, self.parts = Watching(), [make(self.calls) for make in parts]
        pooling = pooling or (lambda entry, due: [(name, "method") for name in entry.exchanges])
        run = run_objects(
            self.context, plan=plan, rounds=sum(not entry.one_off for entry in plan), server=self.server,
            hooks={"method": self.method, "pooling": self.statistics}, pooling=SimpleNamespace(exchanges=pooling),
            participation=policy or Participation(self.context.config, self.context.federation),
            progress=self.progress, executor=self.executor, states=states, log=self.log,
        )  # fmt: skip
        self.loop = Loop(run, [self.filter], self.parts)

    def work(self, k, message):
        return self.given.get(k) or Answer(k, dict(message))


def part(name, **given):
    return lambda calls: Noting(name, calls, **given)


def test_the_order_of_calls_in_a_round():
    bench = Bench((Round("train", exchanges=("first", "second")),), [part("a"), part("b")])
    assert bench.loop.play() is None
    assert bench.calls == [
        "a before 1", "b before 1",
        "method send first", "method update first [0, 1, 2]", "method send second", "method update second [0, 1, 2]",
        "check", "a end 1", "b end 1",
    ]  # fmt: skip
    assert bench.method.phases == [Phase(0, "train", "first"), Phase(0, "train", "second")]
    assert [asked for asked in bench.executor.asked if asked[1] == "first"] == [
        ("method", "first", k) for k in range(3)
    ]
    (record,) = bench.parts[0].records
    assert record.exchanges == ("first", "second")
    assert record.clients.keys() == {"0", "1", "2"}
    assert len(record.reports) == 6
    assert record.seconds.keys() == {"train", "train/first", "train/second", "aggregate", "evaluate"}
    assert record.seconds["train"] == pytest.approx(record.seconds["train/first"] + record.seconds["train/second"])
    assert all(value >= 0 for value in record.seconds.values())
    assert bench.executor.calls[-1] == ("end round", None)


def test_rounds_of_a_plan_and_their_numbers():
    bench = Bench((PLAN[0], *PLAN), [part("a")], eval_every=2)
    assert bench.loop.play() is None
    records = bench.parts[0].records
    assert [record.number for record in records] == [-1, -2, 1, 2, 3]
    assert [record.due for record in records] == [False, False, False, True, True]  # the last one in any case
    assert [record.last for record in records] == [False, False, False, False, True]
    assert {record.rounds for record in records} == {3}
    assert [asked.plan for asked in bench.filter.asked] == [0, 1, 2, 3, 4]
    assert [phase.round for phase in bench.method.phases] == [-1, -2, 0, 1, 2]
    assert (bench.progress.planned, bench.progress.done) == (5, 3)
    assert [len(record.reports) for record in records] == [1, 1, 3, 3, 3]
    assert records[2].seconds.keys() == {"train", "aggregate", "evaluate"}  # a single exchange has no entry of its own


def test_the_clients_of_a_round():
    policy = Given({-1: Assignment((0,)), 0: Assignment([1, 2]), 1: Assignment(range(3), began={2: 0})})
    bench = Bench((PLAN[0], Round(), Round("second")), [part("a")], policy=policy)
    bench.loop.play()
    assert policy.asked == [("setup", -1), ("train", 0), ("second", 1)]
    assert [record.participants for record in bench.parts[0].records] == [[0], [1, 2], [0, 1, 2]]
    assert [values(record) for record in bench.parts[0].records] == [{"clock": 1.0}, {"clock": 2.0}, {"clock": 3.0}]
    assert [(asked.clients, asked.participants) for asked in bench.filter.asked] == [
        (1, (0,)),
        (2, (1, 2)),
        (3, (0, 1, 2)),
    ]


def test_a_client_answers_what_the_policy_says_and_its_upload_is_as_old():
    policy = Given({0: Assignment([1]), 1: Assignment([0, 2], began={2: 0}), 2: Assignment([0, 2], began={2: 1})})
    bench = Bench((Round(), Round(), Round()), policy=policy)
    bench.loop.play()
    uploads = [[(u.client_id, u.message["x"], u.staleness) for u in all] for all in bench.method.uploads]
    assert uploads == [[(1, 0, 0)], [(2, 0, 1), (0, 1, 0)], [(2, 1, 1), (0, 2, 0)]]
    # Work is of the round in which it began, with that round's draws and learning rate.
    assert [phase.round for phase in bench.executor.phases] == [0, 0, 1, 1, 2]


def test_a_round_is_not_begun_where_a_part_stops_before_it():
    bench = Bench(parts=[part("a"), part("b", before=2), part("c")])
    assert bench.loop.play() is ENOUGH
    assert bench.calls[-2:] == ["a before 2", "b before 2"]
    assert len(bench.method.phases) == 2
    assert (bench.progress.planned, bench.progress.done) == (2, 1)


def test_parts_after_the_one_that_stops_the_run_see_why():
    bench = Bench(parts=[part("a"), part("b", after=2), part("c")])
    stop = bench.loop.play()
    assert stop is ENOUGH
    assert [part.stops[-1] for part in bench.parts] == [None, None, ENOUGH]
    assert bench.calls[-1] == "c end 2"
    assert (bench.progress.planned, bench.progress.done) == (3, 2)
    summary = bench.loop.finish(stop)
    assert bench.calls[-3:] == ["a finish", "b finish", "c finish"]
    assert summary.stop is ENOUGH
    assert all(part.summary is summary for part in bench.parts)
    assert summary.network is bench.method.network()


def test_a_run_without_a_network_at_its_end_is_a_mistake_of_the_method():
    bench = Bench()
    bench.method._network = None
    with pytest.raises(ValueError, match="model: expected a module at the end of the plan"):
        bench.loop.finish(None)


def test_a_resumed_run_goes_on_with_the_round_after_those_that_were_planned():
    bench = Bench(parts=[part("a")], planned=3, done=2)
    assert bench.loop.play() is None
    assert [(record.number, record.rounds) for record in bench.parts[0].records] == [(3, 3)]
    assert [asked.plan for asked in bench.filter.asked] == [3]
    finished = Bench(parts=[part("a")], planned=4, done=3)
    assert finished.loop.play() is None
    assert finished.calls == []


def test_exchanges_of_the_pooling_are_asked_of_the_pooling():
    given = []

    def exchanges(entry, due):
        given.append((entry.name, due))
        return [("update", "method"), ("statistics", "pooling")]

    bench = Bench((Round("train"),), [part("a")], pooling=exchanges)
    bench.loop.play()
    assert bench.calls[1:5] == [
        "method send update", "method update update [0, 1, 2]",
        "pooling send statistics", "pooling update statistics [0, 1, 2]",
    ]  # fmt: skip
    assert given == [("train", True)]
    assert [asked[0] for asked in bench.executor.asked] == 3 * ["method"] + 3 * ["pooling"]
    assert bench.parts[0].records[0].exchanges == ("update", "statistics")


@pytest.mark.parametrize("names", [("first", "second"), ("same", "same")])
def test_states_are_forgotten_after_the_last_exchange(names):
    bench = Bench((Round(exchanges=names),))
    bench.loop.play()
    calls = [call for call, _ in bench.executor.calls]
    assert calls == [*3 * ["works"], *3 * ["works", "forget"], "end round"]


def test_absent_clients_are_sent_the_first_message_alone():
    policy = Given({0: Assignment([0, 1, 2], {1: "it dropped out of the round"})})
    bench = Bench((Round(exchanges=("first", "second")),), [part("a")], policy=policy)
    bench.loop.play()
    assert bench.filter.lost == [("first", 1, {"x": 0})]
    assert [asked.participants for asked in bench.filter.asked] == [(0, 2), (0, 2)]
    assert [asked.clients for asked in bench.filter.asked] == [3, 3]
    assert bench.log.dropped == [
        {"round": 1, "client": 1, "exchange": "first", "reason": "it dropped out of the round"}
    ]
    assert bench.parts[0].records[0].participants == [0, 1, 2]


def test_clients_that_are_left_out_or_have_no_message_are_asked_no_more():
    bench = Bench((Round(exchanges=("first", "second")), Round()), on_nan="skip",
                  given={1: Answer(1, refused="cannot be read")})  # fmt: skip
    bench.loop.play()
    assert [asked.participants for asked in bench.filter.asked] == [
        (0, 1, 2),
        (0, 2),
        (0, 1, 2),
    ]  # until the round ends
    partial = Bench((Round(),))
    partial.method.sends_to = (2,)
    partial.loop.play()
    assert [k for _, _, k in partial.executor.asked] == [2]
    assert partial.filter.asked[0].participants == (0, 1, 2)


def test_clients_that_the_server_refuses_are_left_out():
    bench = Bench((Round(exchanges=("first", "second")),))
    bench.method.serve = lambda phase: bench.server.refused.append((0, "It is odd")) if phase.exchange == "first" else 0
    bench.loop.play()
    assert [asked.participants for asked in bench.filter.asked] == [(0, 1, 2), (1, 2)]
    assert bench.log.dropped == [{"round": 1, "client": 0, "exchange": "first", "reason": "It is odd"}]
    assert bench.server.refused == []


def test_a_round_that_loses_all_its_clients_ends_the_run():
    bench = Bench((Round(exchanges=("first", "second")),))
    bench.method.serve = lambda phase: bench.server.refused.extend((k, "It is odd") for k in range(3))
    with pytest.raises(UserError, match="No client is left in round 1"):
        bench.loop.play()
    assert bench.calls[-1] == "method update first [0, 1, 2]"


def test_the_servers_cache_ends_with_the_round():
    bench = Bench((Round(exchanges=("first", "second")), Round()))
    seen = []

    def serve(phase):
        seen.append(dict(bench.server.round_cache))
        bench.server.round_cache[phase.exchange] = 1

    bench.method.serve = serve
    bench.loop.play()
    assert seen == [{}, {"first": 1}, {}]


@pytest.mark.parametrize(
    ("cohort", "together", "remote", "local"),
    [
        (False, False, False, False),
        (True, False, False, True),
        (False, True, False, True),
        (True, True, True, False),  # no client ever works here
    ],
)
def test_which_executor_has_the_clients_of_a_round(cohort, together, remote, local):
    class Tracing(Part):
        def before_round(self, record):
            record.in_server_process = together

    bench = Bench((Round(cohort=cohort),), [lambda calls: Tracing()])
    bench.executor.remote = remote
    bench.executor.here.client = lambda k: SimpleNamespace(
        label=str(k), report={}, check_state=lambda: None, collect_marks=frozenset
    )
    bench.loop.play()
    assert [len(executor.asked) for executor in (bench.executor, bench.executor.here)] == ([0, 3] if local else [3, 0])
