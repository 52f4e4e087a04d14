"""Ranks that talk to each other, without torchrun: connections over queues, ranks that meet, and their sums."""

import math
import queue
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fedkern.engine.executors import connection as module
from fedkern.engine.executors import torchrun_group
from fedkern.engine.executors.connection import SILENCE, WINDOW, Connection, Ended, Lost, how
from fedkern.engine.executors.ranks import Spread
from fedkern.engine.executors.torchrun_group import LaunchedRank, TorchrunGroup
from fedkern.errors import RunFailed, UserError
from fedkern.messages.packets import Packer, Unpacker
from fedkern.methods.uploads import Kept
from fedkern.ops import Accumulator
from fedkern.process import versions
from python_tests.interrupted import wait_until


class Wires:
    """In place of torch.distributed's ``send`` and ``recv``: queues between rank 0 and rank 1.

    Attributes:
        heard: tensors that have come from a rank.
        carried: their bytes.
    """

    def __init__(self):
        self.queues = queue.SimpleQueue(), queue.SimpleQueue()  # by the rank that receives
        self.heard, self.carried = Counter(), Counter()
        self.connections = []
        self.over = False

    def connection(self, peer, *, serving):
        self.connections.append(Connection(peer, serving=serving))
        return self.connections[-1]

    def pair(self):
        return self.connection(1, serving=False), self.connection(0, serving=True)

    def send(self, tensor, dst):
        if self.over:
            raise RuntimeError("[pair.cc:81] Broken pipe")
        self.queues[dst].put(tensor.clone())

    def recv(self, tensor, src):
        found = self.queues[1 - src].get()
        if found is None:
            raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4321")
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)  # gloo, too, wants as many bytes
        tensor.copy_(found)
        self.carried[src] += found.nbytes
        self.heard[src] += 1

    def cut(self):
        self.over = True
        for each in self.queues:
            each.put(None)


@pytest.fixture
def wires(monkeypatch):
    made, deadline = Wires(), time.monotonic() + 5

    def check():
        assert time.monotonic() < deadline, "a test that would wait for ever"

    monkeypatch.setattr(module, "dist", made)
    monkeypatch.setattr(module, "_TICK", 0.01)  # threads look around often, so that no test waits for them
    monkeypatch.setattr(module, "check", check)
    yield made
    made.cut()
    for connection in made.connections:
        connection.leave(0)
        connection.left(time.monotonic() + 5, heard=True)


# -- packets -------------------------------------------------------------------------------------------------------


def test_objects_arrive_in_order_both_ways(wires):
    zero, one = wires.pair()
    numbers = range(3 * WINDOW)  # more than may wait at the other end: a connection takes them all at once
    for number in numbers:
        zero.say(("down", number))
        one.say(("up", number))
    assert [one.told() for _ in numbers] == [("down", number) for number in numbers]
    assert [zero.told() for _ in numbers] == [("up", number) for number in numbers]
    assert zero.over is one.over is None


