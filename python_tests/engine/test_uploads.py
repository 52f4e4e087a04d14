"""Uploads that break their declaration: refused before the server sees them, with their client named."""

import numpy as np
import pytest
import torch

from fedkern.downstream.saved_network import read_model
from fedkern.engine.run import run
from fedkern.engine.store.record_files import read_metrics
from fedkern.engine.uploads.declared import Declared
from fedkern.errors import RunFailed, UserError
from fedkern.methods import METHODS, Scaffold
from fedkern.methods.uploads import Maybe, all_finite, why_refused


def first(message):
    """Return the path of the first tensor or number in nested dicts, and the value there."""
    for key, value in message.items():
        if isinstance(value, dict) and not value:
            continue
        path, found = first(value) if isinstance(value, dict) else ((), value)
        return (key, *path), found
    raise AssertionError("nothing there")


def change_at(message, path, value):
    """Return a copy of nested dicts with another value at a path."""
    key, *deeper = path
    return {**message, key: change_at(message[key], deeper, value) if deeper else value}


def lacking(message, path):
    key, *deeper = path
    if deeper:
        return {**message, key: lacking(message[key], deeper)}
    return {name: value for name, value in message.items() if name != key}


def hostile(message):
    """Yield a name, an upload that differs from ``message``, and the beginning of the refusal."""
    path, value = first(message)
    name = ".".join(str(key) for key in path)

    def at(new):
        return change_at(message, path, new)

    yield "nothing at all", None, "is NoneType where a dict"
    yield "a list", [1, 2], "is list where a dict"
    yield "one more", {**message, "extra": torch.zeros(1)}, "should not hold extra"
    yield "a number for a name", {**message, 7: 7}, "should not hold 7"
    yield "a text", at("much"), f"has str {name} where a "
    yield "an array", at(np.zeros(3)), f"has ndarray {name} where a "
    yield "None", at(None), f"has NoneType {name} where a "
    if isinstance(value, torch.Tensor):
        yield "another shape", at(value.new_zeros((*value.shape, 1))), f"has {name} of shape"
        yield "flat", at(value.reshape(-1)[:0].reshape(0, 5, 5, 5, 5)), f"has {name} of shape"
        dtype = torch.float64 if value.dtype == torch.float32 else torch.float32
        yield "another dtype", at(value.to(dtype)), f"has {name} of shape"
        yield "a complex one", at(torch.zeros(value.shape, dtype=torch.complex64)), f"has {name} of shape"
        yield "no values", at(value.to("meta")), f"has {name} as a meta tensor"
        yield "a sparse one", at(value.to_sparse()), f"has {name} as a torch.sparse_coo tensor"
        if value.is_floating_point():
            for bad in (torch.nan, torch.inf, -torch.inf):
                spoiled = value.clone(memory_format=torch.contiguous_format)
                spoiled.view(-1)[-1] = bad
                yield str(bad), at(spoiled), f"holds NaN or infinite values in {name}"
    else:
        for bad in (float("nan"), float("inf"), True):
            yield str(bad), at(bad), f"has {'bool ' + name if bad is True else name}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_refuses_hostile_uploads(method, make_small, tmp_path, monkeypatch):
    """Honest uploads of every exchange pass.

    Every other upload is refused before a server sees it.
    """
    seen = {}
    decode = Declared.decode

    def watch(self, arrival):
        phase = arrival.asked.phase
        seen.setdefault((phase.name.split()[0], phase.exchange.split()[0]), (arrival.declared, arrival.message))
        return decode(self, arrival)

    config, data = make_small(method)
    with monkeypatch.context() as patch:
        patch.setattr(Declared, "decode", watch)
        run(config, out=tmp_path / "honest", data=data)
    assert any(declared for declared, _ in seen.values())
    for declared, answer in seen.values():
        assert why_refused(answer, declared) == ""
        if not answer:
            assert why_refused({"extra": 1}, declared) == "should not hold extra"
            continue
        for fault, message, said in hostile(answer):
            assert why_refused(message, declared).startswith(said), (fault, why_refused(message, declared))
        path, _ = first(answer)
        due = declared
        for key in path:
            due = due[key] if not isinstance(due, Maybe) else due.of[key]
        if not isinstance(due, Maybe) and not any(isinstance(entry, Maybe) for entry in declared.values()):
            assert why_refused(lacking(answer, path), declared) != ""
            assert why_refused({}, declared) == "is empty"

    # A whole run of which client 1 sends NaN once.
    spoilt = []

    def spoil(self, arrival):
        path, value = first(arrival.message) if arrival.message else ((), None)
        if arrival.client == 1 and not spoilt and isinstance(value, torch.Tensor) and value.is_floating_point():
            spoilt.append(arrival.asked.phase.exchange)
            arrival.message = change_at(arrival.message, path, torch.full_like(value, torch.nan))
        return decode(self, arrival)

    monkeypatch.setattr(Declared, "decode", spoil)
    if METHODS[method].pooled:
        return  # a single client
    with pytest.raises(UserError, match=r"^Client 1's upload .*(NaN or infinite|is expected).*--on-nan skip"):
        run(config, out=tmp_path / "stop", data=data)
    assert not (tmp_path / "stop" / "model.safetensors").exists()
    exchange = spoilt.pop()
    summary = run(config.replace(on_nan="skip"), out=tmp_path / "skip", data=data)
    assert summary["diagnostics"]["refused-upload-1"].startswith("Client 1's upload ")
    told = [*read_metrics(tmp_path / "skip"), summary]  # in the summary what happens after the last round
    dropped = [entry for record in told for entry in record.get("dropped", ())]
    assert [(entry["client"], entry["exchange"]) for entry in dropped] == [(1, exchange)]
    module, _ = read_model(tmp_path / "skip", client=0 if METHODS[method].keeps_head else None)
    assert all(all_finite(value) for value in module.state_dict().values())


