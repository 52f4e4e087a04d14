"""``report DIR...``: one HTML file for a run or a comparison."""

from pathlib import Path

from fedkern.cli.finished_runs import add_network
from fedkern.cli.parser import Parser
from fedkern.cli.repeat import first_commands, repeat_command
from fedkern.cli.request import Request, find_trusted_code
from fedkern.errors import UserError
from fedkern.files.filesystem import expand
from fedkern.foreign_runs.recorded_run import RECORD
from fedkern.process.standard_streams import print_result
from fedkern.settings.config import check_run_folder


def add_flags(parser: Parser) -> None:
    parser.usage = f"{parser.prog} DIR [DIR ...] [flags]"
    text = "folder of a run, finished or not, or of a comparison; report.html is written into each"
    parser.add_folder("a run or of a comparison", text, several=True)
    add_network(parser, "the files", choice=False)


def play(request: Request) -> int:
    from fedkern.report.figures.matplotlib_import import without_docstrings

    with without_docstrings():
        from fedkern.comparison import comparison_page
        from fedkern.report.pages import html_page, run_page

    folders: dict[Path, Path] = {}
    for folder in map(expand, request.arguments["folders"]):
        if not comparison_page.holds_runs(folder):
            _check(folder)
        html_page.check_target(folder)
        folders.setdefault(folder.resolve(), folder)
    written = []
    for folder in folders.values():
        if comparison_page.holds_runs(folder):
            result = comparison_page.read_comparison(folder)
            written.append(comparison_page.write_report(folder, result, commands=first_commands(result)))
        else:
            code = find_trusted_code(folder, request.options, request.settings)
            written.append(run_page.write_report(folder, command=repeat_command(folder), trusted=code))
        if not request.json:
            print(written[-1], flush=True)
    if request.json:
        print_result({"files": [str(path) for path in written]})
    return 0


def _check(folder: Path) -> None:
    if folder.is_dir() and not any((folder / name).exists() for name in ("config.toml", RECORD)):
        raise UserError(
            f"{folder} holds neither a run nor a comparison: name a folder that has a config.toml or a comparison.csv."
        )
    check_run_folder(folder)
