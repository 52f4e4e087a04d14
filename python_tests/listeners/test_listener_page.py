"""Tests of the listeners' page: its ten lines run, and every event is listed."""

import re
from pathlib import Path

from fedkern.listeners import Listener

PAGE = (Path(__file__).parents[2] / "docs/listeners.md").read_text()


def test_the_ten_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    quick = "fedkern.simulate(workers=1, local_steps=1, pictures=False, progress=False, method="
    exec(compile(code.replace("fedkern.simulate(", quick), "docs/listeners.md", "exec"), {})
    lines = [line.split(",") for line in (tmp_path / "runs/table/table.csv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["1", "2"]
    assert all(0 <= float(line[1]) <= 1 for line in lines)


def test_every_event_is_on_the_page():
    named = re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)
    events = [name for name, value in vars(Listener).items() if callable(value) and not name.startswith("__")]
    assert sorted(named) == sorted(events)
