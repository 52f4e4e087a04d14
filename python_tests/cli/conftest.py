"""Fixtures that run the command line."""

import pytest

from fedkern.run import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run every test in an empty folder, without the caller's environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("FEDKERN_BACKEND", "FEDKERN_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fails(capsys):
    """Return a function that runs a command that must fail with exit code 2, and returns its one sentence."""

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
    """Return a function that runs a command that must succeed, and returns its standard output and standard error."""

    def run(*argv: str) -> tuple[str, str]:
        assert main(list(argv)) == 0
        out, err = capsys.readouterr()
        return out, err

    return run
