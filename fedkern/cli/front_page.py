"""The front page of ``--help``, made without torch: the commands, and the methods with a line on each."""

import re
import sys
from pathlib import Path

PROGRAM = "python -m fedkern.run"
_USAGE = {
    "attack DIR": "measure whether a finished run's model reveals who was in its training data",
    "evaluate DIR": "evaluate a finished run's network, also on other data or another task",
    "predict DIR IMAGE...": "predict classes or masks of your own images with a finished run",
    "export DIR": "write a finished run's network for other programs",
    "extend DIR --rounds R": "give a run more rounds",
    "compare METHOD METHOD...": "compare methods over seeds and settings, or finished runs",
    "import FILE.csv": "turn a table of results into runs, to compare them",
    "reproduce NAME|FILE.toml": "run a paper's table and compare it with the published figures",
    "report DIR...": "write a run or a comparison as one HTML file, to read in a browser",
    "flower PROJECT_DIR": "run a Flower project to its end, on a SuperLink or in a simulation",
    "partition": "show how the samples of --data are shared out, without a run",
    "list": "show methods, data sets, models, encoders, partitioners, aggregators",
    "doctor": "show versions, processor, GPU and the usable backends",
}
COMMANDS = {words.split()[0]: text for words, text in _USAGE.items()}
USAGE = {words.split()[0]: words for words in _USAGE}
"""Every command with its required words."""

_COMMANDS = f"""\
{PROGRAM} METHOD [flags]              train and evaluate a federated method
{PROGRAM} METHOD --help               every flag and the method's own options, with ranges and defaults
{PROGRAM} --resume DIR                continue an interrupted run
{"".join(f"{PROGRAM} {words:<27} {text}" + chr(10) for words, text in _USAGE.items())}"""


def front_page() -> str:
    return "\n".join([_COMMANDS, "methods:", *(f"  {name:<16}{text}" for name, text in sorted(_methods().items()))])


def _methods() -> dict[str, str]:
    """Return names and descriptions: registered ones, or parsed from fedkern's files, as importing them loads torch."""
    if registry := sys.modules.get("fedkern.methods"):
        return {name: method.description for name, method in registry.METHODS.items()}
    files = (Path(__file__).parents[1] / "methods").rglob("*.py")
    pattern = re.compile(r'^@register\("(.+)"\)\nclass .+:\n    """(.+?)(?:"""|$)', re.MULTILINE)
    return {name: text.strip() for file in files for name, text in pattern.findall(file.read_text("utf-8"))}
