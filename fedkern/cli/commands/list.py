"""``list``: methods, data sets, models, encoders, partitioners, aggregators and metrics."""

from fedkern.cli.front_page import PROGRAM
from fedkern.cli.parser import Parser, add_arguments
from fedkern.cli.request import Request
from fedkern.process.standard_streams import print_result


def add_flags(parser: Parser) -> None:
    text = "code whose methods, data sets ... to list too; repeatable"
    add_arguments(parser, {"plugin": ("FILE.py|MODULE", text, []), "json": ("", "print the names as JSON")})


def catalogue() -> dict[str, dict[str, str]]:
    from fedkern.data import DATASETS, PARTITIONERS
    from fedkern.methods import AGGREGATORS, METHODS, METRICS
    from fedkern.methods.aggregators import Rule
    from fedkern.models import IMAGE_ENCODERS, MODELS, TEXT_ENCODERS
    from fedkern.usercode import plugins
    from fedkern.usercode.named_code import FORMS

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
        **{f"{kind}s": descriptions for kind in ("part", "filter") if (descriptions := plugins.describe_plugins(kind))},
    }


def describe() -> str:
    lines = []
    for title, entries in catalogue().items():
        width = max(map(len, entries)) + 2
        lines += [title, *(f"  {name:<{width}}{text}" for name, text in entries.items()), ""]
    return "\n".join([*lines, f"The options of a method: {PROGRAM} METHOD --help"])


def play(request: Request) -> int:
    print_result(catalogue() if request.json else describe())
    return 0
