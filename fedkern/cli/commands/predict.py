"""``predict DIR IMAGE...``: classes or masks of the user's images, by a finished run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedkern.cli.finished_runs import add_network, run_folder, trusted_code
from fedkern.cli.parser import Parser, add_arguments
from fedkern.cli.request import Request
from fedkern.errors import UserError
from fedkern.files.filesystem import check_new, expand
from fedkern.process.standard_streams import print_result


def add_flags(parser: Parser) -> None:
    parser.add_folder("a finished run")
    parser.add_argument("paths", nargs="*", metavar="IMAGE", help="image files, or folders of image files")
    text = "CSV file to write, or for segmentation a new folder of masks; default predictions.csv or masks"
    add_arguments(parser, {"out": ("FILE", text)})
    add_network(parser)


def check_request(request: Request, parser: Parser) -> Request:
    if not (paths := request.arguments["paths"]):
        raise UserError(f"{parser.prog} needs images behind the run folder: files, or folders of files.")
    request.arguments["paths"] = [expand(path) for path in paths]
    return request


def play(request: Request) -> int:
    from fedkern.downstream import prediction
    from fedkern.report.live.progress_bar import show_progress

    best = request.arguments["network"] == "best"
    predictor = prediction.Predictor.open(run_folder(request), trusted_code(request), best=best)
    name, limit, write = prediction.WRITERS[predictor.task.network]
    out = request.out or Path(name)
    check_new(out, "predict")
    paths = prediction.found_images(request.arguments["paths"])
    shown_rows: list[tuple[Path, Any]] = []
    with show_progress(len(paths), "predicting") as step:

        def rows() -> Iterator[tuple[Path, Any, Any]]:
            for row in predictor.files(paths):
                if len(shown_rows) < limit:
                    shown_rows.append(row[:2])
                yield row
                step()

        write(out, predictor, paths, rows())
    if request.json:
        print_result({"images": len(paths), "classes": list(predictor.classes), "out": str(out)})
        return 0
    for path, probabilities in shown_rows:
        print(f"{path}  {predictor.task.answer_text(probabilities, predictor.classes)}")
    if len(paths) > limit > 0:
        print("...")
    print(f"{len(paths)} image{'s' if len(paths) > 1 else ''}: {out}")
    return 0
