"""Tests that broken and hostile files of a recorded run end in one sentence."""

import os
from pathlib import Path

import pytest

import fedkern
from fedkern.run import main

RECORD, METRICS, SUMMARY = "record.toml", "metrics.jsonl", "summary.json"
DEEP = "[" * 100_000


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (RECORD, "format = 1\n", "", "no format number, and this version of fedkern reads format 1"),
        (RECORD, "format = 1", "format = 9", "format 9, and this version"),
        (RECORD, "format", "code = 'x.py'\nformat", "unexpected keyword argument 'code'"),
        (RECORD, "format = 1", f"format = 1\nx = {DEEP}", "damaged (maximum recursion"),
        (RECORD, 'method = "mine"\n', "", "missing 1 required positional argument: 'method'"),
        (RECORD, '"mine"', r'"\u001b[31mred"', "method must be a text of one line"),
        (RECORD, "seed = 0", "seed = 99999999999999999999", "seed must be a whole number"),
        (RECORD, "seed = 0", "seed = true", "seed must be a whole number"),
        (RECORD, "lr = 0.1", "lr = nan", "settings: lr must be"),
        (RECORD, "lr = 0.1", "lr = 1979-05-27", "settings: lr must be"),
        (RECORD, "[test_labels]", "[test_labels]\ntest = 3", "is missing or damaged (expected string"),
        (RECORD, "[settings]", "[[settings]]", "settings must be a table by name"),
        (METRICS, '"accuracy": 0.5', '"accuracy": 1e999', "line 1: accuracy must be a fraction from 0 to 1"),
        (METRICS, '"accuracy": 0.5', '"accuracy": [0.5]', "line 1: accuracy must be a fraction from 0 to 1"),
        (METRICS, '"accuracy"', '"<b>"', "line 1: no figure can have the name '<b>'"),
        (METRICS, '"seconds": 2.0', '"seconds": "2"', "line 1: seconds must be a number from 0 on"),
        (METRICS, '"round": 2', '"round": 1', "line 2: round must be a whole number over 1"),
        (METRICS, '{"round": 2', '3\n{"round": 2', "line 2: a line must be a JSON object, not 3"),
        (METRICS, '{"round": 1', f'{DEEP}\n{{"round": 1', "line 1: its lists and objects stand too deep"),
        (METRICS, '{"round": 2', '{"round": 3', "is not what the rounds in metrics.jsonl give"),
        (METRICS, '"accuracy": 0.6', '"loss": 0.6', "is not what the rounds in metrics.jsonl give"),
        (SUMMARY, "0.6", "0.9", "is not what the rounds in metrics.jsonl give"),
        (SUMMARY, "}", "", "summary.json is damaged"),
        (SUMMARY, "{", DEEP, "summary.json is damaged"),
    ],
)  # fmt: skip
def test_a_changed_file(name, old, new, message, tmp_path, capsys):
    with fedkern.record(tmp_path / "x", method="mine", seed=0, settings={"lr": 0.1}) as run:
        run.round(1, accuracy=0.5, seconds=2)
        run.round(2, accuracy=0.6, seconds=2)
    edit(tmp_path / "x" / name, old, new)
    assert main(["compare", str(tmp_path / "x"), "--out", str(tmp_path / "z")]) == 2
    output = capsys.readouterr()
    (sentence,) = output.err.splitlines()
    assert str(tmp_path / "x") in sentence
    assert message in sentence
    assert not output.out
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("name", [RECORD, METRICS, SUMMARY])
def test_a_special_or_missing_file(name, tmp_path, capsys):
    with fedkern.record(tmp_path / "x", method="mine", seed=0) as run:
        run.round(1, accuracy=0.5)
    path = tmp_path / "x" / name
    path.unlink()
    words = ["compare", str(tmp_path / "x"), "--out", str(tmp_path / "z")]
    assert main(words) == 2
    os.mkfifo(path)
    assert main(words) == 2
    missing, special = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "x") in missing
    assert "damaged (it is a named pipe, not a regular file)" in special
