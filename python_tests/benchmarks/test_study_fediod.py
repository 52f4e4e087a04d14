"""Every run that FedIOD's studies ask for is a command line that the program takes, and every table can be written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import fediod_runs, study_fediod, study_fediod_segment
from fedkern.data import load
from python_tests.benchmarks.test_studies import Metrics, one_per_shape, parse_cases, write_sections

BYTES = {"up": 10, "down": 10, "one_off_up": 1, "one_off_down": 0}


def dry(kind, asked, finished):
    class Dry(kind):
        def run(self, cases):
            cases = list(cases)
            for case in cases:  # teachers that are brought must have been trained before
                assert asked.setdefault(case.name, case) == case
                if "--teachers" in case.arguments:
                    assert Path(case.arguments[case.arguments.index("--teachers") + 1]).name in finished
            for case in cases:
                finished.add(case.name)
                self.summaries[case.name] = {"clients": 5, "seconds": 1.0, "bytes": BYTES}

        def metrics(self, case):
            assert case.name in finished
            return Metrics(lambda: 0.5)

        def rounds(self, case):
            assert case.name in finished
            return [{"round": r, "name": "distil", "accuracy": 0.1 * r} for r in range(1, 11)]

        def attack(self, case):
            assert case.name in finished
            return {"auc": 0.5, "low": 0.4, "high": 0.6, "tpr": 0.01}

    return Dry


def check(module, kind, name, tmp_path):
    asked = {}
    runs = dry(kind, asked, set())(module.STUDIES[name], tmp_path / "runs", 2, {"data_root": str(tmp_path)})
    write_sections(module, runs)
    parse_cases(one_per_shape(asked.values()), tmp_path)


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_every_case_is_a_command_line(name, tmp_path):
    check(study_fediod, fediod_runs.IODRuns, name, tmp_path)


def test_segmentation(tmp_path):
    check(study_fediod_segment, fediod_runs.IODRuns, "membrane", tmp_path)


def test_slices_become_tiles(tmp_path, monkeypatch):
    monkeypatch.setattr(study_fediod_segment, "SIDE", 4)
    label = np.full((8, 8), 255, dtype=np.uint8)
    label[0, 0] = 0  # membrane
    for kind, pixels in (("image", np.arange(64, dtype=np.uint8).reshape(8, 8)), ("label", label)):
        (tmp_path / kind).mkdir()
        for number in range(30):
            Image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
    listing = study_fediod_segment.cut_tiles(tmp_path, tmp_path / "tiles")
    rows = [line.split(",") for line in listing.read_text().splitlines()[1:]]
    assert len(rows) == 30 * 4
    assert {row[3] for row in rows if row[2] == "train"} == {"0", "1", "2", "3", "4"}
    assert [sum(row[2] == split for row in rows) for split in ("train", "val", "test")] == [80, 16, 24]
    data = load("segmentation", root=listing, clients=5, partition="attribute", seed=0, options={"size": 8})
    assert data.client_sizes == (16,) * 5
    first = np.asarray(Image.open(tmp_path / "tiles" / rows[0][1]))
    assert (first[0, 0], first.sum()) == (255, 255)
    assert study_fediod_segment.cut_tiles(tmp_path / "gone", tmp_path / "tiles") == listing  # made once
