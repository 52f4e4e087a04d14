"""Tests that the recorded audit shows what the privacy page says."""

import json

from benchmarks.studies import privacy_audit

ROWS = json.loads(privacy_audit.RESULT.read_text())["mechanisms"]


def test_no_bound_is_above_its_claim_and_every_defect_is_caught():
    assert [row["mechanism"] for row in ROWS] == [mechanism.name for mechanism in privacy_audit.MECHANISMS]
    for row in ROWS:
        assert row["lower"] <= row["claimed"]
        assert row["caught"]["lower"] > row["caught"]["claimed"]
        assert row["repeats"] >= privacy_audit.REPEATS
        if row["caught"]["defect"] == "half the noise":
            assert row["lower"] > 0.9 * row["claimed"]
        else:
            # Renyi accounting of a shard claims more than half the noise shows; privacy loss distributions do not.
            shards = row["mechanism"].endswith("shards")
            assert row["lower"] < row["half"]["lower"]
            assert (row["half"]["lower"] < row["half"]["claimed"]) == shards


def test_the_figure_is_drawn(tmp_path):
    privacy_audit.draw(ROWS, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes()[:4] == b"\x89PNG"
