"""Tests of the command ``partition``."""

from pathlib import Path

from PIL import Image

from fedkern.data import load


def test_it_shows_what_a_run_would_train_on(result):
    flags = ("--data", "digits", "--clients", "6", "--partition", "quantity:0.5", "--seed", "3")
    out, _ = result("partition", *flags, "--picture", "sizes.png")
    assert "Quantity skew, Dirichlet(0.5)" in out
    data = load("digits", clients=6, partition="quantity:0.5", seed=3)
    rows = [line.split() for line in out.splitlines()]
    assert [int(row[1]) for row in rows if row and row[0].isdecimal()] == [len(split) for split in data.clients]
    assert Image.open("sizes.png").size[0] > 300
    assert [path.name for path in Path().iterdir()] == ["sizes.png"]


def test_a_method_decides_defaults(result):
    assert "Label skew, 2 classes a client" in result("partition", "fml", "--data", "digits")[0]


def test_mistakes(fails):
    assert "must be the name of a PNG file" in fails("partition", "--data", "digits", "--picture", "sizes.gif")
    assert 'Did you mean "--clients"?' in fails("partition", "--data", "digits", "--client", "6")
    assert "no attribute" in fails("partition", "--data", "digits", "--partition", "domain:0.5")
    assert "--json is for a run: leave it out" in fails("partition", "--data", "digits", "--json")
    assert [*Path().iterdir()] == []
