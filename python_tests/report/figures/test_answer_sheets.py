"""Images of a test set and the captions that a run's encoders find for them."""

import re
from itertools import pairwise

import numpy as np

from fedkern.engine.run import run
from fedkern.report.figures import answer_sheets, plots, sheet
from fedkern.report.figures.pictures import write_pictures
from fedkern.report.pages import run_page
from fedkern.report.run_contents import read_run_folder
from fedkern.settings.config import RunConfig
from fedkern.settings.run_data import load_data


def test_a_run_on_pairs_draws_them(tmp_path, monkeypatch):
    save = plots.save_png
    monkeypatch.setattr(plots, "save_png", lambda figure, path: path.stem == "retrieval" and save(figure, path))
    monkeypatch.setattr("fedkern.report.figures.plots.to_svg", lambda figure, name: "<svg></svg>")
    options = {"test_samples": 12, "validation_samples": 6}
    small = {"clients": 2, "train_samples": 40, "rounds": 1, "local_steps": 1, "width": 4, "workers": 1}
    config = RunConfig.make("fedavg", data="captions", **small, data_options=options)
    data = load_data(config)
    run(config, out=tmp_path)
    assert "retrieval.png" in [path.name for path in write_pictures(tmp_path, data=data)]
    split, sheets = data.tests[""], []

    class Kept(sheet.Sheet):
        def __init__(self, *given, title, **options):
            sheets.append((title, [], []))
            super().__init__(*given, title=title, **options)

        def picture(self, row, column, image):
            sheets[-1][1].append(image)

        def after(self, row, lines):
            sheets[-1][2].append(lines)

    monkeypatch.setattr(answer_sheets, "Sheet", Kept)
    answer_sheets.retrieval(read_run_folder(tmp_path), data, None)
    ((title, images, captions),) = sheets
    assert len(images) == len(captions) == answer_sheets.CAPTIONED
    assert title.startswith(f"Test images and the nearest of {len(set(split.texts))} captions, fedavg on captions")
    for image, lines in zip(images, captions, strict=True):
        row = next(i for i, own in enumerate(split.images) if np.array_equal(sheet.to_rgb(own.numpy()), image))
        own = {text for text, name in zip(split.texts, split.ids, strict=True) if name == split.ids[row]}
        for line in lines:
            place, is_marked = re.match(r"(?:✓ )?(place \d+: )?", line[0])[1] or "", line[0].startswith("✓ ")
            assert (line in {answer_sheets.caption_lines(place + text, is_marked) for text in own}) is is_marked
        assert any(colour == plots.GREEN for _, colour in lines)
        assert len(lines) <= answer_sheets.NEAREST + 1

    missing = "There are no retrieval examples: they need a complete network with an image and a text encoder."
    for drawn in (True, False):
        *_, section, _ = run_page.page(read_run_folder(tmp_path)).sections
        assert (missing in section.blocks) is not drawn
        assert ("Retrieval examples" in [getattr(block, "title", "") for block in section.blocks]) is drawn
        (tmp_path / "retrieval.png").unlink(missing_ok=True)


def test_long_captions_stay_beside_their_image():
    lines = [("W" * 300, False), ("short", True), ("many words " * 30, False), ("place 9: " + "word " * 60, True)]
    made = sheet.Sheet(1, [0.12] * 2, side=1.25, left=0.1, right=5.2, title="t")
    for row in (0, 1):
        made.after(row, [answer_sheets.caption_lines(*line) for line in lines])
    _, *texts = made.figure.texts
    boxes = [text.get_window_extent() for text in texts]
    assert [text.get_text()[:2] for text in texts[:4]] == ["WW", "✓ ", "ma", "✓ "]
    assert all(upper.y0 >= lower.y1 - 2 for upper, lower in pairwise(boxes))
    assert all(box.x1 <= made.figure.bbox.width for box in boxes)
