"""``evaluate DIR``: a finished run's figures, also on other data."""

from __future__ import annotations

from fedkern.cli.finished_runs import add_data, add_network, code, folder, publish
from fedkern.cli.flags import Parser
from fedkern.cli.request import Request
from fedkern.engine.store.records import plain
from fedkern.errors import printable_name
from fedkern.settings.stored import load_settings
from fedkern.usercode import named_code


def add_flags(parser: Parser) -> None:
    """Adds the flags."""
    parser.add_folder("a finished run")
    add_data(parser)
    add_network(parser, data=True)


def play(request: Request) -> int:
    """Evaluates the network, prints its figures and writes them into the run folder."""
    from rich.console import Group

    from fedkern.cli.backend_check import check_backend
    from fedkern.downstream.evaluation import evaluate_run
    from fedkern.process.allocator import keep_freed_memory
    from fedkern.report.live.display import display
    from fedkern.report.names import CELL
    from fedkern.report.tables import figures_table, intervals_tables

    check_backend()
    keep_freed_memory()
    out, data, best = folder(request), request.settings["data"], request.arguments["network"] == "best"
    where = {name: request.settings.get(name) for name in ("data", "data_root", "cache")}
    notify = display(quiet=False, json=request.json).on_notice
    options, trusted = request.data_options, code(request)
    metrics, sets, rows = evaluate_run(
        out, data_options=options, trusted=trusted, best=best, own_tests=True, progress=notify, **where
    )
    config, network = load_settings(out, device="cpu"), "best" if best else "last"
    result = {"method": config.method, "data": data or config.data, "network": network, "metrics": plain(metrics)}
    title = printable_name(f"{result['method']} on {result['data']}, network of the {network} round", CELL)
    name = "-".join(["evaluate", *(["best"] if best else []), *([named_code.short(data)] if data else [])])
    tables = Group(figures_table(title, metrics, sets, config.main), *intervals_tables(rows))
    return publish(request, {**result, "intervals": rows}, tables, out / f"{name}.json")
