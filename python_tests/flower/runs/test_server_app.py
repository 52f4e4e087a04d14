"""Complete runs over Flower against the same runs in one process, through nodes that keep only their disk."""

import contextlib
import json
import re
import tomllib

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install '.[flower]'")

from flwr.app import Message
from safetensors.torch import load, load_file, save

from fedkern.engine.run import run
from fedkern.engine.store.extending import check_extension
from fedkern.engine.store.record_files import read_metrics
from fedkern.errors import Malformed, RunFailed, UserError
from fedkern.flower.adapter import make_reply, unpack_message
from fedkern.flower.array_bytes import pack_value, unpack_value
from fedkern.flower.runs import client_app, node_client, node_executor, node_process, run_settings, server_app
from fedkern.messages.states import ABOUT
from fedkern.methods import FedAvg, method_registry
from fedkern.ops._core.backend import active_isa
from fedkern.settings.config import RunConfig
from python_tests.engine.executors.test_ranks import OF_ROWS
from python_tests.flower.node_grid import NodeGrid, report_gone, silent
from python_tests.interrupted import outcome
from python_tests.test_own_dataset import NEED_PUBLIC, SERVING, words_of, write_images

pytestmark = [pytest.mark.flower, pytest.mark.usefixtures("alone")]

TINY = {
    "data": "digits", "clients": 3, "train-samples": 60, "width": 2, "rounds": 2, "local-epochs": 1, "batch-size": 8,
    "grad-cam": 0, "threads": 1, "client-threads": 1, "on-nan": "skip", "on-error": "skip", "device": "cpu",
    "flower.wait": 0.0, "flower.deadline": 0.2,
}  # fmt: skip
METHODS = {
    "fedavg": {},
    "scaffold": {"method-option.control": "I"},
    "fedgid": {"data": "", "method-option.alpha": 0.5},
    "fusefl": {"rounds": "", "local-epochs": 4, "method-option.blocks": 3, "method-option.frozen_bn": "code"},
    "fedlpfm": {"public-samples": 20, "partition": "iid"},
    "fediod": {
        "local-epochs": 2, "method-option.ngf": 2, "method-option.ndf": 2,
        "method-option.batch": 8, "method-option.student_steps": 2, "method-option.iterations": 2,
        "method-option.batched": False,
    },
    "feddra": {
        "data": "captions", "train-samples": 80, "width": 4, "local-epochs": "", "local-steps": 2, "clients": "",
        "method-option.alignment_steps": 1,
    },
}  # fmt: skip
DEFAULT = ("fedavg", "scaffold")
EVERY = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.exhaustive) for name in METHODS]
OVER_FLOWER = [
    name
    for name in SERVING
    if name not in NEED_PUBLIC and not RunConfig.make(name).own_networks and not RunConfig.make(name).kind.pooled
]
OF_SIMULATIONS = {"fediod", "fusefl"}
"""Methods whose summary has figures of all clients' data, which nodes do not give."""


def settings(method, **options):
    return {**TINY, "method": method, **METHODS[method], **options}


def in_one_process(run_config, out):
    config = run_settings.read_run_config(
        {key: v for key, v in run_config.items() if key not in ("out", "resume")}
    ).config
    run(config, out=out)
    return outcome(out)


def over_flower(run_config, out, clients=range(3), faults=None, **options):
    """Play a run and return the grid."""
    grid = NodeGrid({**run_config, "out": str(out)}, clients, faults, **options)
    server_app.play(grid, grid.run_config)
    return grid


def same(found, expected, method):
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    if method not in OF_SIMULATIONS:
        assert found[2] == expected[2]
    assert found[2]["metrics"].items() <= expected[2]["metrics"].items()


def check_bits(run_config, tmp_path, clients=range(3), **options):
    """Play a run over Flower and in one process, and return the grid and the outcome."""
    expected = in_one_process(run_config, tmp_path / "here")
    grid = over_flower(run_config, tmp_path / "flower", clients, **options)
    same(outcome(tmp_path / "flower"), expected, run_config["method"])
    return grid, expected


def kill_and_resume(run_config, out, at):
    """Kill the server when client 1 is asked for the time with number ``at``, and finish the run."""
    with pytest.raises(Killed):
        over_flower(run_config, out, faults={(1, at): killing})
    over_flower({**run_config, "resume": True}, out)


def dropped_clients(out):
    return [entry for record in read_metrics(out) for entry in record.get("dropped", [])]


