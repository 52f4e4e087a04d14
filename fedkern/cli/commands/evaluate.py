"""``evaluate DIR``: a finished run's figures, also on other data, or those of a task on an image-text run."""

from inspect import signature
from pathlib import Path
from typing import Any

from fedkern.cli.finished_runs import add_data, add_network, publish_result, run_folder, trusted_code
from fedkern.cli.parser import Parser
from fedkern.cli.request import Request
from fedkern.downstream.tasks import FEATURES, TASKS
from fedkern.engine.store.record_files import plain
from fedkern.errors import UserError, printable_name
from fedkern.settings.config import load_settings
from fedkern.typed_option import flag
from fedkern.usercode import named_code

FLAGS: dict[str, tuple[str, str, str]] = {
    "ks": ("K,...", "recall at these k", "1,5,10"),
    "prompts": ("TEXT|FILE", "template such as 'a photo of a {class}.', or a file of templates", ""),
    "shots": ("N,...", "training images of every class", "1,5,10,all"),
    "features": ("|".join(FEATURES), "the aligned first token, the mean patch token or the shared embedding", "token"),
    "draws": ("N", "random choices of the shots, averaged", "3"),
    "epochs": ("E", "passes of the decoder over the training images", "10"),
    "samples": ("N", "training images used, 0 for all", "0"),
    "seed": ("S", "of the random choices, or of the decoder's weights and order", "0"),
}
"""Metavar, help and default of the arguments of `TASKS`, each a flag of the tasks that have it."""


def add_flags(parser: Parser) -> None:
    parser.add_folder("a finished run")
    add_data(parser, "an option of that data set; with --task also labels=... of the run's own data")
    add_network(parser, "the figures")
    group = parser.add_argument_group("tasks of image-text runs")
    text = ("find an image's text and a text's image; classify by prompts; classify by a linear probe of the frozen "
            "encoder; segment by a light decoder of its tokens")  # fmt: skip
    group.add_argument("--task", choices=(*TASKS,), metavar="|".join(TASKS), help=text)
    for name, (metavar, text, default) in FLAGS.items():
        usual = f"; default {default or 'of the data set'}"
        group.add_argument(flag(name), metavar=metavar, help=f"{', '.join(_tasks_with(name))}: {text}{usual}")


def _tasks_with(name: str) -> list[str]:
    return [task for task, function in TASKS.items() if name in signature(function).parameters]


def check_request(request: Request, parser: Parser) -> Request:
    arguments = request.arguments
    words, settings = {name: arguments.pop(name) for name in FLAGS}, {}
    for name, word in words.items():
        tasks = _tasks_with(name)
        if arguments["task"] in tasks:
            settings[name] = _argument(name, FLAGS[name][2] if word is None else word)
        elif word is not None:
            raise UserError(f"{flag(name)} is for --task {' or '.join(tasks)}: leave it out, or name such a task.")
    arguments["settings"] = settings
    return request


def _argument(name: str, value: str) -> str | int | tuple[int, ...]:
    if name == "features" and value not in FEATURES:
        raise UserError(f"--features must be one of {', '.join(FEATURES)}, not {value}.")
    if name in ("prompts", "features"):
        return value
    if name in ("ks", "shots"):
        words = [word.strip() for word in value.split(",")]
        return tuple(0 if name == "shots" and word == "all" else _number(name, word, 1) for word in words)
    return _number(name, value.strip(), 0 if name in ("samples", "seed") else 1)


def _number(name: str, word: str, lowest: int) -> int:
    number = int(word) if word.isdecimal() and len(word) <= 18 else -1
    if number < lowest:
        raise UserError(f"--{name} takes whole numbers of at least {lowest}, not {word!r}.")
    return number


def result_path(request: Request) -> Path:
    """Return the file of a result: ``evaluate[-TASK][-best][-DATA][-LABELS].json`` in the run folder."""
    data, labels = named_code.short_name(request.settings.get("data") or ""), request.data_options.get("labels")
    task, network = (request.arguments[name] for name in ("task", "network"))
    words = ["evaluate", task, network.replace("last", ""), data, labels if task else None]
    return run_folder(request) / f"{'-'.join(str(word) for word in words if word)}.json"


def play(request: Request) -> int:
    from rich.console import Group

    from fedkern.cli.backend_check import check_backend
    from fedkern.downstream import Finished
    from fedkern.downstream.run_evaluation import evaluate_run
    from fedkern.process.allocator import keep_freed_memory
    from fedkern.report.live.notebook import choose_display
    from fedkern.report.names import CELL
    from fedkern.report.tables import downstream_table, figures_table, intervals_tables

    check_backend()
    keep_freed_memory()
    out, chosen, network = run_folder(request), request.arguments["task"], request.arguments["network"]
    how: dict[str, Any] = {name: request.settings.get(name) for name in ("data", "data_root", "cache")}
    how |= {"data_options": request.data_options, "trusted": trusted_code(request), "best": network == "best"}
    how["progress"] = choose_display(quiet=False, json=request.json).on_notice
    if chosen is not None:
        finished, settings = Finished.open(out, **how), request.arguments["settings"]
        result: dict[str, Any] = {
            "task": chosen, "run": str(out), "method": finished.config.method, "data": finished.data.name,
            "data_options": dict(request.data_options), "networks": len(finished.networks), "network": network,
            "settings": settings, "rows": TASKS[chosen](finished, **settings),
        }  # fmt: skip
        return publish_result(request, result, downstream_table(result), result_path(request))
    metrics, sets, rows = evaluate_run(out, own_tests=True, **how)
    config = load_settings(out, device="cpu")
    result = {"method": config.method, "data": how["data"] or config.data, "network": network}
    title = printable_name(f"{result['method']} on {result['data']}, network of the {network} round", CELL)
    tables = Group(figures_table(title, metrics, sets, config.main), *intervals_tables(rows))
    result |= {"metrics": plain(metrics), "intervals": rows}
    return publish_result(request, result, tables, result_path(request))