def poison(kind, value, client=1, rounds=None):
    class Poisoned(kind):
        def client_update(self, place, phase, message):
            answer = super().client_update(place, phase, message)
            if place.id == client and (rounds is None or phase.round in rounds):
                answer = value(answer)
            return answer

    return Poisoned


def test_a_model_that_is_not_finite_is_not_written(make_data, make_config, tmp_path, monkeypatch):
    class Overflow(Scaffold):
        def server_update(self, server, phase, uploads):
            super().server_update(server, phase, uploads)
            if phase.round == 1:
                server.state["parameters"] = server.state["parameters"] * torch.inf

    monkeypatch.setitem(METHODS, "scaffold", Overflow)
    with pytest.raises(RunFailed, match=r"The model in round 2 is not finite \(parameters\)") as caught:
        run(make_config("scaffold", rounds=2), out=tmp_path, data=make_data())
    assert caught.value.exit_code == 1
    assert not (tmp_path / "model.safetensors").exists()
    assert len(read_metrics(tmp_path)) == 1


# -- the size of an update -----------------------------------------------------------------------------------------


def boost(answer):
    return {**answer, "parameters": answer["parameters"] + 100}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedproto", "afl"])
def test_a_large_update_is_clipped(method, make_data, make_config, tmp_path, monkeypatch):
    kind, sent = METHODS[method], {}

    class Watched(poison(kind, lambda answer: boost(answer) if "parameters" in answer else answer)):
        averages = True

        def server_update(self, server, phase, uploads):
            if phase.exchange == "update":
                start, uploads = server.state["parameters"].double(), list(uploads)
                norms = {u.client_id: float((u.message["parameters"] - start).norm()) for u in uploads}
                sent.update(norms)
            super().server_update(server, phase, iter(uploads))

    monkeypatch.setitem(METHODS, method, Watched)
    run(make_config(method, rounds=1, clip_update_norm=2.0), out=tmp_path, data=make_data())
    assert sent[1] == pytest.approx(2.0, rel=1e-4)
    (record,) = read_metrics(tmp_path)
    info = record["clients"]["1"]
    assert info["clipped"] == pytest.approx(2.0 / info["drift"], rel=1e-4)
    assert all(sent[k] <= 2.0 * (1 + 1e-6) for k in sent)


def test_a_bound_that_nothing_reaches_changes_no_bit(make_data, make_config, tmp_path):
    files = []
    for name, bounds in (("plain", {}), ("bound", {"max_update_norm": 1e6, "clip_update_norm": 1e6})):
        run(make_config(**bounds), out=tmp_path / name, data=make_data())
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
