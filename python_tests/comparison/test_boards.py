"""Tests of the board that a comparison shows while it plays."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedkern.comparison.boards import Board


@pytest.mark.parametrize("terminal", [False, True])
def test_every_run_leaves_a_line_and_a_terminal_shows_what_is_playing(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    board = Board(console)
    runs = [SimpleNamespace(name=seed, variant=SimpleNamespace(label="fed[red]avg"), seed=seed) for seed in (0, 1, 2)]
    board.main = "accuracy"
    board.on_cells(runs)
    for cell in runs:
        board.on_cell(cell)
    for cell in runs[:2]:  # both play at once
        board.focus(cell)
        board.on_round({"round": 1, "rounds": 2, "accuracy": (cell.seed + 1) / 4})
        playing = f"fed[red]avg, seed {cell.seed}  1/2  accuracy {25 * (cell.seed + 1)}.0 %"
        assert (board.status is not None and board.status.status.plain == playing) is terminal
    found = SimpleNamespace(main="accuracy", metrics={"accuracy": 0.5})
    board.on_cell_end(runs[0], found, again=True)
    board.on_cell_end(runs[1], found, again=False)
    board.on_cell_failed(runs[2], "no\nmemory")
    board.close()
    text = console.file.getvalue()
    assert "1/3  fed[red]avg, seed 0  accuracy 50.0 %  finished before\n" in text
    assert re.search(r"2/3  fed\[red\]avg, seed 1  accuracy 50\.0 %  \d\.\d\d s, about \d\.\d\d s left\n", text)
    assert "3/3  fed[red]avg, seed 2  failed: no memory\n" in text
