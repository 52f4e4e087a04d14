"""Tests of messages: whatever a file or a command line holds, the error is one sentence of a readable length."""

from fedkern.errors import MESSAGE, UserError, make_printable, suggest_name
from fedkern.run import main


def test_long_names_are_cut_and_the_way_out_stays():
    name = "n" * 200_000
    said = str(UserError(f'there is no model "{name}", choose one of cnn, resnet8.'))
    assert len(said) < 1200
    assert said.startswith('there is no model "nnn')
    assert said.endswith('nnn", choose one of cnn, resnet8.')
    assert "..." in said
    words = str(UserError(f"{'a b ' * 50_000}: take another."))
    assert len(words) <= MESSAGE
    assert words.endswith(": take another.")
    path = "/" + "/".join(["folder" * 20] * 8)
    assert path in str(UserError(f"{path} is missing."))  # what can be a path in practice stays whole


def test_controls_are_shown_and_not_obeyed():
    assert str(UserError("the image \x1b[2J\x07\u202e\udcff.png is é.")) == (
        r"the image \x1b[2J\x07\u202e\udcff.png is é."
    )
    assert make_printable("two\nlines") == "two\nlines"


def test_a_long_word_has_no_neighbour():
    assert suggest_name("x" * 200_000, ["xx"]) == ""
    assert "fedavg" in suggest_name("fedavgg", ["fedavg"])


def test_the_command_line_says_it_shortly(capsys, tmp_path):
    long = "x" * 200_000
    for words in (
        [long],
        ["fedavg", "--model", long],
        ["fedavg", f"--{long}"],
        ["fedavg", "--data", "folder", "--data-root", long],
        ["fedavg", "--config", long],
        ["--resume", long],
        ["fedavg", "--data-option", f"{long}=1"],
        ["fedlpfm", "--method-option", f"teacher={long}"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert len(error) <= MESSAGE + 10
