"""An exchange, the log of a round and the clients' states, each without a run."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkern.engine.executors.executor import Answer
from fedkern.engine.local.training import Diverged
from fedkern.engine.rounds.exchange import Exchange
from fedkern.engine.rounds.ledger import Ledger, message_bytes
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.rounds.round_log import ClientStates, RoundLog
from fedkern.engine.uploads.encoders import STATES, Encoders
from fedkern.engine.uploads.filters import ExchangeRequest, Filter
from fedkern.errors import ClientFailed, UserError
from fedkern.listeners.events import Listener
from fedkern.methods.base import Phase, Round, Upload
from fedkern.methods.uploads import Maybe, Number, Values
from fedkern.privacy import LEDGER
from python_tests.stand_ins import PRIVATE, Checkpoints, Context, Executor

NO_UPLOAD = {
    "absent": Answer(1, absent="it was not heard"),
    "refused": Answer(1, refused="cannot be read"),
    "diverged": Answer(1, problem=Diverged(1, 3, 2, "the loss is nan")),
    "failed": Answer(1, problem=ClientFailed(1, "KeyError: 'x'")),
}
DROPPED = {
    "absent": {"exchange": "update", "reason": "it was not heard"},
    "refused": {"exchange": "update", "reason": "cannot be read"},
    "diverged": {"batch": 2, "reason": "the loss is nan"},
    "failed": {"reason": "KeyError: 'x'"},
}
WARNINGS = {
    "absent": ("missing-client-1", "Client 1 was left out in round 4, as it was not heard."),
    "refused": ("refused-upload-1", "Client 1's upload in round 4 cannot be read; it was left out."),
    "diverged": (
        "diverging-client",
        "Client 1 diverged in round 4, batch 2: the loss is nan; it was left out of that round.",
    ),
    "failed": ("failing-client-1", "Client 1 failed in round 4: KeyError: 'x'; it was left out of that round."),
}


class Hooks:
    """An exchange in which every client returns its message.

    ``together`` has the answers of a cohort.
    """

    own, callee = True, "method"

    def __init__(self, together=None):
        self._together = together

    def cohort_update(self, clients, phase, sent):
        for client in clients.values():
            client.report["loss"] = float(client.id)
        return self._together

    def declare_upload(self, phase, client, message):
        return message


class Watching(Filter):
    """A filter that notes its calls, and refuses the uploads of some clients."""

    def __init__(self, name, calls, refuses=()):
        self._name, self._calls, self._refuses = name, calls, refuses

    def on_sent(self, asked, client, message):
        self._calls.append((f"{self._name} sent", client))

    def encoders(self, asked):
        return {0: self._name} if self._name == "a" else {0: self._name, 1: self._name}

    def on_missing(self, arrival, failed):
        self._calls.append((f"{self._name} lacking" + failed * ", failed", arrival.client))

    def decode(self, arrival):
        self._calls.append((f"{self._name} decode", arrival.client))
        arrival.info[self._name] = 1.0
        return "is too long" if arrival.client in self._refuses else ""

    def combine(self, asked, uploads, note):
        return self._together(uploads, note)

    def _together(self, uploads, note):
        for upload in uploads:
            note(upload.client_id, {f"noted by {self._name}": 2.0})
            self._calls.append((f"{self._name} together", upload.client_id))
            handover = [upload]
            del upload
            yield handover.pop()
        self._calls.append((f"{self._name} end", None))


class Bench:
    """An exchange of three clients that return their messages, unless ``given`` names their answers."""

    def __init__(self, given=None, *, filters=(), entry=None, clients=(0, 1, 2), hooks=None, silent=False, **context):
        self.calls, self.context, self.checkpoints = [], Context(**context), Checkpoints()
        self.executor = Executor(lambda k, message: (given or {}).get(k) or Answer(k, dict(message)), calls=self.calls)
        self.progress = Progress(done=3, planned=3, exchange="update")
        entry = entry or Round("train")
        self.progress.begin(entry)
        self.heard = []
        listener = Listener()
        listener.on_client = lambda *event: self.heard.append(event)
        self.states = ClientStates(self.executor, self.checkpoints, self.context, self.progress, False)
        self.log = RoundLog(self.context, self.progress, self.states, listener, hides_dropouts=silent)
        sent = {k: {"parameters": torch.full((2,), float(k))} for k in clients}
        phase = Phase(self.progress.index, entry.name, "update")
        self.asked = ExchangeRequest(phase, entry, 3, len(clients), tuple(clients), hooks or Hooks(), sent)
        self.filters = [make(self.calls) for make in filters]
        self.exchange = Exchange(self.asked, self.filters, self.executor, self.log, self.context.federation.samples)

    def clients(self):
        return [upload.client_id for upload in self.exchange.uploads()]


def a(calls):
    return Watching("a", calls)


def b(calls):
    return Watching("b", calls)


def refusing(calls):
    return Watching("a", calls, refuses=(1,))


# -- the exchange ------------------------------------------------------------------------------------------------------


def test_the_server_is_done_with_an_upload_before_the_next_client_works():
    bench = Bench()
    for upload in bench.exchange.uploads():
        bench.calls.append(("served", upload.client_id))
    assert [call for call in bench.calls if call[0] != "forget"] == [
        (step, k) for k in range(3) for step in ("works", "served")
    ]


def test_no_reference_to_an_earlier_upload_stays():
    refs, alive, served = {}, [], []

    def work(k, message):
        alive.extend(ref() is not None for ref in refs.values())
        tensor = message["parameters"] + 1
        refs[k] = weakref.ref(tensor)
        return Answer(k, {"parameters": tensor})

    bench = Bench(filters=[a, b])
    bench.executor._work = work
    for upload in bench.exchange.uploads():
        served.append(float(upload.message["parameters"][0]))
        del upload
    assert served == [1.0, 2.0, 3.0]
    assert alive == [False, False, False]  # one when client 1 works, two when client 2 does


def test_what_filters_are_told_and_in_which_order():
    bench = Bench(filters=[a, b])
    bench.context.config.on_error = "skip"
    bench.executor._work = lambda k, message: NO_UPLOAD["failed"] if k == 1 else Answer(k, dict(message))
    assert bench.clients() == [0, 2]
    passed = ["works", "a sent", "b sent", "a decode", "b decode", "forget", "a together", "b together"]
    failed = ["works", "a sent", "b sent", "a lacking, failed", "b lacking, failed", "forget"]
    expected = [(event, k) for k, events in ((0, passed), (1, failed), (2, passed)) for event in events]
    assert bench.calls == [*expected, ("a end", None), ("b end", None)]
    # What is decoded last is encoded first.
    assert bench.executor.encoders == {0: Encoders((("", "b"), ("", "a"))), 1: Encoders((("", "b"),))}


def test_figures_of_a_client_that_is_done():
    bench = Bench({0: Answer(0, {"x": 1}, report={"loss": 0.5}, seconds=7.0, warnings={"odd": "It is odd."})},
                  filters=[a], clients=(0,))  # fmt: skip
    (upload,) = bench.exchange.uploads()
    assert upload == Upload(0, 10, {"x": 1})
    info = {"samples": 10, "loss": 0.5, "a": 1.0}
    assert bench.log.reports == [info]
    assert bench.log.clients == {"0": {**info, "noted by a": 2.0}}
    assert bench.heard == [(4, 0, {**info, "seconds": 7.0})]
    assert bench.context.notices.warnings == {"odd": "It is odd."}
    private = Bench(disclosure=PRIVATE, clients=(0,))
    assert private.clients() == [0]
    assert private.heard == [(4, 0, {})]
    assert bench.exchange.seconds > 0


def test_a_refused_upload_goes_no_further():
    bench = Bench(filters=[refusing, b], on_nan="skip")
    assert bench.clients() == [0, 2]
    assert ("a decode", 1) in bench.calls
    assert not {("b decode", 1), ("a together", 1)} & {*bench.calls}
    assert bench.log.excluded == {1}
    assert bench.log.dropped == [{"round": 4, "client": 1, "exchange": "update", "reason": "is too long"}]
    assert list(bench.context.notices.warnings.values()) == [
        "Client 1's upload in round 4 is too long; it was left out."
    ]
    with pytest.raises(UserError, match=r"^Client 1's upload in round 4 is too long; leave such uploads out with --on"):
        Bench(filters=[refusing]).clients()


@pytest.mark.parametrize("kind", NO_UPLOAD)
def test_a_client_without_an_upload_is_left_out_or_ends_the_run(kind):
    bench = Bench({1: NO_UPLOAD[kind]}, filters=[a], on_nan="skip", on_error="skip")
    assert bench.clients() == [0, 2]
    assert ("a lacking" + (kind in ("diverged", "failed")) * ", failed", 1) in bench.calls
    assert bench.log.dropped == [{"round": 4, "client": 1, **DROPPED[kind]}]
    assert [*bench.context.notices.warnings.items()] == [WARNINGS[kind]]
    assert bench.log.clients.keys() == {"0", "2"}
    stopped = Bench({1: NO_UPLOAD[kind]}, on_nan="skip" if kind == "failed" else "stop",
                    on_error="stop" if kind == "failed" else "skip")  # fmt: skip
    if kind == "absent":  # which is no mistake of anybody
        assert stopped.clients() == [0, 2]
        return
    with pytest.raises(
        ClientFailed if kind == "failed" else UserError, match=r"^Client 1('s upload| diverged| failed)"
    ):
        stopped.clients()


@pytest.mark.parametrize("kind", NO_UPLOAD)
def test_what_is_told_of_a_client_that_is_left_out(kind):
    private = Bench({1: NO_UPLOAD[kind]}, disclosure=PRIVATE, on_nan="skip", on_error="skip")
    assert private.clients() == [0, 2]
    (text,) = private.context.notices.warnings.values()
    secret = ("cannot be read", "the loss is nan", "batch", "KeyError")
    assert not any(word in f"{text} {private.log.dropped}" for word in secret)
    silent = Bench({1: NO_UPLOAD[kind]}, silent=True, on_nan="skip", on_error="skip")
    assert silent.clients() == [0, 2]
    assert (silent.log.excluded, silent.log.dropped, silent.context.notices.warnings) == ({1}, [], {})


def test_an_empty_upload_is_not_handed_on_though_its_client_is_done():
    bench = Bench({1: Answer(1, None)})
    assert bench.clients() == [0, 2]
    assert bench.log.excluded == set()
    assert bench.log.clients["1"] == {"samples": 20}


@pytest.mark.parametrize("entry", [Round("train"), Round("setup", one_off=True), Round("a", participants=(0, 1, 2))])
def test_a_round_without_a_client_ends_the_run(entry):
    with pytest.raises(UserError, match=r"^No client is left .*\(client 2: it was not heard\): lower --lr"):
        Bench({k: Answer(k, absent="it was not heard") for k in range(3)}, entry=entry).clients()


def test_a_set_up_round_of_named_clients_may_lose_them_all():
    entry = Round("setup", participants=(0, 1, 2), one_off=True)
    assert Bench({k: Answer(k, absent="it was not heard") for k in range(3)}, entry=entry).clients() == []


def test_clients_that_never_answer_are_sent_their_messages_all_the_same():
    bench = Bench(filters=[a])
    bench.context.data.client_names = ("x", "y", "z")
    bench.exchange.lose({1: {}}, {1: "it dropped out", 2: "it was late"})  # client 2 has no message
    assert bench.calls == [("a sent", 1)]
    assert bench.log.excluded == {1, 2}
    assert bench.log.dropped == [
        {"round": 4, "client": k, "name": name, "exchange": "update", "reason": why}
        for k, name, why in ((1, "y", "it dropped out"), (2, "z", "it was late"))
    ]


@pytest.mark.parametrize("remote", [False, True])
def test_a_cohort_is_asked_at_once(remote):
    bench = Bench(filters=[a], entry=Round("train", cohort=True), hooks=Hooks({k: {"x": k} for k in range(3)}))
    bench.executor.remote = remote
    bench.executor.client = lambda k: SimpleNamespace(
        id=k, label=str(k), report={"stale": 1.0}, check_state=lambda: None,
        marks={"stale"}, collect_marks=lambda: frozenset({f"client {k}"}),
    )  # fmt: skip
    messages = [upload.message for upload in bench.exchange.uploads()]
    if remote:  # each works where it is
        assert [call for call in bench.calls if call[0] == "works"] == [("works", k) for k in range(3)]
        return
    assert messages == [{"x": k} for k in range(3)]
    assert ("works", 0) not in bench.calls
    assert [info["loss"] for info in bench.log.reports] == [0.0, 1.0, 2.0]
    assert "stale" not in bench.log.reports[0]
    assert bench.log.marks == {"client 0", "client 1", "client 2"}


class Reporting(Hooks):
    """A cohort in which only client 1 reports something."""

    def __init__(self, report):
        self._report = report

    def cohort_update(self, clients, phase, sent):
        clients[1].report.update(self._report)
        return dict(sent)


@pytest.mark.parametrize(
    ("report", "why"),
    [({"x": np.float32(0.5)}, ""), ({"x": [1]}, "must be a number"), ({"samples": 5}, "has a name of the engine's")],
)
def test_a_cohorts_reports_are_numbers_by_names_of_their_own(report, why):
    bench = Bench(entry=Round("train", cohort=True), hooks=Reporting(report))
    bench.executor.client = lambda k: SimpleNamespace(
        id=k, label=str(k), report={}, check_state=lambda: None, collect_marks=frozenset
    )
    if not why:
        assert bench.clients() == [0, 1, 2]
        assert type(bench.log.clients["1"]["x"]) is float
        return
    with pytest.raises(UserError, match=rf'client 1: client.report\["{next(iter(report))}"\] {why}'):
        bench.clients()
    assert bench.log.clients == {}


# -- the clients' states -----------------------------------------------------------------------------------------------


def states_of(entry, states, stateless=False, before=None):
    executor, checkpoints = Executor(states=states), Checkpoints(before)
    progress = Progress(planned=3)
    progress.begin(entry)
    context = Context(method="fedavg")
    return ClientStates(executor, checkpoints, context, progress, stateless), executor, checkpoints, progress


def test_states_are_written_after_every_exchange_and_forgotten_after_the_last():
    states, executor, checkpoints, progress = states_of(Round(), {0: {"x": 1}})
    progress.last_exchange = False
    states.finish_exchange(0)
    assert checkpoints.written == [(0, 4, {"x": 1})]
    assert executor.calls == []
    progress.last_exchange = True
    states.finish_exchange(0)
    states.finish_exchange(1)
    assert len(checkpoints.written) == 1  # nothing has changed since
    assert executor.calls == [("forget", 0), ("forget", 1)]
    states.end_round()
    assert executor.calls[2:] == [("end round", None)]


def test_states_of_rounds_of_many_exchanges_are_written_at_the_end():
    states, executor, checkpoints, _ = states_of(Round(states="round"), {0: {"x": 1}, 2: {"x": 2}})
    states.finish_exchange(0)
    assert (checkpoints.written, executor.calls) == ([], [])
    states.end_round()
    assert checkpoints.written == [(0, 4, {"x": 1}), (2, 4, {"x": 2})]
    assert executor.calls == [("end round", None)]


@pytest.mark.parametrize(
    ("entry", "state", "written"),
    [
        (Round(), {"x": 1}, False),
        (Round(), {LEDGER: {}}, True),  # what was released stays released
        (Round(states="round"), {"x": 1}, True),  # of the exchanges before
        (Round(states="round"), None, False),
    ],
)
def test_the_state_of_a_client_that_is_left_out_is_dropped(entry, state, written):
    states, executor, checkpoints, _ = states_of(entry, {1: state})
    states.exclude(1)
    assert executor.calls == [("forget", 1)]
    assert checkpoints.written == ([(1, 4, state)] if written else [])


OLD, NEW = ({"x": n, STATES: {"residual": n}} for n in (1, 2))


@pytest.mark.parametrize("before", [{1: OLD}, {}])
def test_what_the_server_refuses_leaves_the_state_as_before_the_round(before):
    """The server looks at an upload after its client is done."""
    states, executor, checkpoints, progress = states_of(Round(), {1: NEW}, before=before)
    progress.last_exchange = False
    states.finish_exchange(1)
    executor._states[1] = {"x": 3}
    progress.last_exchange = True
    states.finish_exchange(1)
    assert checkpoints.client_state(1) == {"x": 3}
    states.exclude(1)
    assert checkpoints.client_state(1) == before.get(1, {})
    states.end_round()
    executor._states[1] = NEW
    states.finish_exchange(1)
    states.end_round()
    states.exclude(1)  # in another round, whose beginning is this state
    assert checkpoints.client_state(1) == NEW


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("entry", [Round(), Round(states="round")])
@pytest.mark.parametrize("before", [{1: OLD}, {}])
def test_encoders_forget_a_refused_upload_where_the_rest_is_kept(before, entry, served):
    states, _, checkpoints, _ = states_of(entry, {1: {**NEW, LEDGER: {}}}, before=before)
    if served:
        states.finish_exchange(1)
    states.exclude(1)
    kept = {name: value for name, value in before.get(1, {}).items() if name == STATES}
    assert checkpoints.client_state(1) == {"x": 2, LEDGER: {}, **kept}


def test_clients_of_a_stateless_method_keep_nothing():
    states, _, checkpoints, _ = states_of(Round(), {0: {}, 1: {"x": 1}}, stateless=True)
    states.finish_exchange(0)
    assert checkpoints.written == [(0, 4, {})]
    with pytest.raises(UserError, match="fedavg is declared stateless, but client 1 keeps state"):
        states.finish_exchange(1)


# -- ledger ------------------------------------------------------------------------------------------------------------


def test_ledger_counts_tensors_numbers_and_texts():
    message = {
        "a": torch.zeros(5),
        "b": {"c": torch.zeros(3, dtype=torch.float16), "n": 2},
        "t": "äb",
        "l": [1.0, None],
    }
    assert message_bytes(message) == 20 + 6 + 8 + 3 + 8
    due = {"a": Values((5, 2), torch.int8), "b": Maybe(Values(("any", 3))), "n": Number()}
    assert message_bytes(due) == 10 + 12 + 8
    ledger = Ledger(2)
    ledger.book(0, "up", message, phase=Phase(0, "level1", "update"))
    ledger.book(1, "down", message, phase=Phase(1, "level2", "update"))
    ledger.book(1, "down", message)
    summary = ledger.summary()
    assert (summary["up"], summary["down"], summary["one_off_down"], summary["total"]) == (45, 45, 45, 135)
    assert summary["clients"]["1"] == {"up": 0, "down": 45, "one_off_up": 0, "one_off_down": 45}


def test_ledger_tells_what_has_changed():
    ledger, rows = Ledger(1000), {}
    for number in range(1, 30):
        phase = Phase(number, "train", "update")
        ledger.book(number % 7, "up", 1.0, phase=phase)
        ledger.book(900, "down", "abc")
        changed = ledger.changed_rows()
        assert list(changed) == [number % 7, 900]
        rows |= changed
    assert (ledger.total_up, ledger.total_down) == (29 * 8, 0)
    again = Ledger(1000)
    again.restore(ledger.sums(), rows)
    assert again == ledger
    assert again.summary() == ledger.summary()
    assert again.changed_rows() == {}