class Killed(BaseException):
    """A stand-in for kill -9 of the server."""


def killing(message, context):
    raise Killed


# -- the bits of one process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
def test_every_method(method, tmp_path):
    run_config = settings(method)
    expected = in_one_process(run_config, tmp_path / "here")
    found = expected[2]["clients"]
    grid = over_flower(run_config, tmp_path / "flower", range(found))
    same(outcome(tmp_path / "flower"), expected, method)
    assert set(grid.asked) == set(range(found))
    kept = list((tmp_path / "cache" / "flower").glob("*/client-*"))
    assert len(kept) == found


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", OVER_FLOWER)
def test_images_of_a_data_set_of_ones_own(method, tmp_path):
    flags = words_of(method, write_images(tmp_path / "x.npz"))
    batched = {"method-option.batched": False} if method == "fediod" else {}
    check_bits({"method": method, **flags, **batched, "flower.wait": 0.0}, tmp_path, lives=True)


@pytest.mark.parametrize("name", ["rows", "local_rows"])
def test_rows_of_a_data_set_of_ones_own(name, tmp_path):
    (tmp_path / "own.py").write_text(OF_ROWS)
    code = {"data": f"{tmp_path / 'own.py'}:{name}", "model": f"{tmp_path / 'own.py'}:Linear"}
    chosen = {"sample-fraction": 0.7, "choose": "loss"}
    check_bits({**TINY, "method": "scaffold", **code, **chosen, "train-samples": "", "width": ""}, tmp_path)


def test_nodes_accelerate_a_user_s_network_as_the_server_decided(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    def stage(one): return nn.Conv2d(one, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)\n"
        "    return nn.Sequential(*stage(1), *stage(16), nn.Flatten(), nn.Linear(16 * 64, classes))\n"
    )
    check_bits(settings("fedavg", model=f"{tmp_path / 'net.py'}:net", width=""), tmp_path)
    record = tomllib.loads((tmp_path / "here/config.toml").read_text())["served"]
    assert record == "served 2 of 2 convolutions" or not active_isa().startswith("avx")


@pytest.mark.parametrize("method", [pytest.param("fediod", marks=pytest.mark.exhaustive), "scaffold"])
def test_nodes_that_stay_in_memory(method, tmp_path):
    check_bits(settings(method), tmp_path, lives=True)


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_s_end_ends_its_processes_on_the_nodes(ends, tmp_path):
    # Also if the run fails.
    faults = (
        {} if ends else {(1, 0): replied_with(problem={"kind": "failed", "what": "", "traceback": ""}, message=None)}
    )
    run_config = settings("fedavg", rounds=1, **({} if ends else {"on-error": "stop"}))
    with contextlib.nullcontext() if ends else pytest.raises(RunFailed):
        over_flower(run_config, tmp_path / "run", faults=faults, lives=True)
    assert node_process._here is None


def test_a_node_keeps_the_states_of_its_last_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(node_client, "KEPT_RUNS", 2)
    (tmp_path / "notes").mkdir()
    names = [str(i) * 32 for i in range(4)]
    for name in names:
        node_client.NodeFolder(tmp_path, name, 0)
        node_client.NodeFolder(tmp_path, names[0], 1)  # goes on beside the others
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], names[3], "notes"]


@pytest.mark.exhaustive
def test_a_private_run_tells_no_more_than_in_one_process(tmp_path):
    """The noise is the clients' secret, so two runs differ.

    A resumed run repeats its releases.
    """
    options = {"method-option.epsilon": 8.0, "method-option.teacher_dp": True}
    run_config = settings("fediod", model="resnet8-gn", **options)
    expected = in_one_process(run_config, tmp_path / "here")
    kill_and_resume(run_config, tmp_path / "run", 10)
    found = outcome(tmp_path / "run")
    assert found[2]["privacy"] == expected[2]["privacy"]
    assert "wire" not in json.loads((tmp_path / "run/summary.json").read_text())
    assert [record.keys() for record in found[1]] == [record.keys() for record in expected[1]]
    assert not dropped_clients(tmp_path / "run")
    assert all(path.stat().st_size for path in (tmp_path / "cache" / "flower").glob("*/client-*/releases.jsonl"))


