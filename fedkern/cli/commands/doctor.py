"""``doctor``: the state of the installation and the backends of this machine."""

from fedkern.cli.parser import Parser, add_arguments
from fedkern.cli.request import Request
from fedkern.process.standard_streams import print_result


def add_flags(parser: Parser) -> None:
    add_arguments(parser, {"json": ("", "print the report as JSON")})


def play(request: Request) -> int:
    from fedkern.report import doctor_page
    from fedkern.report.live.progress_bar import make_console

    if request.json:
        print_result(doctor_page.collect_report())
    else:
        doctor_page.print_report(make_console())
    return 0
