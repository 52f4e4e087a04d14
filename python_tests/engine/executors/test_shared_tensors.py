"""Packets between two processes, over a socket pair in one process: what arrives, and what holds files open."""

import os
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import FunctionType

import pytest
import torch

from fedkern.engine.executors.shared_tensors import Channel
from fedkern.messages.packets import NotPortable, Packer, Packet, Unpacker, only_code_bars

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
SOME = torch.arange(24.0).view(4, 6)
LAYOUTS = {
    "transposed": SOME.t(),
    "every second": SOME[:, ::2],
    "expanded": SOME[:1].expand(5, -1),
    "from the middle": SOME[2:],
    "channels-last": torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "conjugated": torch.complex(SOME, SOME).conj(),
    "negated": torch._neg_view(SOME),
}


def open_files():
    return len([*Path("/proc/self/fd").iterdir()])


class Wire:
    """A packer, a connection, and an unpacker at the other end."""

    def __init__(self, sender, receiver):
        self.sender, self.receiver = sender, receiver
        self.packer, self.unpacker = Packer(), Unpacker()

    def __call__(self, value):
        """Return the value at the other end."""
        self.sender.send(self.packer.pack(value))
        packet = self.receiver.receive()
        assert packet.extra == []
        return self.unpacker.unpack(packet)


@pytest.fixture
def wire():
    before = open_files()
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(5)  # a test that would wait for ever fails
    made = Wire(*map(Channel, ends))
    yield made
    made.packer.clear()
    for channel in (made.sender, made.receiver):
        channel.close()
    assert open_files() <= before


# -- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(wire, dtype):
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    value = [content.view(dtype).view(2, 3), content.view(dtype)[4], torch.empty(0, 3, dtype=dtype)]
    assert wire.packer.pack(value[2]).files == {}
    for found, expected in zip(wire(value), value, strict=True):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert found.data_ptr() % 64 == 0
        assert found.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(wire, name):
    tensor = LAYOUTS[name]
    found = wire(tensor)
    assert torch.equal(found, tensor)
    assert found.stride() == torch.empty_like(tensor).stride()  # what torch's own copies keep
    assert not found.is_conj()
    assert not found.is_neg()


def test_views_of_one_storage_and_one_tensor_twice(wire):
    tensor = torch.arange(6.0)
    found, part, again, (nested,) = wire((tensor, tensor[2:4], tensor, [tensor]))
    assert found is again is nested
    assert found.tolist() == [0, 1, 2, 3, 4, 5]
    assert part.tolist() == [2, 3]


def test_a_tensor_is_written_again_only_when_it_has_changed(wire):
    held = torch.arange(4.0)
    found = wire(held)
    written = set(wire.packer.pack(held).files)
    assert set(wire.packer.pack(held).files) == written
    assert not written & set(wire.packer.pack(torch.ones(2)).files)
    assert wire({"again": held, "new": torch.ones(2)})["again"] is found
    held.add_(1)
    assert wire(held).tolist() == [1, 2, 3, 4]
    assert found.tolist() == [0, 1, 2, 3]
    with torch.inference_mode():
        frozen = torch.ones(3)
    assert wire(frozen).tolist() == [1, 1, 1]


def test_every_reader_has_memory_of_its_own_and_nobody_writes_to_the_file(wire):
    held = torch.arange(4.0)
    packet = wire.packer.pack(held)
    (descriptor,) = packet.files.values()
    copies = [Packet(packet.payload, {n: os.dup(file) for n, file in packet.files.items()}) for _ in range(2)]
    copied, two = (Unpacker().unpack(copy) for copy in copies)
    copied.fill_(7)
    assert two.tolist() == held.tolist() == [0, 1, 2, 3]
    for change in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, 1)):
        with pytest.raises(PermissionError):
            change()


def test_what_has_come_stays_when_both_ends_forget(wire):
    held, before = torch.arange(4.0), open_files()
    found = [wire(held)]
    assert open_files() == before + 1  # the packer's; the reader has none open
    for packer_too in (False, True):
        if packer_too:
            wire.packer.clear()
            assert open_files() == before
        wire.sender.forget()
        wire.unpacker.clear()
        found.append(wire(held))
    assert len({*map(id, found)}) == 3
    assert [tensor.tolist() for tensor in found] == 3 * [[0, 1, 2, 3]]


# -- what cannot be sent -------------------------------------------------------------------------------------------


class Own:
    pass