@pytest.mark.exhaustive
def test_states_of_the_last_rounds_are_kept(tmp_path):
    over_flower(settings("scaffold", rounds=6), tmp_path / "run")
    (folder,) = (tmp_path / "cache" / "flower").glob("*/client-00001")
    rounds = {int(path.name[6:12]) for path in folder.glob("state-*")}
    assert (
        {5, 6} <= rounds <= {3, 4, 5, 6}
    )  # the server may have written two checkpoints less than it has played rounds
    assert not list(folder.glob("message-*"))


@pytest.mark.exhaustive
def test_a_plugin_with_its_own_network(tmp_path, monkeypatch):
    """A project's code is found where Flower puts the project on sys.path."""
    from fedkern.run import main
    from fedkern.usercode import plugins
    from python_tests.flower.runs.test_project import FLAGS, MODEL, PLUGIN, run_config

    (tmp_path / "halved.py").write_text(
        PLUGIN.replace("return message", "return super().client_update(client, phase, message)")
    )
    (tmp_path / "net.py").write_text(MODEL)
    code = ("--plugin", str(tmp_path / "halved.py"), "--model", f"{tmp_path / 'net.py'}:Net")
    words = ("halved", *FLAGS, *code, "--train-samples", "60", "--threads", "1", "--client-threads", "1")
    try:
        assert main([*words, "--out", str(tmp_path / "here"), "--quiet"]) == 0
        assert main([*words, "--flower", str(tmp_path / "project")]) == 0
        plugins.unload(str(tmp_path / "halved.py"))
        monkeypatch.syspath_prepend(str(tmp_path / "project"))
        found = {**run_config(tmp_path / "project"), "flower.wait": 0.0}
        over_flower(found, tmp_path / "run", range(4))
    finally:
        for folder in (tmp_path, tmp_path / "project"):
            plugins.unload(str(folder / "halved.py"))
    local, remote = outcome(tmp_path / "here"), outcome(tmp_path / "run")
    assert remote[1] == local[1]
    assert remote[0][-100:] == local[0][-100:]  # the weights; the head of the file names the network by its path


@pytest.mark.exhaustive
def test_pictures_and_a_report(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache"))
    over_flower(settings("fedavg", report=True, predictions=True), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"report.html", "predictions.csv", "flower.json", "model.safetensors"} <= names
    assert any(name.endswith(".png") for name in names)


# -- the server is killed, and resumed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "at"),
    [("scaffold", 2), pytest.param("fediod", 6, marks=pytest.mark.exhaustive),
     pytest.param("fedgid", 2, marks=pytest.mark.exhaustive),
     pytest.param("scaffold", 0, marks=pytest.mark.exhaustive)],
)  # fmt: skip
def test_a_killed_server_goes_on_with_the_same_bits(method, at, tmp_path):
    run_config = settings(method, rounds=3)
    expected = in_one_process(run_config, tmp_path / "here")
    kill_and_resume(run_config, tmp_path / "run", at)
    same(outcome(tmp_path / "run"), expected, method)


def test_a_run_goes_on_where_its_states_are(tmp_path):
    run_config = settings("fedavg")
    with pytest.raises(Killed):
        over_flower(run_config, tmp_path / "run", faults={(1, 1): killing})
    config = run_settings.read_run_config(run_config).config
    with pytest.raises(UserError, match=r"are on nodes of Flower: go on with flwr run"):
        run(config, out=tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"resume=true goes on with a run: name its folder"):
        server_app.play(NodeGrid({}, ()), {**run_config, "resume": True})
    with pytest.raises(UserError, match="already holds a run"):
        over_flower(run_config, tmp_path / "run")
    with pytest.raises(UserError, match="are on nodes of Flower, where no run is extended"):
        check_extension(tmp_path / "run", 5)
    (tmp_path / "run" / "flower.json").unlink()
    with pytest.raises(UserError, match="was not begun over Flower"):
        over_flower({**run_config, "resume": True}, tmp_path / "run")


# -- faults ----------------------------------------------------------------------------------------------------------


def changed_reply(change):
    """Return a node whose reply is changed on the way."""

    def fault(message, context):
        reply = client_app.app(message, context)
        _, packed = unpack_message(reply)
        return make_reply(message, change(packed))

    return fault


def with_text(change):
    """Return a node whose reply has a changed JSON tree beside its tensors."""

    def change_text(packed):
        text = head_of(packed)["__metadata__"][ABOUT]
        return save(load(packed), {ABOUT: change(text)})

    return changed_reply(change_text)


def head_of(packed):
    return json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])


