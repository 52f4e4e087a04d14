"""Tests of the wording of errors: arguments in Python, flags on the command line, Flower's keys over Flower."""

import pytest

from fedkern.errors import UserError
from fedkern.settings.error_wording import key_words, python_words, to_python_words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rounds must be at least 1, not 0.", "rounds must be at least 1, not 0."),
        ("--width 8 is not for it: leave width out.", "width=8 is not for it: leave width out."),
        ("--device cuda needs a GPU; use --device cpu.", 'device="cuda" needs a GPU; use device="cpu".'),
        ("--privacy-unit patient needs all", 'privacy_unit="patient" needs all'),
        ("give --data-option bits=12 or", 'give data_options={"bits": 12} or'),
        ("with --method-option intervention=off.", 'with intervention="off".'),
        ("continue it with --resume 'a b', or choose another --out.",
         "continue it with fedkern.load('a b').resume(), or choose another out."),
        ("continue it with --resume second.", 'continue it with fedkern.load("second").resume().'),
        ("go on with --resume, or", "go on with resume(), or"),
        ("give --boxes FILE or --client-column.",
         'give data_options={"boxes": FILE} or data_options={"client_column": ...}.'),
        ("name another folder with --out.", "name another folder with out=."),
        ("compare METHOD --sweep lr=0.1,0.2.", 'fedkern.compare(METHOD, sweep={"lr": [0.1, 0.2]}).'),
        ("take --network last (in Python best=False).", "take best=False."),
        ("give --model 'x.py:N' (in Python trusted=[...]).", "give trusted=[...]."),
        ("name its code, --model FILE.py:NAME.", 'name its code, model="FILE.py:NAME".'),
        ("--lr-step-factor has no effect", "lr_step_factor has no effect"),
        ("METHOD --help lists them; a--b stays.", "METHOD --help lists them; a--b stays."),
    ],
)  # fmt: skip
def test_flags_become_arguments(flags, words):
    assert to_python_words(flags) == words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rounds must be at least 1, not 0.", "rounds must be at least 1, not 0."),
        ("leave --local-epochs 3 out, or", "leave local-epochs=3 out, or"),
        ("give --data-option bits=12 or", "give data-option.bits=12 or"),
        ("with --method-option intervention=off.", "with method-option.intervention=off."),
        ("--buffers drop is not for it", 'buffers="drop" is not for it'),
        ("go on with --resume DIR.", "go on with --resume DIR."),
    ],
)
def test_flags_become_keys_of_a_run_config(flags, words):
    with pytest.raises(UserError) as told, key_words():
        raise UserError(flags)
    assert str(told.value) == words


def test_an_error_keeps_its_type_and_others_their_words():
    class Own(UserError):
        exit_code = 7

    with pytest.raises(Own, match=r"^rounds=3 is wrong") as told, python_words():
        raise Own("--rounds 3 is wrong")
    assert told.value.exit_code == 7
    with pytest.raises(ValueError, match=r"^--rounds"), python_words():
        raise ValueError("--rounds")
