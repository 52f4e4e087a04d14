"""Stand-ins for the shared objects of a run, so that each part is tested without a run."""

import json
from types import SimpleNamespace

import torch

from fedkern.engine.context import Notices
from fedkern.engine.parts.part import Record
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.rounds.round_log import Timing
from fedkern.methods.base import Round
from fedkern.privacy.guarantee import Disclosure

PRIVATE = Disclosure(clients=False, server=False, derived_figures=())
SETTINGS = {
    "on_nan": "stop", "on_error": "stop", "eval_every": 1, "dropout_rate": 0.0, "straggler_rate": 0.0,
    "stragglers": "keep", "choose": "uniform", "devices": None, "deadline": None, "asynchronous": None,
}  # fmt: skip


class Context:
    """Stand-in for a run's context.

    Args:
        count: number of clients.
        disclosure: what may be disclosed; everything if None.
        **settings: of the run, beside or instead of settings without effect.
    """

    def __init__(self, count=3, disclosure=None, **settings):
        self.config = SimpleNamespace(**{**SETTINGS, "sampled_clients": count, "trained_clients": count, **settings})
        self.notices = Notices(Disclosure() if disclosure is None else disclosure)
        self.networks = SimpleNamespace(is_flat=lambda module: False)
        self.samples = SimpleNamespace()
        self.federation = SimpleNamespace(clients=count, samples=[10 * (k + 1) for k in range(count)])
        self.data = SimpleNamespace(client_names=None, client_label=str, clients=[None] * count, classes=("cat", "dog"))
        self.data.validation = [None]
        self.device, self.uploaded = torch.device("cpu"), []

    def name_entry(self, k):
        return {} if self.data.client_names is None else {"name": self.data.client_names[k]}


STORED = {
    "checkpoints": None, "metrics": None, "releases": None, "entry": None, "facts": {}, "check_lock": lambda: None,
    "part_states": dict,
}  # fmt: skip
"""The folder of a run that is nowhere."""


def run_objects(context=None, *, out=None, request=(), **given):
    """Return a stand-in for a run's objects.

    Args:
        context: a `Context`, or a context with what a part reads of it.
        out: the run folder.
        request: the request of the run.
        **given: further objects; those of `STORED` are in the run's store.
    """
    store = SimpleNamespace(out=out, **{name: given.pop(name, value) for name, value in STORED.items()})
    asked = {"profile": False, "predictions": False, "remote": None, **dict(request)}
    shared = {name: getattr(context, name, None) for name in ("config", "notices", "networks", "samples")}
    given = {**shared, "progress": Progress(), "timing": Timing(), **given}
    return SimpleNamespace(context=context, out=out, store=store, request=SimpleNamespace(**asked), **given)


class Executor:
    """Stand-in for an executor.

    Args:
        work: a client's answer to a message.
        states: the states that clients have changed, by client.
        calls: gets ``(name, client)`` of every call.
        here: the executor of the server's process; None: this executor.
    """

    count, remote = 1, False

    def __init__(self, work=None, states=None, calls=None, here=None):
        self._work, self._states = work, {} if states is None else states
        self.here = self if here is None else here
        self.calls = [] if calls is None else calls
        self.asked, self.phases, self.encoders = [], [], None

    def answers(self, callee, phase, messages, encoders=None):
        self.encoders = encoders
        self.phases.append(phase)
        for k, message in messages.items():
            self.calls.append(("works", k))
            self.asked.append((callee, phase.exchange, k))
            yield self._work(k, message)

    def changed_state(self, k):
        return self._states.pop(k, None)

    def working(self):
        return sorted(self._states)

    def forget(self, k):
        self.calls.append(("forget", k))

    def end_round(self):
        self.calls.append(("end round", None))


class Checkpoints:
    """Stand-in for the checkpoints, which remembers the clients of every saved state and the plan's round.

    Args:
        states: the clients' states of round 0, by client.
    """

    def __init__(self, states=None):
        self.written, self._files = [], {(k, 0): state for k, state in (states or {}).items()}
        self.clients = {k: (k, 0) for k in states or {}}

    def write_client(self, k, plan, state):
        self.written.append((k, plan, state))
        self.clients[k] = (k, plan)
        self._files[k, plan] = state

    def name_client(self, k, file):
        self.clients[k] = file

    def client_state(self, k):
        return dict(self._files.get(self.clients.get(k), {}))

    def reader(self, k):
        file = self.clients.get(k)
        return lambda: dict(self._files.get(file, {}))


def record(number=1, rounds=3, entry=None, **given):
    """Return the record of a communication round, or of a set-up round where the number is negative."""
    return Record(entry or Round(one_off=number < 0), number, rounds, [0, 1], **given)


def values(record):
    """Return the values of a record, by name."""
    return {name: value for name, (_, value) in record.entries.items()}


def about(record, kind):
    """Return the names of a record's entries about one kind of thing."""
    return {name for name, (found, _) in record.entries.items() if found is kind}


def round_trip(state):
    """Return the state of a part as a checkpoint gives it back."""
    return json.loads(json.dumps(state, allow_nan=False))
