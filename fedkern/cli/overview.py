"""The commands ``list`` and ``doctor``: what there is, and what serves on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from fedkern.cli.command_parser import add_common, command_parser, read
from fedkern.cli.flags import add_repeatable, first
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.request import Request
from fedkern.standard_streams import put


def parse(words: Sequence[str]) -> Request | None:
    """Reads one of these commands; None if the words are another command."""
    command = first(words)
    if command not in COMMAND_TABLE:
        return None
    parser = command_parser(command)
    if command == "list":
        text = "code whose methods, data sets ... are listed too; repeatable"
        add_repeatable(parser, "--plugin", "FILE.py|MODULE", text)
    add_common(parser, {"list": "the names", "doctor": "the report"}[command])
    found = read(parser, command, words)
    return Request("help", help=parser.format_help()) if found.help else Request(command, json=found.json)


def catalogue() -> dict[str, dict[str, str]]:
    """Names and one-line descriptions of the methods, data sets, models, encoders, partitioners and aggregators.

    Metrics, parts and filters of plugins are among them where there are any.
    """
    from fedkern import plugins
    from fedkern.data import DATASETS, PARTITIONERS
    from fedkern.methods import AGGREGATORS, METHODS, METRICS
    from fedkern.methods.aggregators import Rule
    from fedkern.models import IMAGE_ENCODERS, MODELS, TEXT_ENCODERS
    from fedkern.named_code import FORMS

    metrics = {"metrics": {name: metric.description for name, metric in METRICS.items()}}
    return {
        "methods": {name: METHODS[name].description for name in sorted(METHODS)},
        "data sets": {name: info.description for name, info in DATASETS.items()},
        "models": {name: entry.description for name, entry in MODELS.items()}
        | {FORMS.replace(" or ", ", "): "a class or function of your own that returns an nn.Module"},
        "image encoders": dict(IMAGE_ENCODERS) | {"DIR": "any image network of transformers in a local folder"},
        "text encoders": dict(TEXT_ENCODERS) | {"DIR": "any text network of transformers in a local folder"},
        "partitioners": {info.usage: info.description for info in PARTITIONERS.values()},
        "aggregators": {Rule(name).text: entry.description for name, entry in AGGREGATORS.items()},
        **(metrics if METRICS else {}),
        **{f"{kind}s": found for kind in ("part", "filter") if (found := plugins.described(kind))},
    }


def list_all(request: Request) -> int:
    """Prints the catalogue."""
    found = catalogue()
    if request.json:
        put(found)
        return 0
    for i, (title, entries) in enumerate(found.items()):
        print(("\n" if i else "") + title)
        width = max(len(name) for name in entries) + 2
        for name, text in entries.items():
            print(f"  {name:<{width}}{text}")
    print(f"\nThe options of a method: {PROGRAM} METHOD --help")
    return 0


def doctor(request: Request) -> int:
    """Prints the state of the installation."""
    from fedkern.report import doctor as report
    from fedkern.report.progress import terminal

    if request.json:
        put(report.collect())
    else:
        report.show(terminal())
    return 0


COMMAND_TABLE = {"list": list_all, "doctor": doctor}
