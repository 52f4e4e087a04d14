"""Records of rounds."""

import math

import pytest

from fedkern.engine.store import record_files
from fedkern.errors import UserError


def test_records_are_json_that_any_reader_takes(tmp_path):
    metrics = record_files.Metrics(tmp_path)
    metrics.append({"round": 1, "x": math.nan, "y": {"z": (1, math.inf)}})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 1, "x": null, "y": {"z": [1, null]}}\n'
    size = metrics.size
    metrics.append({"round": 2})
    metrics.truncate(size)
    metrics.append({"round": 3})
    assert [r["round"] for r in record_files.read_metrics(tmp_path)] == [1, 3]


def test_a_cut_off_last_line_is_no_record_and_damage_elsewhere_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: No such file"):
        record_files.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"rou')
    assert record_files.read_metrics(tmp_path) == [{"round": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(UserError, match="line 2, is damaged"):
        record_files.read_metrics(tmp_path)