def local():
    return lambda: None


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (local(), "<lambda>"),
        (threading.Lock(), "lock"),
        (type("Local", (Own,), {})(), "Local"),
        (torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(1, 1)), "parametrized modules"),
    ],
    ids=["function", "lock", "class", "parametrized"],
)
def test_what_cannot_be_sent_is_named_and_leaves_nothing_behind(wire, value, named):
    held, before = torch.arange(4.0), open_files()
    with pytest.raises(NotPortable, match=rf"^something that cannot be pickled \(.*{named}.*\)$"):
        wire.packer.pack({"held": held, "odd": [value]})
    assert open_files() == before
    assert only_code_bars(value) == isinstance(value, (FunctionType, Own, torch.nn.Module))
    assert wire(held).tolist() == [0, 1, 2, 3]  # it is not taken for sent


def test_what_main_defines_is_named(wire, monkeypatch):
    def helper():
        pass

    for named, sent in ((helper, helper), (Own, Own), (Own, Own())):
        with monkeypatch.context() as patch:
            patch.setattr(named, "__module__", "__main__")
            with pytest.raises(NotPortable, match=f"^{named.__qualname__}, which is defined in __main__,$"):
                wire.packer.pack([sent])


# -- the connection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1 << 14, 1 << 15, 1 << 22])
def test_a_packet_of_any_size_waits_for_its_reader(wire, size):
    before, content = open_files(), os.urandom(size)
    wire.sender.say("first")
    wire.sender.send(wire.packer.pack((content, torch.arange(3.0))))
    wire.sender.say("last")
    assert wire.receiver.receive_value() == "first"
    found, tensor = wire.unpacker.unpack(wire.receiver.receive())
    assert found == content
    assert tensor.tolist() == [0, 1, 2]
    assert wire.receiver.receive_value() == "last"
    assert open_files() == before + 1  # the packer's


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_descriptors_come_beside_a_packet(wire, size):
    reader, writer = os.pipe()
    wire.sender.send(replace(wire.packer.pack((torch.arange(3.0), bytes(size))), extra=[writer]))
    os.close(writer)
    packet = wire.receiver.receive()
    (received,) = packet.extra
    assert not os.get_inheritable(received)
    assert wire.unpacker.unpack(packet)[0].tolist() == [0, 1, 2]
    os.close(received)
    assert os.read(reader, 1) == b""  # nobody else has it open
    os.close(reader)


def test_a_file_travels_once_until_it_is_forgotten(wire):
    held, sent = torch.arange(4.0), []
    found = wire(held)
    for forgets in (False, True, False):
        if forgets:
            wire.sender.forget()
        wire.sender.send(wire.packer.pack(held))
        packet = wire.receiver.receive()
        sent.append(len(packet.files))
        assert wire.unpacker.unpack(packet) is found
    assert sent == [0, 1, 0]


def test_too_many_files_are_refused_and_nothing_is_sent(wire):
    packet = wire.packer.pack(torch.arange(4.0))
    (descriptor,) = packet.files.values()
    with pytest.raises(ValueError, match="packet: expected at most 250 files, given 251"):
        wire.sender.send(replace(packet, extra=[descriptor] * 250))
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(ValueError, match="packet: expected at most 250 files, given 251"):
        wire.sender.say(bytes(1 << 20), [descriptor] * 250)  # long: it has a file of its own
    assert set(Path("/proc/self/fd").iterdir()) == before
    wire.sender.send(replace(packet, extra=[descriptor] * 249))
    packet = wire.receiver.receive()
    for received in packet.extra:
        os.close(received)
    assert len(packet.extra) == 249
    assert wire.unpacker.unpack(packet).tolist() == [0, 1, 2, 3]


def test_a_closed_end(wire):
    wire.sender.say("unread")
    wire.receiver.say("last")
    wire.receiver.close()
    assert wire.sender.receive_value() == "last"
    for _ in range(3):  # the connection was reset, then it is over
        with pytest.raises(EOFError):
            wire.sender.receive()
        wire.sender.say("more")  # is dropped


@pytest.mark.parametrize("arrived", [1, 5, 20])
def test_a_message_that_is_cut(arrived):
    sender, two = socket.socketpair()
    Channel(sender).say("x" * 100)
    message = two.recv(1 << 16)
    sender.sendall(message + message[:arrived])
    sender.close()
    assert Channel(two).receive_value() == "x" * 100
    with pytest.raises(EOFError):
        Channel(two).receive()
    two.close()
