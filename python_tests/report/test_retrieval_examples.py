"""Images of a test set and the captions that a run's encoders find for them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fedkern.engine.run import run
from fedkern.report.figures import plots, sheet
from fedkern.report.figures.pictures import write_pictures
from fedkern.report.pages.retrieval_examples import EXAMPLES, FOUND, Found, draw, examples, retrieval_examples
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data


def test_a_run_on_pairs_draws_them(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, path: None)  # the other pictures
    options = {"test_samples": 12, "validation_samples": 6}
    small = {"clients": 2, "train_samples": 40, "rounds": 1, "local_steps": 1, "width": 4, "workers": 1}
    config = RunConfig.make("fedavg", data="captions", **small, data_options=options)
    data = load_data(config)
    run(config, out=tmp_path)
    assert "retrieval.png" in [path.name for path in write_pictures(tmp_path, data=data)]
    found, told = retrieval_examples(tmp_path, config, data)
    assert len(found) == EXAMPLES
    assert told.startswith("Test images, evenly chosen, and the nearest of ")
    for one, shown in zip(found, examples(found), strict=True):
        assert one.image.shape == (*one.image.shape[:2], 3)
        assert [right for _, right in one.lines[:FOUND]].count(True) > 0 or one.lines[-1][1]
        assert one.caption in shown.alt
        assert [mark for _, mark in shown.lines] == ["right" if right else "wrong" for _, right in one.lines]


def test_long_captions_stay_beside_their_image(tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(sheet, "save", lambda figure, path: sheets.append(figure))
    lines = [("W" * 300, False), ("short", True), ("many words " * 30, False), ("place 9: " + "word " * 60, True)]
    draw([Found(np.zeros((8, 8, 3), np.uint8), "short", lines)] * 2, tmp_path / "r.png", title="t")
    _, _, *texts = sheets[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert [text.get_text()[:2] for text in texts[:4]] == ["WW", "✓ ", "ma", "✓ "]
    assert all(upper.y0 >= lower.y1 - 2 for upper, lower in pairwise(boxes))
    assert all(box.x1 <= sheets[0].bbox.width for box in boxes)
