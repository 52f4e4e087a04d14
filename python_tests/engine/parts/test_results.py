"""The part that writes the files of a finished run."""

import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from fedkern.engine.parts.part import Summary
from fedkern.engine.parts.results import Results
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.store.saved_model import MODEL
from fedkern.tasks import CLASSIFICATION
from python_tests.engine.parts.judged import FORM, SETTINGS, Says
from python_tests.stand_ins import Context, run_objects


@pytest.mark.parametrize("names", [None, ("x", "y")])
def test_the_files_of_a_run(names, tmp_path):
    context = Context(2, **SETTINGS)
    context.networks.model_name, context.task_facts = "cnn", {}
    facts = {"task": CLASSIFICATION, "form": FORM}
    vars(context.data).update(
        client_names=names, statistics=SimpleNamespace(held_out=("z", 3) if names else None), **facts
    )
    summary = Summary(
        Says(0.25), metrics={"accuracy": 0.5, "epsilon": 2.0}, of_tests={"accuracy": 0.5},
        of_clients={1: {"accuracy": None}}, client_set="own", entries={"bytes": {"total": 8}, "diagnostics": {}},
    )  # fmt: skip
    Results(run_objects(context, out=tmp_path, sets={"": None}, progress=Progress(done=2))).finish(summary)
    assert (tmp_path / "evaluation.csv").read_text().splitlines() == [
        "client,test_set,metric,value", ",test,accuracy,0.5", f"{'y' if names else 1},own,accuracy,",
    ]  # fmt: skip
    assert load_file(tmp_path / MODEL)["level"] == 0.25
    written = json.loads((tmp_path / "summary.json").read_text())
    named = {"client_names": ["x", "y"], "held_out_client_name": "z"} if names else {}
    head = {"method": "judged", "data": "tiny", "model": "cnn", "seed": 5, "rounds": 2, "clients": 2, **named}
    assert [*written] == [*head, "metrics", "bytes", "diagnostics", "seconds", "records", "versions"]
    assert written == {**summary.entries, **head}
    assert written["metrics"] == {"accuracy": 0.5, "epsilon": 2.0}