def test_tensors_travel_once_until_their_files_are_forgotten(wires):
    zero, one = wires.pair()
    packer, unpacker, held, found, sent = Packer(), Unpacker(), torch.randn(50_000), [], []
    for value in ([held], [held, torch.empty(0), torch.arange(3)], [held]):
        if len(found) == 2:
            zero.forget()
            unpacker.clear()
        before = wires.carried[0]
        zero.send(packer.pack(value))
        found.append(unpacker.unpack(one.receive()))
        sent.append((wires.carried[0] - before) // held.nbytes)
        assert [each.tolist() for each in found[-1]] == [each.tolist() for each in value]
    assert found[1][0] is found[0][0]
    assert found[2][0] is not found[0][0]
    assert sent == [1, 0, 1]
    packer.clear()


def test_a_packet_is_taken_when_it_is_sent(wires):
    zero, one = wires.pair()
    packer = Packer()
    zero.send(packer.pack(torch.arange(4.0)))
    packer.clear()  # closes the file, whose content may not have been sent yet
    assert Unpacker().unpack(one.receive()).tolist() == [0, 1, 2, 3]


def test_who_asks_waits_no_longer_than_it_says(wires):
    zero, one = wires.pair()
    assert zero.get(0.0) is None
    began = time.monotonic()
    assert zero.get(0.02) is None
    assert time.monotonic() - began >= 0.02
    one.say("word")
    assert zero.get(5.0).value == "word"


def test_uploads_wait_where_they_were_made_and_an_end_goes_first(wires):
    zero, one = wires.pair()
    for number in range(WINDOW + 3):
        one.say(number)
    wait_until(lambda: wires.heard[1] == 2 * WINDOW)  # the size of a packet's pickle, and the pickle
    time.sleep(0.02)
    assert wires.heard[1] == 2 * WINDOW
    assert zero.told() == 0
    wait_until(lambda: wires.heard[1] == 2 * WINDOW + 2)
    one.leave(3, "why")
    one.left(time.monotonic() + 5)
    assert [zero.told() for _ in range(WINDOW)] == [*range(1, WINDOW + 1)]
    wait_until(lambda: zero.over)
    wires.cut()
    zero.say("more")  # is dropped
    zero.left(time.monotonic() + 5)
    with pytest.raises(Ended):
        zero.told()


def test_ends_that_say_nothing_beat(wires, monkeypatch):
    monkeypatch.setattr(module, "silence", lambda: 0.04)
    zero, one = wires.pair()
    wait_until(lambda: min(wires.heard[0], wires.heard[1]) > 2)
    assert zero.get(0.0) is one.get(0.0) is None
    assert zero.over is one.over is None
    one.say("word")
    assert zero.told() == "word"


# -- the end of a connection ---------------------------------------------------------------------------------------


def test_an_end_that_leaves_says_why(wires):
    zero, one = wires.pair()
    one.leave(3, "it could not go on")
    one.leave(0)  # it has left
    wait_until(lambda: zero.over)
    for ask in (zero.receive, zero.told, lambda: zero.get(0.0), lambda: zero.get(1.0)):
        with pytest.raises(Ended, match=r"^it could not go on$") as found:
            ask()
        assert (found.value.code, found.value.said) == (3, "it could not go on")
    began = time.monotonic()
    one.left(began + 0.02, heard=True)  # no answer
    assert time.monotonic() - began >= 0.02
    zero.leave(2)
    one.left(time.monotonic() + 5, heard=True)
    assert (one.over.code, one.over.said) == (2, "")


def test_a_lost_end_is_told_to_everybody_who_asks(wires):
    zero, one = wires.pair()
    one.say("last")
    wait_until(lambda: wires.heard[1] == 2)
    wires.cut()
    assert zero.told() == "last"
    for connection in (zero, one, zero):
        with pytest.raises(Lost, match=r"^its connection was closed$"):
            connection.receive()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Timed out waiting 7000ms for recv operation to complete", "it was silent for 7 seconds"),
        ("readv [127.0.0.1]:4321: Connection reset by peer", "its connection was closed"),
        ("no   such thing\n  at line 7", "no such thing"),
        ("", "RuntimeError"),
    ],
)
def test_how_an_end_was_lost(text, said, monkeypatch):
    monkeypatch.setenv(SILENCE, "7")
    assert how(RuntimeError(text)) == said


# -- ranks that meet -----------------------------------------------------------------------------------------------

WORDS = ("fedavg", "--rounds", "3")


def teams(size):
    return [TorchrunGroup(LaunchedRank(rank, size, rank, size, 0, 0, "tests")) for rank in range(size)]


@pytest.fixture
def meet(wires, monkeypatch):
    """Has two ranks meet; ``entries`` are what `fedkern.process.versions` tells otherwise on rank 1."""
    monkeypatch.setattr(torchrun_group, "_met", False)
    monkeypatch.setattr(torchrun_group, "Connection", wires.connection)
    monkeypatch.setattr(TorchrunGroup, "_connect", lambda self, limit: None)

    def meet(words=WORDS, name="versions", **entries):
        zero, one = teams(2)
        told = {**getattr(versions, name)(), **entries}
        with monkeypatch.context() as patch:
            patch.setattr(versions, name, lambda: told)
            one.meet(words)
        zero.meet(WORDS)
        return zero, one

    return meet


@pytest.mark.parametrize(
    ("name", "entries", "odd"),
    [
        ("versions", {"platform": "another"}, {}),
        ("kernels", {"isa": "another"}, {}),
        ("kernels", {"torch": "another"}, {1: "another"}),
    ],
)
def test_ranks_meet(meet, wires, name, entries, odd):
    zero, one = meet(name=name, **entries)
    assert torchrun_group.met()
    assert (zero.rank, one.rank, zero.size, zero.odd) == (0, 1, 2, odd)
    one.connections[0].say("up")
    for _ in range(WINDOW + 2):
        zero.connections[1].say("down")
    wait_until(lambda: wires.heard[0] > 2 * WINDOW + 2)  # what rank 0 says does not wait
    assert (zero.connections[1].told(), one.connections[0].told()) == ("up", "down")


def test_ranks_that_were_started_otherwise_are_refused(meet):
    with pytest.raises(UserError, match=r"^Rank 1 was started with other arguments than rank 0 \(afl --rounds 3\): "):
        meet(("afl", "--rounds", "3"))