def with_upload(change):
    def change_message(packed):
        found = unpack_value(packed)
        return pack_value({**found, "message": change(found["message"])})

    return changed_reply(change_message)


def scale_upload(by):
    return with_upload(lambda upload: {**upload, "parameters": upload["parameters"] * by})


REFUSED = {
    "NaN": (scale_upload(float("nan")), "holds NaN or infinite values in parameters"),
    "shape": (with_upload(lambda upload: {"parameters": torch.zeros(3)}), "has parameters of shape [3]"),
    "more": (with_upload(lambda upload: {**upload, "more": torch.zeros(9)}), "should not hold more"),
    "text": (with_text(lambda text: "{"), "cannot be read"),
    "bytes": (changed_reply(lambda packed: packed[:-1]), "cannot be read"),
    "another": (
        changed_reply(lambda packed: pack_value({**unpack_value(packed), "client": 99})), "answers another message"
    ),
}  # fmt: skip


def replied_with(**changed):
    """Return a node whose reply has changed entries.

    A callable gets the original entry.
    """

    def change(packed):
        found = unpack_value(packed)
        return pack_value({**found, **{k: v(found[k]) if callable(v) else v for k, v in changed.items()}})

    return changed_reply(change)


def in_text(old, new):
    return with_text(lambda text: re.sub(old, new, text, count=1))


def with_tensor(shape):
    """Return a node whose upload has an additional empty tensor of that shape."""

    def change(packed):
        head = head_of(packed)
        content = packed[8 + int.from_bytes(packed[:8], "little") :]
        head["more"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(content)] * 2}
        text = json.dumps(head).encode()
        return len(text).to_bytes(8, "little") + text + content

    return changed_reply(change)


DIGITS = "9" * 4000
UNREADABLE = {
    "digits in the client": in_text(r'\["client",\d+\]', f'["client",{DIGITS}]'),
    "digits in a figure": in_text(r'\["report",\{"dict":\[', f'["report",{{"dict":[["x",{DIGITS}],'),
    "digits in the seconds": in_text(r'\["seconds",[^\]]*\]', f'["seconds",{DIGITS}]'),
    "more digits than Python reads": in_text(r'\["client",\d+\]', f'["client",{DIGITS * 2}]'),
    "infinity as JSON": in_text(r'\["seconds",[^\]]*\]', '["seconds",Infinity]'),
    "a figure near the largest": replied_with(report={"x": 1.7e308}),
    "a figure of text": replied_with(report={"x": "1"}),
    "many figures": replied_with(report={f"x{i}": 0.0 for i in range(300)}),
    "a figure with a long name": replied_with(report={"x" * 10_000: 0.0}),
    "a figure with an escape code": replied_with(report={"\x1b[2J": 0.0}),
    "many warnings": replied_with(warnings={f"x{i}": "no" for i in range(300)}),
    "a warning with a long name": replied_with(warnings={"x" * 1000: "no"}),
    "a shape that overflows": with_tensor((1 << 40, 1 << 40, 0)),
    "a deep text": with_text(lambda text: "[" * 1_000_000),
    "a long text": with_text(lambda text: json.dumps("x" * (5 << 20))),
    "a ledger of text": replied_with(ledger={"d": [["gaussian", "x", 1.0, 1]]}),
    "a problem of another kind": replied_with(problem={"kind": "exit"}),
    "a client that is none": replied_with(client=None),
}  # fmt: skip


def test_whatever_a_reply_holds_it_is_left_out_by_name_and_the_run_goes_on(tmp_path, caplog):
    faults = [fault for fault, _ in REFUSED.values()] + [*UNREADABLE.values()]
    run_config = settings("scaffold", clients=len(faults) + 1, partition="iid", **{"train-samples": 300})
    by_client = {(k, 0): fault for k, fault in enumerate(faults, start=1)}
    over_flower(run_config, tmp_path / "run", range(len(faults) + 1), by_client)
    entries = {entry["client"]: entry for entry in dropped_clients(tmp_path / "run")}
    ledger = 1 + len(REFUSED) + [*UNREADABLE].index("a ledger of text")  # without a guarantee nobody reads a ledger
    assert [*entries] == [k for k in range(1, len(faults) + 1) if k != ledger]
    assert {entry["round"] for entry in entries.values()} == {1}
    told = outcome(tmp_path / "run")[2]["diagnostics"]
    for k, (_, why) in enumerate(REFUSED.values(), start=1):
        assert why in entries[k]["reason"]
        assert f"Client {k}'s upload in round 1" in told[f"refused-upload-{k}"]
        assert told[f"refused-upload-{k}"] in caplog.text
    assert "accuracy" in json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]


