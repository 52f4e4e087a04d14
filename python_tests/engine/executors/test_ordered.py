"""Client order, replay and changed states over a transport whose processes are objects of the test."""

import weakref

import pytest

from fedkern.engine.executors.executor import Answer, Clear, Done, Forget, Job
from fedkern.engine.executors.ordered import Ordered
from fedkern.methods.base import Phase
from python_tests.stand_ins import Checkpoints, Context, Executor


class Process:
    """A process that adds up the messages of each client, as the client's state."""

    def __init__(self):
        self.sums, self.jobs = {}, []

    def take(self, k, state, played=()):
        self.sums[k] = state.get("sum", 0) + sum(message["x"] for _, _, message, _ in played)

    def forget(self):
        """Forget files, as :class:`~fedkern.messages.packets.PacketStream` does."""

    def ask(self, k, callee, phase, message, encoder=None):
        if message["x"] is None:
            raise ZeroDivisionError(f"client {k} has nothing to divide by")
        self.sums[k] += message["x"]
        return Answer(k, {"sum": self.sums[k]})

    def reply(self, job):
        """Do a job, as :class:`~fedkern.engine.executors.serial.Serial` does."""
        self.jobs.append(job)
        if job.state is not None:
            self.take(job.client, job.state, job.played)
        try:
            return Done(self.ask(job.client, *job.request), {"sum": self.sums[job.client]})
        except ZeroDivisionError as error:
            return Done(None, failed=error)


class Here(Process, Executor):
    """The run's own process, which asks for a client's state instead of receiving it."""

    def __init__(self):
        Executor.__init__(self)
        Process.__init__(self)

    def forget(self, k):
        Executor.forget(self, k)

    def working(self):
        return sorted(self.sums)

    def changed_state(self, k):
        return {"sum": self.sums[k]} if k in self.sums else None


class Transport(Ordered):
    """Two processes with as many clients each, whose replies come last client first.

    Attributes:
        told: messages to a process, besides its jobs.
        cleared: processes that were told to drop earlier tensors, and whether the round was over.
    """

    def __init__(self, checkpoints):
        super().__init__(Context(), Here(), checkpoints.reader)
        self._processes, self.told, self.cleared = [Process(), Process()], [], []

    def _begin(self):
        self.coming = []
        for k in self._requests:
            if self._processes:
                self._send(self._at.get(k, self._processes[k % len(self._processes)]), k)
            else:
                self._work(k)

    def _advance(self, k):
        if self.coming:
            later, reply = self.coming.pop()
            self._replies[later] = reply

    def _tell(self, process, message):
        if isinstance(message, Job):
            self.coming.append((message.client, process.reply(message)))
        elif isinstance(message, Clear):
            self.cleared.append((process, message.round_over))
        else:
            self.told.append((process, message))

    def lose(self, process):
        self._processes.remove(process)
        self._at = {k: at for k, at in self._at.items() if at is not process}


@pytest.fixture
def checkpoints():
    return Checkpoints({k: {"sum": 100 * k} for k in range(4)})


@pytest.fixture
def transport(checkpoints):
    return Transport(checkpoints)


def exchange(transport, x, clients=range(4)):
    """Return the answers to ``x``, or to each client's entry of ``x``."""
    messages = x if isinstance(x, dict) else dict.fromkeys(clients, x)
    return transport.answers("method", Phase(0, "train", "update"), {k: {"x": value} for k, value in messages.items()})


def sums(answers):
    return {answer.client: answer.message["sum"] for answer in answers}


def test_answers_and_changed_states_come_in_client_order(transport):
    answers, seen = exchange(transport, 1), []
    for answer in answers:
        seen.append((answer.client, answer.message["sum"], transport.changed_state(answer.client)))
        assert [transport.changed_state(k) for k in range(4)] == 4 * [None]  # each once, and at its turn
    assert seen == [(k, 100 * k + 1, {"sum": 100 * k + 1}) for k in range(4)]


