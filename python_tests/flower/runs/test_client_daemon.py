"""The process that stays on a node: its answers, its lifetime, and lost processes.  Needs no Flower."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedkern.errors import Malformed, UserError
from fedkern.flower.array_bytes import pack_value, unpack_value
from fedkern.flower.runs import client_daemon, node_process
from fedkern.flower.runs.node_client import PROTOCOL
from python_tests.interrupted import wait_until

pytestmark = [
    pytest.mark.exhaustive,  # processes that are waited for; nodes without a daemon are in the default run
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="daemons need Linux"),
]

RUN = {
    "method": "fedavg", "data": "digits", "clients": 2, "train-samples": 40, "width": 2, "rounds": 2, "local-steps": 2,
    "batch-size": 8, "grad-cam": 0, "threads": 1, "client-threads": 1, "device": "cpu",
}  # fmt: skip
ASKING = """
import json, sys
from pathlib import Path
from fedkern.flower.runs import client_daemon
header, message, run, node, stays = json.loads(Path(sys.argv[1]).read_text())
found = client_daemon.ask_daemon(header, bytes.fromhex(message), run, node, print, stays)
assert "torch" not in sys.modules
print(found[:1000])
"""


def node(tmp_path, client=1):
    return {"partition-id": client, "num-partitions": 2, "state-dir": str(tmp_path / "states")}


def header(client=1, round=0, run="0" * 32):
    found = {
        "protocol": PROTOCOL, "run": run, "attempt": "a" * 32, "client": client, "callee": "method",
        "phase": [round, "train", "update"], "version": [round + 1, 0], "begin": None, "oldest": 1, "last": True,
        "threads": 1, "client_threads": 1, "plan": "", "data": None,
    }  # fmt: skip
    return json.dumps(found)


@pytest.fixture(scope="module")
def message(tmp_path_factory):
    """Return the server's message of the first round."""
    from fedkern.engine.server import Server
    from fedkern.flower.runs.node_client import on_node
    from fedkern.methods import method_registry
    from fedkern.methods.base import Phase
    from fedkern.methods.protocol import BEFORE
    from fedkern.settings.config import RunConfig

    kind = method_registry.get("fedavg")
    settings = {name.replace("-", "_"): value for name, value in RUN.items() if name != "method"}
    context = on_node(RunConfig.make("fedavg", **settings))
    method, server = kind(kind.Options.parse(context.config.options, method="fedavg")), Server(context)
    with context.drawing(server, BEFORE):
        method.start(server)
    return pack_value(method.send(server, Phase(0, "train", "update")))