def test_an_exception_while_a_reply_is_read_leaves_it_out(tmp_path, monkeypatch):
    read = node_executor.read_reply

    def failing(packed, client, version):
        if client == 1:
            raise MemoryError("no room")
        return read(packed, client, version)

    monkeypatch.setattr(node_executor, "read_reply", failing)
    over_flower(settings("fedavg", rounds=1), tmp_path / "run")
    (entry,) = dropped_clients(tmp_path / "run")
    assert "cannot be read (MemoryError: no room)" in entry["reason"]


def test_texts_of_a_node_are_cut_and_hold_no_control_characters(tmp_path, caplog):
    text = "\x1b[31m" + "word " * 300_000
    problem = {"kind": "failed", "what": text, "traceback": text}
    faults = {(1, 0): replied_with(warnings={"loud": text}), (2, 0): replied_with(problem=problem, message=None)}
    over_flower(settings("fedavg", rounds=1), tmp_path / "run", faults=faults)
    summary = (tmp_path / "run" / "summary.json").read_text()
    assert "loud" in summary
    assert len(summary) < 50_000
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size < 50_000
    assert "\x1b" not in caplog.text
    assert max(map(len, caplog.messages)) < 40_000


def test_names_of_all_replies_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(node_executor, "MOST_NAMES", 20)
    faults = {(1, i): replied_with(warnings={f"w{i}-{j}": "no" for j in range(10)}) for i in range(3)}
    over_flower(settings("fedavg", rounds=3), tmp_path / "run", faults=faults)
    assert [entry["round"] for entry in dropped_clients(tmp_path / "run")] == [2, 3]


@pytest.mark.parametrize(
    ("fault", "why"),
    [(silent, "it had not answered after 0.2 seconds"),
     pytest.param(report_gone, "its node was lost", marks=pytest.mark.exhaustive)],
    ids=["silent", "lost"],
)  # fmt: skip
def test_a_node_that_never_answers(fault, why, tmp_path):
    """The later rounds are those of a run in which the client dropped out of this round."""
    over_flower(settings("scaffold", rounds=3), tmp_path / "run", faults={(1, 1): fault})
    (entry,) = dropped_clients(tmp_path / "run")
    assert (entry["round"], entry["client"]) == (2, 1)
    assert entry["reason"].startswith(why)
    assert why in outcome(tmp_path / "run")[2]["diagnostics"]["missing-client-1"]
    assert [len(record["clients"]) for record in read_metrics(tmp_path / "run")] == [3, 2, 3]


@pytest.mark.exhaustive
def test_a_node_that_is_late_keeps_its_state(tmp_path):
    """The server drops a late answer, and the client continues from its state before."""

    def late(message, context):
        client_app.app(message, context)

    runs = {}
    for name, fault in (("silent", silent), ("late", late)):
        over_flower(settings("scaffold", rounds=3), tmp_path / name, faults={(1, 1): fault})
        runs[name] = outcome(tmp_path / name)
    assert runs["late"] == runs["silent"]


def test_nodes_that_are_not_there(refuses, tmp_path, caplog):
    grid = NodeGrid(settings("fedavg", out=str(tmp_path / "run")), range(3))
    grid.connected = [0, 2]
    server_app.play(grid, grid.run_config)
    assert [entry["client"] for entry in dropped_clients(tmp_path / "run")] == [1, 1]
    assert "clients-without-node" in outcome(tmp_path / "run")[2]["diagnostics"]
    assert all(re.search(rf"round {n} of 2: .* s, without client 1\n", caplog.text) for n in (1, 2))
    with refuses("No node of a client is connected after 0 seconds", "nobody"):
        over_flower(settings("fedavg"), tmp_path / "nobody", ())


