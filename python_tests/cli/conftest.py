"""Fixtures that run the command line."""

import pytest

from fedkern.run import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in an empty folder of its own, free of the caller's environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("FEDKERN_BACKEND", "FEDKERN_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fails(capsys):
    """Run a command that must end in one sentence and exit code 2, and return the sentence."""

    def run(*argv: str) -> str:
        assert main(list(argv)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        sentence = err.splitlines()[-1]
        assert sentence.startswith("error: ")
        assert sentence.endswith((".", "?"))
        return sentence

    return run


@pytest.fixture
def result(capsys):
    """Run a command that must succeed and return what it wrote to standard output and to standard error."""

    def run(*argv: str) -> tuple[str, str]:
        assert main(list(argv)) == 0
        out, err = capsys.readouterr()
        return out, err

    return run
