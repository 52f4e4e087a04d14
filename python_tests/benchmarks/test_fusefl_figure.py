"""The figure of accuracy against upload and memory."""

from matplotlib.image import imread

from benchmarks.studies import fusefl_figure

ROW = {"table": "upload and memory", "ours": 0.4, "values": "0=0.42 1=0.38", "bytes_up": 375_000.0}


def test_played_rows_stand_at_their_upload_and_memory(tmp_path):
    rows = [
        {**ROW, "name": "FuseFL of width 7"},
        {**ROW, "name": "ensemble of width 16", "ours": None},
        {**ROW, "name": "FuseFL as published", "table": "published"},
        {**ROW, "name": "one-shot FedAvg of width 16", "bytes_up": 1_800_000.0},
    ]
    found = fusefl_figure.points(rows)
    assert found["FuseFL of width 7"] == (75_000.0, 77_265, [42.0, 38.0])
    assert found["one-shot FedAvg of width 16"][:2] == (360_000.0, 78_042)
    assert len(found) == 2
    fusefl_figure.draw(rows, tmp_path / "figure.png")
    picture = imread(tmp_path / "figure.png")
    assert picture.shape[1] > 600
    assert picture.std() > 0.05