def test_a_node_with_another_form_of_the_messages_is_refused(tmp_path, monkeypatch, caplog):
    class Mixed(NodeGrid):
        older = (101,)

        def _reply(self, message):
            with monkeypatch.context() as patched:
                if message.metadata.dst_node_id in self.older:
                    patched.setattr(node_client, "PROTOCOL", 3)
                return super()._reply(message)

    forms = f"has form 3 of fedkern's messages, and the server has form {node_client.PROTOCOL}"
    sentence = f"Node 101 {forms}: install one version of fedkern on all machines; it takes no part."
    grid = Mixed(settings("fedavg", out=str(tmp_path / "run")), range(3))
    server_app.play(grid, grid.run_config)
    assert sentence in caplog.text
    assert {(entry["client"], entry["reason"]) for entry in dropped_clients(tmp_path / "run")} == {
        (1, "no node of it is connected")
    }
    grid = Mixed(settings("fedavg", out=str(tmp_path / "nobody")), range(3))
    grid.older = (100, 101, 102)
    with pytest.raises(UserError, match=forms):
        server_app.play(grid, grid.run_config)


def test_a_node_that_comes_back_as_another(tmp_path):
    """The later node of a client works, with the client's state.

    The SuperLink still lists the lost one.
    """
    run_config = settings("scaffold", rounds=3, out=str(tmp_path / "run"))
    expected = in_one_process(run_config, tmp_path / "here")

    def returning(message, context):
        grid.connected.append(3)
        return client_app.app(message, context)

    faults = {(1, 0): returning, (2, 1): silent, (2, 2): silent}
    grid = NodeGrid(run_config, range(3), faults, nodes={3: {"partition-id": 2}})
    server_app.play(grid, run_config)
    found = outcome(tmp_path / "run")
    assert grid.asked == [0, 1, 2, 0, 1, 3, 0, 1, 3]
    assert found[:2] == expected[:2]
    assert "the one that connected last works" in found[2]["diagnostics"]["nodes-of-one-client"]


def test_a_failing_client(tmp_path, monkeypatch, caplog):
    """The client stops the run or is left out, as --on-error says.

    The server shows the client's traceback.
    """

    train = FedAvg.client_update

    def raising(self, client, phase, message):
        if client.id == 1:
            raise ZeroDivisionError("nothing to divide by")
        return train(self, client, phase, message)

    monkeypatch.setattr(FedAvg, "client_update", raising)
    over_flower(settings("fedavg"), tmp_path / "skip")
    reasons = {entry["reason"].partition(" (")[0] for entry in dropped_clients(tmp_path / "skip")}  # without the line
    assert reasons == {"ZeroDivisionError: nothing to divide by"}
    with pytest.raises(RunFailed, match="Client 1 failed in round 1: ZeroDivisionError"):
        over_flower(settings("fedavg", **{"on-error": "stop"}), tmp_path / "stop")
    assert "Traceback (most recent call last)" in caplog.text


@pytest.mark.exhaustive
def test_messages_to_the_wrong_client_and_data_that_are_not_on_the_node(tmp_path):
    """A node answers only for its own client."""

    def elsewhere(message, context):
        context.node_config["partition-id"] = 0
        return client_app.app(message, context)

    def without_data(message, context):
        context.node_config["data-root"] = str(tmp_path / "nowhere")
        context.run_config["data"] = "cifar10"
        return client_app.app(message, context)

    over_flower(settings("fedavg"), tmp_path / "run", faults={(1, 0): elsewhere, (2, 0): without_data})
    wrong, empty = dropped_clients(tmp_path / "run")
    assert "is for client 1, and this node is client 0" in wrong["reason"]
    assert "nowhere" in empty["reason"]


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"method": "centralised"}, "centralised needs the data of all clients in one place"),
        ({"compress": "topk"}, 'compress="topk:share=0.05" is not for runs over Flower'),
    ],
)
def test_what_cannot_be_played_over_flower_is_refused(setting, why, refuses, tmp_path):
    with refuses(why):
        over_flower({**TINY, **setting}, tmp_path / "run")


class Untrained(FedAvg):
    """A method whose clients return their message."""

    def client_update(self, client, phase, message):
        return client.upload(client.model(message))


def test_a_setting_that_no_node_uses_is_refused(refuses, tmp_path, monkeypatch):
    over_flower(settings("fedavg", momentum=0.5), tmp_path / "used")
    monkeypatch.setitem(method_registry.METHODS, "fedavg", Untrained)
    with refuses(r"^momentum has no effect on Untrained, whose clients take no such step"):
        over_flower(settings("fedavg", momentum=0.5), tmp_path / "run")