def test_no_answer_is_held_while_later_clients_work(transport):
    answers = exchange(transport, 1)
    answer = weakref.ref(next(answers))
    assert answer() is None
    assert next(answers).client == 1


def test_an_exception_waits_for_its_clients_turn(transport):
    answers = exchange(transport, {0: 1, 1: 1, 2: None, 3: None})
    assert [next(answers).client for _ in range(2)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match=r"^client 2 "):
        next(answers)


def test_a_client_keeps_its_process_within_a_round(transport, checkpoints):
    assert sums(exchange(transport, 1)) == {k: 100 * k + 1 for k in range(4)}
    assert sums(exchange(transport, 2)) == {k: 100 * k + 3 for k in range(4)}
    jobs = transport._processes[1].jobs
    assert [(job.client, job.state, job.played) for job in jobs[:2]] == [(k, {"sum": 100 * k}, ()) for k in (1, 3)]
    assert [(job.client, job.state, job.played) for job in jobs[2:]] == [(k, None, ()) for k in (1, 3)]
    transport.end_round()
    checkpoints.write_client(1, 1, {"sum": 7})
    assert sums(exchange(transport, 1, [1])) == {1: 8}


def test_processes_drop_what_an_exchange_has_brought(transport):
    left, right = transport._processes
    for _ in range(2):
        list(exchange(transport, 1))
    transport.end_round()
    assert transport.cleared == [(process, over) for over in (False, False, True) for process in (left, right)]


@pytest.mark.parametrize("lost", [1, 2])
def test_the_round_of_a_client_whose_process_is_lost_begins_again(transport, checkpoints, lost):
    """The round moves to another process, or to the run's own if none is left."""
    assert sums(exchange(transport, 1)) == {k: 100 * k + 1 for k in range(4)}
    for k in range(4):  # what is written within the round is not what the round begins with
        checkpoints.write_client(k, 1, transport.changed_state(k))
    for process in transport._processes[:lost]:
        transport.lose(process)
    assert sums(exchange(transport, 2)) == {k: 100 * k + 3 for k in range(4)}
    assert sums(exchange(transport, 3)) == {k: 100 * k + 6 for k in range(4)}
    (survivor, *_) = [*transport._processes, transport.here]
    assert sorted(survivor.sums) == list(range(4))
    assert transport.here.working() == (list(range(4)) if lost == 2 else [])


def test_a_state_from_a_lost_process_gives_way_to_a_later_one(transport):
    assert len(list(exchange(transport, 1))) == 4
    for process in list(transport._processes):
        transport.lose(process)
    assert sums(exchange(transport, 2)) == {k: 100 * k + 3 for k in range(4)}  # in the run's own process
    assert [transport.changed_state(k)["sum"] for k in range(4)] == [3, 103, 203, 303]


def test_states_of_clients_whose_process_is_lost_are_not(transport):
    assert len(list(exchange(transport, 1))) == 4
    transport.lose(transport._processes[0])
    assert transport.working() == [0, 1, 2, 3]
    assert [transport.changed_state(k)["sum"] for k in range(4)] == [1, 101, 201, 301]


def test_a_forgotten_client_begins_with_its_present_state(transport, checkpoints):
    assert len(list(exchange(transport, 1))) == 4
    checkpoints.write_client(2, 1, transport.changed_state(2))
    transport.forget(2)
    assert transport.working() == [0, 1, 3]
    assert transport.told == [(transport._processes[0], Forget(2))]
    transport.lose(transport._processes[0])
    assert sums(exchange(transport, 5, [2])) == {2: 206}
    job = transport._processes[0].jobs[-1]
    assert (job.state, job.played) == ({"sum": 201}, ())


def test_a_client_is_forgotten_while_later_ones_work(transport):
    for answer in exchange(transport, 1):
        transport.forget(answer.client)
    assert transport.working() == []
    assert transport.told == [(transport._processes[k % 2], Forget(k)) for k in range(4)]
    assert [call for call in transport.here.calls if call[0] == "forget"] == [("forget", k) for k in range(4)]
