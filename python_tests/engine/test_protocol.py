"""The engine under a method that uses all of the protocol: exchanges, personal messages, states, one-off rounds."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fedkern.engine.run import run
from fedkern.methods import METHODS, Method, Round, option, register
from fedkern.methods.uploads import Number
from fedkern.settings.stored import load_settings
from python_tests.interrupted import Kill, KillAt, outcome


class Probe(Method):
    """Two exchanges a round: clients tell a number, get it back with their count, and train."""

    @dataclass(frozen=True)
    class Options(Method.Options):
        step: float = option(0.5, "how far the server goes")

    trace: ClassVar[list] = []

    def start(self, server):
        server.state.update(vectors=server.initial(), total=0, log={"rounds": []})

    def rounds(self, federation):
        yield Round("hello", exchanges=("hello",), participants="all", one_off=True, trains="greetings")
        for r in range(federation.rounds):
            yield Round("train", exchanges=("ask", "tell"), participants="all" if r == 1 else "sampled")

    def send(self, server, phase):
        if phase.exchange == "tell":
            return {k: {"yours": torch.full((k + 1,), float(k))} for k in server.round_cache["answers"]}
        return {"total": server.state["total"]}

    def client_update(self, client, phase, message):
        self.trace.append((phase.round, phase.exchange, client.id, client.state.get("visits", 0)))
        if phase.exchange == "hello":
            client.state["visits"] = 0
            return {"n": client.samples}
        if phase.exchange == "ask":
            client.round_cache["asked"] = message["total"]
            return {"draw": float(client.rng("noise", phase).random())}
        assert torch.equal(message["yours"], torch.full((client.id + 1,), float(client.id)))
        assert "asked" in client.round_cache  # kept between the exchanges of a round
        client.state["visits"] += 1
        return {"visits": client.state["visits"]}

    def expects(self, server, phase, client, message):
        return {
            "hello": {"n": Number(low=1, whole=True)},
            "ask": {"draw": Number(0, 1)},
            "tell": {"visits": Number(low=1, whole=True)},
        }[phase.exchange]

    def server_update(self, server, phase, uploads):
        if phase.exchange == "ask":
            server.round_cache["answers"] = {u.client_id: u.message["draw"] for u in uploads}
            vectors = server.state["vectors"]
            vectors["parameters"] = vectors["parameters"] * (1 - 0.01 * sum(server.round_cache["answers"].values()))
        elif phase.exchange == "tell":
            for upload in uploads:
                server.state["total"] += upload.message["visits"]
            server.state["log"]["rounds"].append(phase.round)

    def model(self, server):
        return server.network(server.state["vectors"])


@pytest.fixture
def probe():
    register("probe")(Probe)
    Probe.trace = []
    yield Probe
    METHODS.pop("probe")


def test_exchanges_messages_and_states(probe, make_data, make_config, tmp_path):
    data, config = make_data(), make_config("probe", rounds=4, sample_fraction=0.4)
    summary = run(config, out=tmp_path / "whole", data=data)
    trace = list(probe.trace)
    assert [t[1:3] for t in trace[:3]] == [("hello", 0), ("hello", 1), ("hello", 2)]
    assert [t[2] for t in trace if t[0] == 1 and t[1] == "ask"] == [0, 1, 2]
    for r in range(4):
        asked = [t[2] for t in trace if t[:2] == (r, "ask")]
        assert asked == [t[2] for t in trace if t[:2] == (r, "tell")]
        assert len(asked) == (3 if r == 1 else 1)
    visits = {}
    for _, exchange, client, seen in trace:
        assert seen == visits.get(client, 0)
        visits[client] = seen + (exchange == "tell")
    # numbers are 8 bytes each, the personal tensors 4 (k + 1)
    tells = [t[2] for t in trace if t[1] == "tell"]
    assert summary["bytes"]["down"] == sum(8 + 4 * (k + 1) for k in tells)
    assert summary["bytes"]["up"] == 16 * len(tells)
    assert summary["bytes"]["one_off_up"] == summary["bytes"]["one_off_down"] == 24

    for hook in range(0, 14, 3):
        out = tmp_path / f"cut{hook}"

        try:
            run(config, out=out, data=data, listener=KillAt("client", hook))
        except Kill:
            run(load_settings(out), out=out, resume=True, data=data)
        assert outcome(out) == outcome(tmp_path / "whole")


def test_a_server_that_reads_nothing_still_lets_clients_work(probe, make_data, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "rounds", lambda self, federation: iter([Round(exchanges=("hello",))]))
    monkeypatch.setattr(probe, "server_update", lambda self, server, phase, uploads: None)
    run(make_config("probe"), out=tmp_path, data=make_data())
    assert len(probe.trace) == 3