@pytest.mark.exhaustive
def test_the_bytes_on_the_wire(tmp_path):
    """Above a megabyte, Flower's messages hold little more than the tensors in the ledger."""
    grid = over_flower(settings("fedavg", rounds=1, width=64), tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    counted, wire = summary["bytes"], summary["wire"]
    total = counted["up"] + counted["down"]
    assert total > 1e6
    assert grid.size <= 1.05 * total
    assert all(counted[direction] < wire[direction] < 1.05 * counted[direction] for direction in ("up", "down"))
    assert sum(wire.values()) < grid.size


@pytest.mark.exhaustive
def test_half_the_bytes(tmp_path):
    """Messages are bf16, sums are fp32.

    A killed server continues with the same bits here too.
    """
    run_config = settings("fedavg", width=8, **{"flower.transport": "bf16"})
    grid = over_flower(run_config, tmp_path / "half")
    full = over_flower({**run_config, "flower.transport": "fp32"}, tmp_path / "whole")
    assert grid.size < 0.62 * full.size
    half, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert any(not torch.equal(half[name], exact[name]) for name in exact)
    assert all(torch.allclose(half[name].float(), exact[name].float(), rtol=0.05, atol=0.05) for name in exact)
    kill_and_resume(run_config, tmp_path / "run", 1)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "half")
    resumed, halved = (json.loads((tmp_path / name / "summary.json").read_text())["wire"] for name in ("run", "half"))
    for direction in ("up", "down"):  # the rounds before the kill count; nodes were asked twice who they are
        assert halved[direction] < resumed[direction] < halved[direction] + 1000


@pytest.mark.exhaustive
def test_clients_computed_together_in_one_process_are_alone_on_nodes(tmp_path):
    run_config = settings("fediod")
    expected = in_one_process(run_config, tmp_path / "here")
    over_flower({**run_config, "method-option.batched": True}, tmp_path / "flower")
    same(outcome(tmp_path / "flower"), expected, "fediod")


# -- what a request must be --------------------------------------------------------------------------------------------


def request(**changed):
    found = {
        "protocol": node_client.PROTOCOL, "run": "0" * 32, "attempt": "a" * 32, "client": 1, "callee": "method",
        "phase": [0, "train", "update"], "version": [1, 0], "begin": None, "oldest": 1, "last": True,
        "threads": 1, "client_threads": 1, "plan": "", "data": None,
    }  # fmt: skip
    return {**found, **changed}


def test_letters_are_read_back():
    read = node_client.ClientRequest.read(request(begin=[3, 2]))
    assert json.loads(json.dumps(read.to_dict())) == request(begin=[3, 2])
    assert read.begin == (3, 2)


@pytest.mark.parametrize(
    "changed",
    [{"protocol": 1}, {"data": "0"}, {"run": "../../etc"}, {"client": "1"}, {"client": True},
     {"callee": "__class__"}, {"phase": [0, "train"]}, {"version": [0, 0]}, {"version": [1, -1]}, {"begin": [1]},
     {"threads": 0}, {"more": 1}, {"last": 1}],
    ids=str,
)  # fmt: skip
def test_letters_that_are_refused(changed):
    with pytest.raises(Malformed, match=r"has|names no|lacks|asks for"):
        node_client.ClientRequest.read(request(**changed))


def test_a_message_is_no_reply(tmp_path):
    with pytest.raises(ValueError, match="is no answer of a fedkern client"):
        node_client.read_reply(pack_value({"parameters": torch.zeros(2)}), 0, node_client.Version(1, 0))


@pytest.mark.parametrize("name", ["samples", "name", "seconds", "clipped", "update_norm"])
def test_a_reply_reports_no_name_of_the_engines(name):
    reply = {"client": 0, "version": [1, 0], "message": None, "problem": None, "warnings": {}, "marks": [],
             "seconds": 0.0, "changed": False, "ledger": None}  # fmt: skip
    version = node_client.Version(1, 0)
    assert node_client.read_reply(pack_value({**reply, "report": {"own": 1}}), 0, version)[0].report == {"own": 1}
    with pytest.raises(Malformed, match="has an invalid report"):
        node_client.read_reply(pack_value({**reply, "report": {name: 1}}), 0, version)
    with pytest.raises(Malformed, match="has invalid marks"):
        node_client.read_reply(pack_value({**reply, "report": {}, "marks": [name]}), 0, version)


def test_flower_messages_of_other_apps():
    from flwr.app import ConfigRecord, RecordDict

    foreign = Message(RecordDict({"config": ConfigRecord({"lr": 0.1})}), 1, "train")
    with pytest.raises(ValueError, match="has other records than a message of fedkern"):
        unpack_message(foreign)
