"""User-defined parts and filters: their order, equal bits on workers and after a resume, and refusals."""

import json
from importlib.metadata import EntryPoint

import pytest

import fedkern
from fedkern.cli.commands.list import catalogue
from fedkern.engine import run as module
from fedkern.engine.run import run
from fedkern.engine.setup.order import FILTER_ORDER, PART_ORDER, USERS
from fedkern.engine.store.record_files import read_metrics
from fedkern.engine.uploads import reduction
from fedkern.errors import UserError
from fedkern.settings.config import load_settings
from fedkern.usercode import plugins
from python_tests.interrupted import KillAt, outcome, play_killed
from python_tests.plugin_sources import no_plugins, unload_all  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_plugins", "registries")

BOTH = '''\
"""Halves long updates, and tells how many were."""
from dataclasses import dataclass

from fedkern import About, Filter, Part, Stop, register_filter, register_part


@dataclass(frozen=True)
class Negated:
    on_gpu = ()

    def encode(self, leaving):
        return {**leaving.message, "parameters": -leaving.message["parameters"]}, None


@register_filter("halving")
class Halving(Filter):
    """Halves every update that is longer than those before it were in the mean."""

    def __init__(self):
        self.lengths = []

    def encoders(self, asked):
        return {k: Negated() for k in asked.sent}

    def decode(self, arrival):
        sent, made = arrival.sent["parameters"], -arrival.message["parameters"]
        length = float((made - sent).norm())
        arrival.info["halved"] = float(bool(self.lengths) and length > sum(self.lengths) / len(self.lengths))
        if arrival.info["halved"]:
            made = sent + (made - sent) / 2
        self.lengths.append(length)
        arrival.message = {**arrival.message, "parameters": made}

    def state(self):
        return {"lengths": self.lengths}

    def restore(self, state):
        self.lengths = state["lengths"]


@register_part("halved")
class Halved(Part):
    """Counts the halved updates of a run, and ends the run with the tenth."""

    @classmethod
    def build(cls, run):
        return cls(run.config.rounds)

    def __init__(self, rounds):
        self.count, self.rounds = 0.0, rounds

    def round_end(self, record):
        self.count += sum(info["halved"] for info in record.clients.values())
        record.put({"halved": self.count, "left": self.rounds - record.number}, About.CLIENTS)
        return Stop("halved", "ten updates were halved") if self.count >= 10 else None

    def state(self):
        return {"count": self.count} if self.count else {}

    def restore(self, state):
        self.count = state["count"]
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "both.py"
    path.write_text(BOTH)
    return str(path)


def note_schedules(monkeypatch):
    """Return a list that gets the names of the filters and parts of each later run."""
    found = []

    def loop(*given):
        found.append(([schedule.name for schedule in given[-2]], [schedule.name for schedule in given[-1]]))
        return made(*given)

    made = module.Loop
    monkeypatch.setattr(module, "Loop", loop)
    return found


def test_they_stand_in_their_place_of_every_run_of_their_plugin(file, make_data, make_config, tmp_path, monkeypatch):
    found = note_schedules(monkeypatch)
    config = make_config("fedavg", plugins=[file], max_update_norm=9.0, max_bytes=1e9, stop_at="halved>=1e9")
    run(config, out=tmp_path / "with", data=make_data())
    run(make_config("fedavg", rounds=1), out=tmp_path / "without", data=make_data())  # its plugin is loaded
    (filters, parts), (other_filters, other_parts) = found
    assert filters == ["bytes", "halving", "declared", "norm_bounds"]
    assert parts == [
        "traffic", "artifacts", "evaluation", "server", "oracle", "privacy", "halved", "stop_at", "max_bytes",
        "diagnoses", "answers", "records", "warnings", "listeners", "results", "checkpoints",
    ]  # fmt: skip
    assert "halving" not in other_filters
    assert "halved" not in other_parts
    assert FILTER_ORDER.index(USERS) < FILTER_ORDER.index("norm_bounds") < FILTER_ORDER.index("private_mean")
    assert PART_ORDER.index(USERS) < PART_ORDER.index("records") < PART_ORDER.index("checkpoints")


@pytest.mark.usefixtures("forked_workers")
def test_bits_depend_neither_on_workers_nor_on_an_interruption(file, make_data, make_config, tmp_path):
    config = make_config("fedavg", plugins=[file], rounds=4)
    for workers in ("1", "2"):
        run(config.replace(workers=workers), out=tmp_path / workers, data=make_data())
    uncut = outcome(tmp_path / "1")
    assert "no-workers" not in outcome(tmp_path / "2")[2]["diagnostics"]
    assert outcome(tmp_path / "2") == uncut
    halved = [record["halved"] for record in read_metrics(tmp_path / "1")]
    assert halved[-1] > halved[0]
    assert [record["left"] for record in read_metrics(tmp_path / "1")] == [3, 2, 1, 0]
    run(make_config("fedavg", rounds=4), out=tmp_path / "plain", data=make_data())
    assert outcome(tmp_path / "plain")[0] != uncut[0]
    play_killed(config.replace(workers="1"), out=tmp_path / "cut", data=make_data(), at=KillAt("client", 7))
    unload_all()
    (tmp_path / "both.py").write_text(BOTH + "# changed\n")
    with pytest.raises(UserError, match=r"both.py has changed since the run in "):
        load_settings(tmp_path / "cut")
    (tmp_path / "both.py").write_text(BOTH)
    run(load_settings(tmp_path / "cut"), out=tmp_path / "cut", resume=True, data=make_data())
    assert outcome(tmp_path / "cut") == uncut
    manifest = json.loads((tmp_path / "cut" / "checkpoints" / "manifest.json").read_text())
    info = manifest["entries"][-1]["info"]
    assert info["filters"].keys() == {"halving"}
    assert info["parts"]["halved"] == {"count": halved[-1]}


def test_private_records_tell_nothing_of_clients(file, make_data, make_config, tmp_path):
    run(make_config("fedavg", plugins=[file], records="private"), out=tmp_path / "run", data=make_data())
    assert not any("halved" in record for record in read_metrics(tmp_path / "run"))


def test_a_plugin_of_an_installed_package_is_stored_with_every_run(tmp_path, make_config, monkeypatch):
    (tmp_path / "parts_of_a_test.py").write_text(BOTH)
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("parts", "parts_of_a_test", plugins.GROUP)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    monkeypatch.setattr(plugins, "_installed", False)
    assert [*make_config("fedavg").plugins] == ["parts_of_a_test"]
    listed = catalogue()
    assert listed["parts"] == {"halved": "Counts the halved updates of a run, and ends the run with the tenth."}
    assert listed["filters"].keys() == {"halving"}
    unload_all()
    assert {"parts", "filters"}.isdisjoint(catalogue())
    assert not make_config("fedavg").plugins


def test_several_plugins_stand_in_the_order_of_the_run(tmp_path, make_config, make_data, monkeypatch):
    files = {}
    for name in ("a", "b"):
        files[name] = tmp_path / f"{name}.py"
        files[name].write_text(
            f'from fedkern import Part, register_part\n@register_part("{name}")\nclass It(Part):\n    "A part."\n'
        )
    plugins.load(str(files["a"]))
    found = note_schedules(monkeypatch)
    run(make_config(plugins=[str(files["b"]), str(files["a"])], rounds=1), out=tmp_path / "run", data=make_data())
    assert [name for name in found[0][1] if name in files] == ["b", "a"]


@pytest.mark.parametrize("needs_whole", [True, False])
def test_vectors_stay_on_the_gpu_where_no_filter_sees_them(needs_whole, make_data, make_config, tmp_path, monkeypatch):
    @fedkern.register_filter("looking")
    class Looking(fedkern.Filter):
        """A filter that looks at uploads, or at their figures only."""

    Looking.needs_whole_upload = needs_whole
    monkeypatch.setattr(reduction, "has_room", lambda *_: True)
    found = note_schedules(monkeypatch)
    run(make_config("fedavg", rounds=1, workers="1"), out=tmp_path / "run", data=make_data())
    assert found[0][0] == ["bytes", *(["reduction"] * (not needs_whole)), "looking", "declared"]


# -- what is wrong -----------------------------------------------------------------------------------------------------

PART = """\
import torch
from fedkern import Filter, Part, UserError, register_filter, register_part

@register_{kind}({name!r})
class Mine({base}):
    {doc}
    {body}
"""


def write_plugin(folder, body="pass", kind="part", name="mine", base=None, doc='"Mine."'):
    path = folder / "mine.py"
    base = base or kind.capitalize()
    path.write_text(PART.format(kind=kind, name=name, base=base, doc=doc, body=body))
    return str(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "evaluation"}, r'\(line 4\): ValueError: part "evaluation" is already registered by Evaluation\.$'),
        ({"kind": "filter", "name": "bytes"}, 'filter "bytes" is already registered by Bytes'),
        ({"base": "object"}, 'part "mine": expected a class derived from fedkern.Part, given <class'),
        ({"kind": "filter", "base": "Part"}, 'filter "mine": expected a class derived from fedkern.Filter'),
        ({"doc": "x = 1"}, "Mine needs a docstring: its first line describes the part to the user"),
        ({"name": "a b"}, 'registers the part "a b": a name has letters, digits'),
    ],
)
def test_a_plugin_that_registers_wrongly_is_refused(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        plugins.load(write_plugin(tmp_path, **given))


FAULTS = {
    "build": ("@classmethod\n    def build(cls, run): return 5", "part",
              r"^`build` of the part mine must return a fedkern.Part or None, not 5\.$"),
    "stop": ("def round_end(self, record): return True", "part",
             r"^`round_end` of the part mine failed in round 1: it must return a fedkern.Stop or nothing, not True\.$"),
    "state": ("def state(self): return {'sum': torch.ones(1)}", "part",
              r"^`state` of the part mine failed .*: a state holds numbers, texts, lists and dicts alone \(Object of"),
    "taken": ("def round_end(self, record): record.put({'mine': 1.0, 'phases': 2.0})", "part",
              r"^`round_end` of the part mine failed in round 1: the record has an entry \"phases\" of its own: put"),
    "figure": ("def round_end(self, record): record.put({'id_accuracy': 1.0})", "part",
               r"of the part mine failed in round 1: the record has an entry \"id_accuracy\" of its own"),
    "own": ("def begin(self, resumed): raise UserError('No.')", "part",
            r"^`begin` of the part mine failed before the first round: No \(mine.py, line 7\)\.$"),
    "decode": ("def decode(self, arrival): return 3", "filter",
               r"^`decode` of the filter mine failed in round 1: it must return why the upload is refused or nothing"),
    "refused": ("def decode(self, arrival): return 'is not mine'", "filter",
                r"^Client 0's upload in round 1 is not mine; leave such uploads out with --on-nan skip"),
    "encode": ("on_gpu = ()\n    def encoders(self, asked): return {1: self}\n"
               "    def encode(self, leaving): return leaving.message['mine'], None", "filter",
               r"^Client 1 failed in round 1: KeyError: 'mine'"),
    "combine": ("def combine(self, *given):\n        raise SystemExit(1)\n        yield", "filter",
                 r"^`combine` of the filter mine failed in round 1: SystemExit: 1 \(mine.py, line 8\); the traceback"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_its_code_does_wrong_is_one_sentence_that_names_it(fault, make_data, make_config, tmp_path):
    body, kind, message = FAULTS[fault]
    config = make_config("fedavg", plugins=[write_plugin(tmp_path, body, kind)], workers="1")
    with pytest.raises(UserError, match=message):
        run(config, out=tmp_path / "run", data=make_data())
    assert (tmp_path / "run").exists() == (fault == "state")  # a round is done then


def test_another_exception_has_a_note_and_one_of_the_uploads_none(make_data, make_config, tmp_path):
    body = "def round_end(self, record): record.clients['x']"
    config = make_config("fedavg", plugins=[write_plugin(tmp_path, body)], workers="1")
    with pytest.raises(KeyError) as told:
        run(config, out=tmp_path / "run", data=make_data())
    assert told.value.__notes__ == ["`round_end` of the part mine failed in round 1 (mine.py, line 7)."]
    body = "def combine(self, asked, uploads, note):\n        yield from uploads"
    config = make_config("fedavg", plugins=[write_plugin(tmp_path, body, "filter")], workers="1", lr=1e30)
    with pytest.raises(UserError, match=r"^Client 0 diverged in round 1, batch"):
        run(config, out=tmp_path / "run", data=make_data())


@pytest.mark.parametrize(
    "body", ["def state(self): return {}", "def combine(self, *given): return given[1]", "keeps_client_state = True"]
)
def test_noise_covers_no_filter_whose_uploads_may_follow_from_other_clients(body, make_data, make_config, tmp_path):
    config = make_config("fedavg", plugins=[write_plugin(tmp_path, body, "filter")], dp_clip=1.0, dp_noise=1.0)
    with pytest.raises(UserError, match=r"^--dp-noise assumes that .* and the filter mine keeps state or sees all"):
        run(config, out=tmp_path / "run", data=make_data())
    run(config.replace(dp_noise=0.0), out=tmp_path / "run", data=make_data())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["part", "filter"])
def test_what_a_script_registers_is_needed_again(kind, make_data, make_config, tmp_path):
    config = make_config("fedavg")
    for name in ("with", "without"):
        if name == "without":
            plugins._tables()[kind].pop("mine")
        else:
            base = {"part": fedkern.Part, "filter": fedkern.Filter}[kind]
            register = {"part": fedkern.register_part, "filter": fedkern.register_filter}[kind]
            mine = register("mine")(type("Mine", (base,), {"__doc__": "Does nothing."}))
        play_killed(config, out=tmp_path / name, data=make_data(), at=KillAt("round", 1))
    told = rf'The run in .*with began with the {kind} "mine": register it again, or start a new run\.'
    with pytest.raises(UserError, match=told):
        run(load_settings(tmp_path / "with"), out=tmp_path / "with", resume=True, data=make_data())
    register("mine")(mine)
    run(load_settings(tmp_path / "with"), out=tmp_path / "with", resume=True, data=make_data())
    with pytest.raises(UserError, match=f'without began without the {kind} "mine": leave it out, or start a new run'):
        run(load_settings(tmp_path / "without"), out=tmp_path / "without", resume=True, data=make_data())
    register("mine")(mine)  # a notebook's cell, run again
