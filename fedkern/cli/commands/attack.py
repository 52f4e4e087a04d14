"""``attack DIR``: the membership attack on a finished run's network."""

from fedkern.cli.finished_runs import add_network, run_folder, trusted_code
from fedkern.cli.parser import Parser, add_arguments
from fedkern.cli.request import Request
from fedkern.engine.store.record_files import plain
from fedkern.process.standard_streams import print_result


def add_flags(parser: Parser) -> None:
    parser.add_folder("a finished run")
    add_arguments(parser, {"data_root": ("DIR", "folder of the data files, if they have moved")})
    add_network(parser)


def play(request: Request) -> int:
    from fedkern.downstream import membership_attack

    out, best = run_folder(request), request.arguments["network"] == "best"
    root = request.settings.get("data_root")
    result = membership_attack.attack(out, data_root=root, keep=False, trusted=trusted_code(request), best=best)
    if request.json:
        print_result(plain(result))
    else:
        from fedkern.report.live.progress_bar import make_console
        from fedkern.report.tables import attack_table

        make_console().print(attack_table(result, f"{out}, network of the {result['network']} round"))
    # Last, so that the printed result is not lost if the folder cannot be written.
    membership_attack.write(out, result)
    return 0