def daemons(of: str = "parent", number: int = 0) -> list[int]:
    """Return the living daemons: children of this process, or members of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            is_own = int(group) == number if of == "group" else int(parent) == os.getpid()
            if is_own and state != "Z" and b"client_daemon import live" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def wait_for_none() -> None:
    wait_until(lambda: not daemons(), 20)


@pytest.fixture(autouse=True)
def _end_daemons():
    yield
    node_process.drop_clients()
    for pid in daemons():
        os.kill(pid, signal.SIGKILL)
    wait_for_none()


def answer_of(packed):
    """Return an answer without its duration."""
    found = unpack_value(packed)
    plain = {name: value for name, value in found.items() if name not in ("seconds", "message")}
    return plain, pack_value(found["message"])


def test_a_daemon_gives_the_bits_of_this_process_and_stays(message, tmp_path):
    local = node_process.answer_message(header(), message, RUN, node(tmp_path / "here"), print)
    assert answer_of(local)[0]["problem"] is None
    remote = client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 60)
    assert answer_of(remote) == answer_of(local)
    (daemon,) = daemons()
    again = client_daemon.ask_daemon(header(round=1), message, RUN, node(tmp_path), print, 60)
    assert answer_of(again)[0]["problem"] is None
    assert daemons() == [daemon]


@pytest.mark.exhaustive
def test_daemons_belong_to_one_run_and_one_configuration(message, tmp_path):
    client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 60)
    client_daemon.ask_daemon(header(run="1" * 32), message, RUN, node(tmp_path), print, 60)
    client_daemon.ask_daemon(header(client=0), message, RUN, node(tmp_path, 0), print, 60)
    assert len(daemons()) == 3


@pytest.mark.exhaustive
def test_a_daemon_ends_when_no_message_comes_and_the_next_starts_another(message, tmp_path):
    answer = client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 0.2)
    wait_for_none()
    again = client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 0.2)
    assert answer_of(again) == answer_of(answer)


@pytest.mark.exhaustive
def test_a_killed_daemon_is_replaced(message, tmp_path):
    answer = client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 60)
    os.kill(*daemons(), signal.SIGKILL)
    wait_for_none()
    assert answer_of(client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 60)) == answer_of(answer)


def test_a_daemon_ends_with_its_run(message, tmp_path):
    for run in ("0" * 32, "1" * 32):
        client_daemon.ask_daemon(header(run=run), message, RUN, node(tmp_path), print, 60)
    older, younger = daemons()
    client_daemon.end_daemon("2" * 32, node(tmp_path))
    assert daemons() == [older, younger]
    client_daemon.end_daemon("0" * 32, node(tmp_path))
    wait_until(lambda: len(daemons()) == 1, 20)
    again = client_daemon.ask_daemon(header(run="1" * 32, round=1), message, RUN, node(tmp_path), print, 60)
    assert answer_of(again)[0]["problem"] is None


def test_a_silent_connection_holds_nobody_up(message, tmp_path, monkeypatch):
    live = "from fedkern.flower.runs.client_daemon import live"
    impatient = f"from fedkern.flower.runs import client_daemon as process; process.PATIENCE = 0.3; {live}"
    monkeypatch.setattr(client_daemon, "_MAIN", client_daemon._MAIN.replace(live, impatient))
    client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 60)
    (daemon,) = daemons()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as silent:
        silent.connect(client_daemon._name("0" * 32, node(tmp_path)))
        silent.sendall(b"\0\0")  # the beginning of a message
        again = client_daemon.ask_daemon(header(round=1), message, RUN, node(tmp_path), print, 60)
    assert answer_of(again)[0]["problem"] is None
    assert daemons() == [daemon]


def test_what_a_node_refuses_is_refused_by_the_daemon(message, tmp_path):
    with pytest.raises(Malformed, match="is for client 0, and this node is client 1"):
        client_daemon.ask_daemon(header(client=0), message, RUN, node(tmp_path), print, 60)
    with pytest.raises(UserError, match="partition-id must be a number"):
        client_daemon.ask_daemon(header(), message, RUN, {**node(tmp_path), "partition-id": 9}, print, 60)
    found = client_daemon.ask_daemon(header(), message, {**RUN, "no-such-key": 1}, node(tmp_path), print, 60)
    assert 'unknown key "no-such-key"' in unpack_value(found)["problem"]["what"]


def test_a_daemon_ends_with_the_process_that_starts_messages(message, tmp_path):
    """Like a SuperNode, one process starts a short one for each message, and is killed later."""
    told_of = tmp_path / "message.json"
    told_of.write_text(json.dumps([header(), message.hex(), RUN, node(tmp_path), 60]))
    script = (
        "import subprocess, sys, time\n"
        "subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True)\n"
        "print('answered', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, ASKING, str(told_of)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            lines = list(itertools.takewhile(lambda line: line != "answered\n", process.stdout))
            assert '"problem",null' in lines[-1].replace("\\", "")
            assert len(daemons("group", process.pid)) == 1
        finally:
            process.kill()
    wait_until(lambda: not daemons("group", process.pid), 20)


# -- the two ends, without a process -----------------------------------------------------------------------------------


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb") as replies, theirs.makefile("rb") as requests:
        yield ours, replies, theirs, requests


PARCEL = bytes(range(256))


def test_messages_come_as_they_were_sent(ends):
    ours, replies, theirs, requests = ends
    client_daemon.send(ours, {"header": "é"}, PARCEL)
    assert client_daemon.receive(requests) == ({"header": "é"}, PARCEL)
    client_daemon.send(theirs, {"begun": True})
    assert client_daemon.receive(replies) == ({"begun": True}, b"")


def test_notices_reach_whoever_asks(ends):
    ours, replies, theirs, _ = ends
    heard = []
    for text in ("decoding", "decoded"):
        client_daemon.send(theirs, {"begun": True} if not heard else {"notice": text})
        heard.append(text)
    client_daemon.send(theirs, {}, PARCEL)
    said = []
    assert client_daemon._exchange(ours, replies, {}, PARCEL, said.append) == PARCEL
    assert said == ["decoded"]


@pytest.mark.parametrize(("begun", "error"), [(False, client_daemon._Gone), (True, client_daemon.Lost)])
def test_a_daemon_that_is_lost(ends, begun, error):
    """Another daemon may answer before this one has taken the message.

    Afterwards only the server can ask again.
    """
    ours, replies, theirs, _ = ends
    if begun:
        client_daemon.send(theirs, {"begun": True})
    theirs.sendall(b"\0")  # a part of a frame
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        client_daemon._exchange(ours, replies, {"header": ""}, PARCEL, print)


@pytest.mark.parametrize("error", [Malformed("is none"), UserError("no data"), RuntimeError("KeyError: 'phase'")])
def test_what_a_daemon_raises_is_raised_where_it_was_asked(ends, error):
    ours, replies, theirs, requests = ends

    def answer(*_):
        raise KeyError("phase") if isinstance(error, RuntimeError) else error

    served = threading.Thread(target=client_daemon._serve, args=(theirs, requests, answer))
    served.start()
    with pytest.raises(type(error), match=re.escape(str(error))):
        client_daemon._exchange(ours, replies, {"header": "", "run_config": {}, "node": {}}, PARCEL, print)
    served.join()


def test_nobody_waits_for_an_answer(ends):
    """A daemon whose callee is killed finishes its work, and hears the next one."""
    ours, replies, theirs, requests = ends
    client_daemon.send(ours, {"header": "", "run_config": {}, "node": {}}, PARCEL)

    def answer(header, packed, run_config, node, notice):
        replies.close()
        ours.close()
        notice("half of it is done")
        return packed

    with pytest.raises(BrokenPipeError):
        client_daemon._serve(theirs, requests, answer)


def test_no_daemon_of_somebody_else(message, tmp_path, monkeypatch):
    monkeypatch.setattr(client_daemon, "user_of", lambda link: os.geteuid() + 1)
    assert client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 5) is None


def test_a_name_that_somebody_has_and_does_not_listen_to(message, tmp_path, monkeypatch):
    monkeypatch.setattr(client_daemon, "_PAUSE", 0.0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as taken:
        taken.bind(client_daemon._name("0" * 32, node(tmp_path)))
        assert client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 5) is None


def test_no_daemon_where_the_system_forbids_it(message, tmp_path, monkeypatch):
    def forbidden(process):
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", forbidden)
    assert client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 5) is None
    assert daemons() == []


def test_no_daemon_without_linux(message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert client_daemon.ask_daemon(header(), message, RUN, node(tmp_path), print, 5) is None
    assert daemons() == []
