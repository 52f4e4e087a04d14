"""What benchmarks.many_clients measures of a run."""

import json
import time

from benchmarks import many_clients
from benchmarks.page_figures import ten_thousand_clients

TINY = {
    "data": "digits", "clients": 300, "partition": "iid", "sample_fraction": 0.01, "model": "cnn", "width": 2,
    "local_epochs": 1, "batch_size": 4, "grad_cam": 0, "threads": 1, "workers": "1", "eval_every": 20,
}  # fmt: skip


def test_measures_of_a_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(many_clients, "SETTINGS", TINY)
    asked = {"method": "scaffold", "root": None, "rounds": 12, "out": str(tmp_path / "run"), "since": time.time()}
    assert many_clients.main(["--play", json.dumps(asked)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["round"] for row in found["rounds"]] == [10, 12]
    first, last = found["rounds"]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert 20 < first["files"] <= len(files)
    assert 0 < first["folder_bytes"] < sum(path.stat().st_size for path in files)
    assert last["written_bytes"] > 1000
    assert last["resident_bytes"] > 1 << 26
    assert 3 <= first["descriptors"] < 100
    assert first["cpu_seconds"] > 0
    assert found["start_seconds"] > 0


def test_the_page_has_a_row_for_every_mark():
    rows = [line for line in ten_thousand_clients() if line.startswith("|")]
    assert len(rows) == 2 + len(many_clients.METHODS) * len(many_clients.MARKS)
