"""Tests of fedkern's programs on the page for users of other frameworks."""

import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/coming-from.md"
TASK, *PROGRAMS = re.findall(r"```python\n((?:# task|import fedkern).*?)```", PAGE.read_text(), re.DOTALL)


def test_the_programs_run(undrawn, tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for program in PROGRAMS:
        exec(compile(program.replace("rounds=2", "rounds=1, train_samples=200"), PAGE.name, "exec"), {})
    del sys.modules["task"]
