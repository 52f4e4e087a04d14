"""Images of a test set and the captions that a run's encoders find for them."""

from itertools import pairwise

import numpy as np

from fedkern.engine.run import run
from fedkern.report.figures import plots, sheet
from fedkern.report.figures.pictures import write_pictures
from fedkern.report.figures.retrieval_sheet import EXAMPLES, NEAREST, Example, draw, retrieval_examples
from fedkern.report.pages import run_page
from fedkern.report.run_contents import read
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data


def test_a_run_on_pairs_draws_them(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, path: None)  # the other pictures
    monkeypatch.setattr("fedkern.report.pages.charts.svg", lambda figure, name: "<svg></svg>")
    options = {"test_samples": 12, "validation_samples": 6}
    small = {"clients": 2, "train_samples": 40, "rounds": 1, "local_steps": 1, "width": 4, "workers": 1}
    config = RunConfig.make("fedavg", data="captions", **small, data_options=options)
    data = load_data(config)
    run(config, out=tmp_path)
    assert "retrieval.png" in [path.name for path in write_pictures(tmp_path, data=data)]
    examples, title = retrieval_examples(read(tmp_path), data)
    split = data.tests[""]
    assert len(examples) == EXAMPLES
    assert title == f"Test images and the nearest of {len(set(split.texts))} captions"
    for example in examples:
        assert example.image.shape == (*example.image.shape[:2], 3)
        row = next(i for i, image in enumerate(split.images) if np.array_equal(sheet.rgb(image.numpy()), example.image))
        own = {text for text, name in zip(split.texts, split.ids, strict=True) if name == split.ids[row]}
        assert [text.split(": ", 1)[-1] in own for text, _ in example.lines] == [right for _, right in example.lines]
        assert [right for _, right in example.lines[:NEAREST]].count(True) > 0 or example.lines[NEAREST][1]

    missing = "There are no retrieval examples: they need a complete network with an image and a text encoder."
    for there in (True, False):
        *_, section, _ = run_page.page(read(tmp_path)).sections
        assert (missing in section.blocks) is not there
        assert ("Retrieval examples" in [getattr(block, "title", "") for block in section.blocks]) is there
        (tmp_path / "retrieval.png").unlink(missing_ok=True)


def test_long_captions_stay_beside_their_image(tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(sheet, "save", lambda figure, path: sheets.append(figure))
    lines = [("W" * 300, False), ("short", True), ("many words " * 30, False), ("place 9: " + "word " * 60, True)]
    draw([Example(np.zeros((8, 8, 3), np.uint8), lines)] * 2, tmp_path / "r.png", title="t")
    _, _, *texts = sheets[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert [text.get_text()[:2] for text in texts[:4]] == ["WW", "✓ ", "ma", "✓ "]
    assert all(upper.y0 >= lower.y1 - 2 for upper, lower in pairwise(boxes))
    assert all(box.x1 <= sheets[0].bbox.width for box in boxes)
