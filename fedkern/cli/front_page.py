"""What ``--help`` without a method prints, without torch: the commands, and the methods with a line on each."""

from __future__ import annotations

import re
import sys
from pathlib import Path

TASKS = {
    "retrieval": "how often a finished run finds an image's text, and a text's image",
    "zero-shot": "classify images by prompts with a finished run's encoders",
    "probe": "classify images by few-shot or linear probes on a run's frozen encoder",
    "decode": "segment images by a light decoder on a run's frozen image tokens",
}
"""Commands of the downstream tasks on a finished image-text run."""

PROGRAM = "python -m fedkern.run"
COMMANDS = {
    **TASKS,
    "attack": "how well a finished run's model tells who was in its training data",
    "evaluate": "a finished run's figures, also on other data",
    "predict": "classes or masks of your own images, by a finished run",
    "export": "a finished run's network as a file for other programs",
    "extend": "more rounds for a run",
    "compare": "several methods over seeds and settings, or finished runs",
    "report": "one HTML file of a run or a comparison, to read in a browser",
    "flower": "a Flower project, run to its end on a SuperLink or in a simulation",
    "list": "show methods, data sets, models, encoders, partitioners, aggregators",
    "doctor": "show versions, processor, GPU and what serves",
}

_COMMANDS = f"""\
{PROGRAM} METHOD [flags]              train and evaluate a federated method
{PROGRAM} METHOD --help               every flag and the method's own options, with ranges and defaults
{PROGRAM} --resume DIR                continue an interrupted run
{PROGRAM} attack DIR                  {COMMANDS["attack"]}
{"".join(f"{PROGRAM} {name + ' DIR':<27} {text}" + chr(10) for name, text in TASKS.items())}\
{PROGRAM} evaluate DIR                {COMMANDS["evaluate"]}
{PROGRAM} predict DIR IMAGE...        {COMMANDS["predict"]}
{PROGRAM} export DIR                  {COMMANDS["export"]}
{PROGRAM} extend DIR --rounds R       {COMMANDS["extend"]}
{PROGRAM} compare METHOD METHOD...    {COMMANDS["compare"]}
{PROGRAM} report DIR...                {COMMANDS["report"]}
{PROGRAM} flower PROJECT_DIR          {COMMANDS["flower"]}
{PROGRAM} list                        {COMMANDS["list"]}
{PROGRAM} doctor                      {COMMANDS["doctor"]}
"""


def front_page() -> str:
    """The commands, and the methods, those of loaded plugins among them."""
    return "\n".join([_COMMANDS, "methods:", *(f"  {name:<16}{text}" for name, text in sorted(_methods().items()))])


def _methods() -> dict[str, str]:
    """Names and descriptions: registered ones, or what fedkern's own files say, since importing them loads torch."""
    if registry := sys.modules.get("fedkern.methods"):
        return {name: method.description for name, method in registry.METHODS.items()}
    files = (Path(__file__).parents[1] / "methods").rglob("*.py")
    pattern = re.compile(r'^@register\("(.+)"\)\nclass .+:\n    """(.+?)(?:"""|$)', re.MULTILINE)
    return {name: text.strip() for file in files for name, text in pattern.findall(file.read_text("utf-8"))}
