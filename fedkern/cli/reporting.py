"""The command ``report DIR...``: one HTML file for a run or a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkern.cli.command_parser import add_code, add_common, command_parser, read
from fedkern.cli.flags import Parser, check_filled, first, quote
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.repeat import command_line
from fedkern.cli.request import Request, trusted
from fedkern.errors import UserError
from fedkern.files import expand
from fedkern.settings.config import RunConfig
from fedkern.settings.stored import check_run_folder, load_settings
from fedkern.standard_streams import put

if TYPE_CHECKING:
    from fedkern.comparison.results import Result

NAME = "report"


def _parser() -> Parser:
    parser = command_parser(NAME)
    parser.usage = f"{PROGRAM} {NAME} DIR [DIR ...] [flags]"
    parser.add_argument("folders", nargs="*", metavar="DIR",
                        help="folder of a run, finished or not, or of a comparison; report.html is written into "
                             "each")  # fmt: skip
    parser.add_argument("--data-root", metavar="DIR", help="where the data files are, if they have moved")
    parser.add_argument("--model", metavar="NAME", help="the run's network again, where it names code that may run")
    add_code(parser, data=False)
    add_common(parser, "the files")
    return parser


def parse(words: Sequence[str]) -> Request | None:
    """Reads the command; None if the words are another command."""
    if first(words) != NAME:
        return None
    parser = _parser()
    found = read(parser, NAME, words)
    if found.help:
        return Request("help", help=parser.format_help())
    check_filled({name: getattr(found, name) for name in ("data_root", "model")})
    if not found.folders:
        raise UserError(f"{PROGRAM} {NAME} needs the folder of a run or of a comparison.")
    given_again = {} if found.model is None else {"model": found.model}
    return Request(
        NAME,
        json=found.json,
        settings={**RunConfig.read({"data_root": found.data_root}), **given_again},
        options=tuple(found.method_option),
        plugins=tuple(found.plugin),
        arguments={"folders": [expand(folder) for folder in found.folders]},
    )


def report(request: Request) -> int:
    """Writes the report of every folder, and prints the files."""
    from fedkern.report.matplotlib_import import undocumented

    with undocumented():
        from fedkern.comparison import comparison_page
        from fedkern.report import html_page, run_page

    folders: dict[Path, Path] = {}
    for folder in request.arguments["folders"]:
        if not comparison_page.holds_runs(folder):
            _check(folder)
        html_page.check_target(folder)
        folders.setdefault(folder.resolve(), folder)
    root, written = request.settings["data_root"], []
    for folder in folders.values():
        if comparison_page.holds_runs(folder):
            result = comparison_page.read(folder)
            commands = first_commands(result)
            written.append(comparison_page.write_report(folder, result, commands=commands, data_root=root))
        else:
            code = trusted(folder, request.options, request.settings)
            written.append(run_page.write_report(folder, data_root=root, command=repeating(folder), trusted=code))
        if not request.json:
            print(written[-1], flush=True)
    if request.json:
        put({"files": [str(path) for path in written]})
    return 0


def _check(folder: Path) -> None:
    """Raises UserError where a folder holds no run."""
    if folder.is_dir() and not (folder / "config.toml").exists():
        raise UserError(
            f"{folder} holds neither a run nor a comparison: name a folder that has a config.toml or a comparison.csv."
        )
    check_run_folder(folder)


def repeating(folder: Path) -> str:
    """The command that repeats a run; empty where data or network were in the memory of a Python program."""
    from fedkern.report.run_page import in_memory, stored_device

    config = load_settings(folder, device="cpu")
    if in_memory(config):
        return ""
    device = stored_device(folder)
    return command_line(config.method, config) + ("" if device == "cpu" else f" --device {quote(device)}")


def first_commands(result: Result) -> dict[str, str]:
    """The command that repeats the first run of every group of a comparison, by the group's name."""
    firsts = {group.label: next(iter(group.runs.values())).folder for group in result.groups}
    return {label: text for label, run in firsts.items() if (text := repeating(run))}


COMMAND_TABLE = {NAME: report}
