"""Connections between ranks over sockets, and the meeting of ranks, without torchrun."""

import contextlib
import socket
import time
from types import SimpleNamespace

import pytest
import torch

from fedkern.engine.transport import connection as module
from fedkern.engine.transport import torchrun_group
from fedkern.engine.transport.connection import SILENCE, WINDOW, Connection, Ended, Lost
from fedkern.engine.transport.torchrun_group import LaunchedRank, TorchrunGroup
from fedkern.errors import RunFailed, UserError
from fedkern.messages.packets import Packer, Unpacker
from fedkern.process import versions
from python_tests.interrupted import wait_until


@pytest.fixture
def ends():
    """Yield the sockets of rank 0 and of another rank."""
    zero, peer = socket.socketpair()
    yield zero, peer
    for end in (zero, peer):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # ends the threads


@pytest.fixture
def pair(ends):
    return Connection(ends[0], WINDOW), Connection(ends[1])


# -- packets -------------------------------------------------------------------------------------------------------


def test_objects_arrive_in_order_both_ways(pair):
    zero, peer = pair
    numbers = range(3 * WINDOW)  # more than may wait at the other end: a connection takes them all at once
    for number in numbers:
        zero.say(("down", number))
        peer.say(("up", number))
    assert [peer.receive_value() for _ in numbers] == [("down", number) for number in numbers]
    assert [zero.receive_value() for _ in numbers] == [("up", number) for number in numbers]
    assert zero.over is peer.over is None