def test_ranks_with_other_versions_are_refused(meet):
    own = versions.versions()
    with pytest.raises(UserError) as found:
        meet(fedkern="0.0")
    both = f"fedkern 0.0, torch {own['torch']}, and rank 0 fedkern {own['fedkern']}, torch {own['torch']}"
    assert str(found.value) == f"Rank 1 has {both}: install the same versions on every machine."


def test_a_rank_that_ends_before_it_has_met(meet, wires):
    wires.connection(0, serving=True).leave(2, "it has no GPU")
    with pytest.raises(RunFailed, match=r"^Rank 1 failed: it has no GPU$"):
        teams(2)[0].meet(WORDS)


def test_ranks_that_cannot_be_connected(meet, monkeypatch):
    def fails(self, limit):
        assert limit.total_seconds() == 7
        raise RuntimeError("no   route\nat line 7")

    monkeypatch.setattr(TorchrunGroup, "_connect", fails)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.9")
    for text, error, said in (
        ("7", RunFailed, r"^The 2 ranks cannot be connected \(no route\): .* reach 10\.0\.0\.9, "),
        ("soon", UserError, f'^{SILENCE} must be a number of seconds from 1 on, not "soon"'),
    ):
        monkeypatch.setenv(SILENCE, text)
        with pytest.raises(error, match=said):
            teams(2)[0].meet(WORDS)
    assert not torchrun_group.met()


def test_the_rank_that_fails_is_named():
    zero = teams(3)[0]
    zero.connections = {rank: SimpleNamespace(over=None) for rank in (1, 2)}
    zero.check()
    for over, said in (
        (Ended(1, "it was cold."), "^Rank 2 failed: it was cold"),
        (Lost("odd"), "^Rank 2 was lost, as odd:"),
    ):
        zero.connections[2].over = over
        with pytest.raises(RunFailed, match=said):
            zero.check()


# -- sums ----------------------------------------------------------------------------------------------------------


class Collectives:
    """In place of torch.distributed's reductions, between threads; all get the result."""

    ReduceOp = dist.ReduceOp

    def __init__(self, size):
        self.parts = []
        self.all_there = threading.Barrier(size, self._combine, timeout=5)

    def all_reduce(self, tensor, op, group):
        self.op = op
        self.parts.append(tensor)
        self.all_there.wait()
        tensor.copy_(self.result)

    def reduce(self, tensor, dst, op, group):
        assert dst == 0
        self.all_reduce(tensor, op, group)

    def _combine(self):
        parts, self.parts = torch.stack(self.parts), []
        self.result = parts.amax(0) if self.op == dist.ReduceOp.MAX else parts.sum(0)


def test_vectors_on_several_ranks_have_their_plain_sum(monkeypatch):
    """Terms of all magnitudes, some on rank 0 and the others on two ranks that add up their own."""
    monkeypatch.setattr(torchrun_group, "dist", Collectives(3))
    vectors = torch.randint(-1000, 1000, (9, 40)) * 2.0 ** torch.randint(-60, 60, (9, 40))
    weights, asked = [2.0, 1.0, 4.0, 0.5, 8.0, 3.0, 0.25, 7.0, 6.0], []

    def summed(size, terms):
        asked.append([kept.name for kept, _ in terms])
        own, found, weight = [Accumulator(size, exact=True) for _ in range(3)], [None] * 3, Accumulator(0, exact=True)
        for kept, factor in terms:
            own[kept.client].add(vectors[int(kept.name)], factor)
            weight.add(torch.empty(0), factor)

        def reduce(rank, ranks):
            found[rank] = ranks.reduced(own[rank], "cpu")

        threads = [threading.Thread(target=reduce, args=each) for each in enumerate(teams(3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = Accumulator(size, exact=True)
        total.load_state_dict(
            {**weight.state_dict(), "size": size, **dict(zip(("digits", "top"), found[0], strict=True))}
        )
        return total

    spread = Spread(Accumulator(40, exact=True), summed)
    rounds = ((3, []), (8, ["4", "5", "7"]), (9, ["8"]))
    for first, (last, terms) in zip((0, 3, 8), rounds, strict=True):
        asked.clear()
        for number in range(first, last):
            where = number % 3 if number > 2 else 0
            vector = Kept(where, str(number), 40, torch.float32) if where else vectors[number]
            spread.add(vector, torch.tensor(weights[number]) if number % 2 else weights[number])
        products = vectors[:last].double() * torch.tensor(weights[:last], dtype=torch.float64)[:, None]
        expected = [math.fsum(column) / sum(weights[:last]) for column in products.T.tolist()]
        assert torch.equal(spread.mean(), torch.tensor(expected))
        assert asked == ([terms] if terms else [])  # once, and only where there is something
