"""``export DIR``: a finished run's network as a file for other programs."""

import json
from pathlib import Path

from fedkern.cli.finished_runs import add_network, run_folder, trusted_code
from fedkern.cli.parser import Parser, add_arguments
from fedkern.cli.request import Request
from fedkern.downstream import model_export
from fedkern.files.filesystem import check_new
from fedkern.messages.leaves import leaves
from fedkern.process.standard_streams import print_result


def add_flags(parser: Parser) -> None:
    parser.add_folder("a finished run")
    add_arguments(parser, {
        "format": ("|".join(model_export.FORMATS), "file format; default by the suffix of --out, else torch-export"),
        "out": ("FILE", "file to write; default model.onnx, model.pt2 or model.pt in the run folder"),
    })  # fmt: skip
    add_network(parser)


def check_request(request: Request, parser: Parser) -> Request:
    model_export.find_format(request.arguments["format"], request.out)
    return request


def play(request: Request) -> int:
    kind = model_export.find_format(request.arguments["format"], request.out)
    best = request.arguments["network"] == "best"
    bundle = model_export.exportable(run_folder(request), trusted_code(request), best=best)
    out = request.out or run_folder(request) / f"{'best' if best else 'model'}{model_export.FORMATS[kind]}"
    check_new(out, "export")
    written = [str(path) for path in model_export.export(bundle, out, kind)]
    if request.json:
        print_result({"files": written})
    else:
        print("\n".join(written))
        if bundle.lengths and kind != "state-dict":
            inputs = ", ".join(leaves(json.loads(Path(written[1]).read_text())["input"]))
            print(f"inputs: {inputs} (letters stand for any size, numbers for the only one)")
    return 0