def test_tensors_travel_once_until_their_files_are_forgotten(pair):
    zero, peer = pair
    packer, unpacker, held, found, sent = Packer(), Unpacker(), torch.randn(50_000), [], []
    for value in ([held], [held, torch.empty(0), torch.arange(3)], [held]):
        if len(found) == 2:
            zero.forget()
            unpacker.clear()
        zero.send(packer.pack(value))
        packet = peer.receive()
        sent.append(sum(map(len, packet.contents.values())) // held.nbytes)
        found.append(unpacker.unpack(packet))
        assert [tensor.tolist() for tensor in found[-1]] == [tensor.tolist() for tensor in value]
    assert found[1][0] is found[0][0]
    assert found[2][0] is not found[0][0]
    assert sent == [1, 0, 1]
    packer.clear()


def test_a_packet_is_taken_when_it_is_sent(pair):
    zero, peer = pair
    packer = Packer()
    zero.send(packer.pack(torch.arange(4.0)))
    packer.clear()  # closes the file, whose content may not have been sent yet
    assert Unpacker().unpack(peer.receive()).tolist() == [0, 1, 2, 3]


def test_who_asks_waits_no_longer_than_it_says(pair):
    zero, peer = pair
    assert zero.get(0.0) is None
    began = time.monotonic()
    assert zero.get(0.02) is None
    assert time.monotonic() - began >= 0.02
    peer.say("word")
    assert zero.get(5.0).value == "word"


def test_uploads_wait_where_they_were_made_and_an_end_goes_first(pair):
    zero, peer = pair
    for _ in range(10):
        peer.say(bytes(1 << 22))  # more than a socket holds
    taken = [zero.receive() for _ in range(WINDOW)]
    peer.leave(3, "why")
    with pytest.raises(Ended, match=r"^why$"):
        taken.extend(iter(zero.receive, None))
    assert len(taken) < 10
    zero.say("more")  # is dropped


def test_ends_that_say_nothing_beat(ends, monkeypatch):
    monkeypatch.setattr(module, "silence", lambda: 0.2)
    zero, peer = Connection(ends[0], WINDOW), Connection(ends[1])
    time.sleep(0.5)
    assert zero.get(0.0) is peer.get(0.0) is None
    peer.say("word")
    assert zero.receive_value() == "word"


# -- the end of a connection ---------------------------------------------------------------------------------------


def test_an_end_that_leaves_says_why(pair):
    zero, peer = pair
    peer.leave(3, "it could not go on")
    peer.leave(0)  # it has left
    wait_until(lambda: zero.over)
    for ask in (zero.receive, zero.receive_value, lambda: zero.get(0.0), lambda: zero.get(1.0)):
        with pytest.raises(Ended, match=r"^it could not go on$") as found:
            ask()
        assert (found.value.code, found.value.said) == (3, "it could not go on")
    began = time.monotonic()
    peer.wait_until_told(began + 0.05, heard=True)  # no answer
    assert time.monotonic() - began >= 0.05
    zero.leave(2)
    peer.wait_until_told(time.monotonic() + 5, heard=True)
    assert (peer.over.code, peer.over.said) == (2, "")


def test_a_lost_end_is_told_to_everybody_who_asks(pair, ends):
    ends[1].shutdown(socket.SHUT_RDWR)
    for connection in (*pair, pair[0]):
        with pytest.raises(Lost, match=r"^its connection was closed$"):
            connection.receive()


def test_a_silent_end_is_lost(ends, monkeypatch):
    monkeypatch.setattr(module, "silence", lambda: 0.2)
    with pytest.raises(Lost, match=r"^it was silent for 0\.2 seconds$"):
        Connection(ends[0]).receive()


# -- ranks that meet -----------------------------------------------------------------------------------------------

WORDS = ("fedavg", "--rounds", "3")


def teams(size):
    return [TorchrunGroup(LaunchedRank(rank, size, rank, size, 0, 0, "tests")) for rank in range(size)]


@pytest.fixture
def meet(ends, monkeypatch):
    """Return a function that lets two ranks meet.

    ``entries`` replace fields of `fedkern.process.versions` on rank 1.
    """
    monkeypatch.setattr(torchrun_group, "_met", False)
    monkeypatch.setattr(TorchrunGroup, "_connect", lambda self, seconds: {1 - self.rank: ends[self.rank]})

    def meet(words=WORDS, name="versions", **entries):
        zero, peer = teams(2)
        told = {**getattr(versions, name)(), **entries}
        with monkeypatch.context() as patch:
            patch.setattr(versions, name, lambda: told)
            peer.meet(words)
        zero.meet(WORDS)
        return zero, peer

    return meet


@pytest.mark.parametrize(
    ("name", "entries", "odd"),
    [
        ("versions", {"platform": "another"}, {}),
        ("kernels", {"isa": "another"}, {}),
        ("kernels", {"torch": "another"}, {1: "another"}),
    ],
)
def test_ranks_meet(meet, name, entries, odd):
    zero, peer = meet(name=name, **entries)
    assert torchrun_group.is_connected()
    assert (zero.rank, peer.rank, zero.size, zero.other_isas) == (0, 1, 2, odd)
    peer.connections[0].say("up")
    zero.connections[1].say("down")
    assert (zero.connections[1].receive_value(), peer.connections[0].receive_value()) == ("up", "down")


def test_ranks_that_were_started_otherwise_are_refused(meet):
    with pytest.raises(UserError, match=r"^Rank 1 was started with other arguments than rank 0 \(afl --rounds 3\): "):
        meet(("afl", "--rounds", "3"))


def test_ranks_with_other_versions_are_refused(meet):
    own = versions.versions()
    with pytest.raises(UserError) as found:
        meet(fedkern="0.0")
    installed = f"fedkern 0.0, torch {own['torch']}, and rank 0 fedkern {own['fedkern']}, torch {own['torch']}"
    assert str(found.value) == f"Rank 1 has {installed}: install the same versions on every machine."


def test_a_rank_that_ends_before_it_has_met(meet, ends):
    Connection(ends[1]).leave(2, "it has no GPU")
    with pytest.raises(RunFailed, match=r"^Rank 1 failed: it has no GPU$"):
        teams(2)[0].meet(WORDS)


def test_ranks_that_cannot_be_connected(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("MASTER_PORT", str(closed.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(SILENCE, "1")
    with pytest.raises(RunFailed, match=r"^The 2 ranks cannot be connected \(.*\): .* reach 127\.0\.0\.1 and each"):
        teams(2)[1].meet(WORDS)
    assert not torchrun_group.is_connected()


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
