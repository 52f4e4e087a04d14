"""``partition [flags]``: the table and picture of a partition, without a run."""

import dataclasses
from pathlib import Path

from fedkern.cli import flags
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.parser import RUN_FLAGS, Parser, add_arguments
from fedkern.cli.request import Request, effective_config
from fedkern.errors import UserError
from fedkern.files.filesystem import expand
from fedkern.methods import METHODS
from fedkern.typed_option import flag

USAGE = f"""\
{PROGRAM} partition [METHOD] [flags]    share the samples of --data out, as a run with the same flags would

The flags are those of {PROGRAM} METHOD --help, such as --data, --partition, --clients and --seed. METHOD decides
defaults, and is fedavg if left out.
"""


def add_flags(parser: Parser) -> None:
    parser.begin(USAGE)
    parser.rest = []
    add_arguments(parser, {"picture": ("FILE.png", "also draw every client's samples by class")})


def check_request(request: Request, parser: Parser) -> Request:
    words = parser.rest or []
    named = [] if words and words[0] in METHODS else ["fedavg"]
    run = flags.parse_run([*named, *words], parser)
    picture = request.arguments["picture"]
    if picture is not None and Path(picture).suffix.lower() != ".png":
        raise UserError(f"--picture {picture} must be the name of a PNG file, such as partition.png.")
    for name in RUN_FLAGS.keys() - {"method_option", "plugin", "config"}:
        if getattr(run, name):
            raise UserError(f"{flag(name)} is for a run: leave it out.")
    return dataclasses.replace(run, command="partition", arguments={"picture": picture})


def play(request: Request) -> int:
    from fedkern.report.live.progress_bar import make_console, print_line
    from fedkern.report.tables import partition_table
    from fedkern.settings.run_data import load_data

    config = effective_config(request)
    console = make_console()
    statistics = load_data(config, masks=False, notice=lambda text: print_line(console, text)).statistics
    print_line(console, f"{statistics.title[:1].upper()}{statistics.title[1:]}")
    console.print(partition_table(statistics))
    if (picture := request.arguments["picture"]) is not None:
        from fedkern.report.figures.plots import partition_picture, save_png

        save_png(partition_picture(statistics, title=f"{config.data}: {statistics.title}"), expand(Path(picture)))
    return 0
