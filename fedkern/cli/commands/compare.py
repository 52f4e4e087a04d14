"""``compare METHOD METHOD...``, ``compare DIR DIR...``: methods over seeds and settings, or finished runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkern.cli import flags
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.parser import Parser, add_arguments, as_word, key_values
from fedkern.cli.repeat import first_commands
from fedkern.cli.request import Request, effective_config
from fedkern.errors import UserError, make_printable
from fedkern.files import atomic
from fedkern.methods import METHODS, method_registry
from fedkern.process import interrupts
from fedkern.process.standard_streams import print_result
from fedkern.settings.config import RunConfig
from fedkern.text_table import Table
from fedkern.typed_option import flag

if TYPE_CHECKING:
    from fedkern.comparison.cells import Variant
    from fedkern.comparison.compared import Comparison

_NOT_HERE = {
    "resume": "give the same command again with the same --out to go on",
    "tensorboard": "use it with a single run",
    "profile": "use it with a single run",
    "predictions": "give it to a finished run, --resume DIR --predictions",
}
"""Flags of a run that a comparison does not take, with the alternative."""

USAGE = f"""\
{PROGRAM} compare METHOD METHOD... [flags]    run methods with several seeds, then compare them
{PROGRAM} compare DIR DIR...                  compare finished runs, grouped by method and settings

The settings of {PROGRAM} METHOD --help follow the methods and apply to all of them. A method option goes to the
methods that have it. Repeat the command with the same --out to continue where it stopped.
"""


def add_flags(parser: Parser) -> None:
    """Add the flags. Methods and their flags, or folders, are words around them."""
    parser.begin(USAGE)
    parser.rest = []
    add_arguments(parser, {
        "seeds": ("N", "number of seeds, from --seed on, or a list such as 0,4,7; default 3"),
        "sweep": ("NAME=V,V", "values of a setting or a method option; repeatable, all combinations are run; separate "
                              "values that have commas by ;", []),
        "select": ("validation", "run a sweep with the first seed only, all seeds with every method's best setting "
                                 "by its validation figure"),
        "target": ("FIGURE=VALUE", "report rounds, bytes and seconds up to this figure, such as accuracy=0.8"),
        "method_option": ("key=value", "an option of the methods that have it; repeatable", []),
        "jobs": ("N", "runs at once, each in its own process, with the same bits; default 1"),
        "slurm": ("", "run nothing, but write slurm.sh, an array script for sbatch with one task for each run"),
        "task": ("K", "run only run K, counted from 0, as a task of the array, and write no result"),
        "out": ("DIR", "folder of the runs and of comparison.csv, .md, .tex and .png; default comparisons/<time>"),
        "report": ("", "write report.html of the comparison"),
        "quiet": ("", "print nothing but the folder at the end"),
        "json": ("", "print only the table, as JSON"),
    })  # fmt: skip


def check_request(request: Request, parser: Parser) -> Request:
    from fedkern.comparison.cells import check_methods, read_sweep
    from fedkern.comparison.compared import Plan

    words, arguments = parser.rest or [], request.arguments
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, run_words = words[:count], words[count:]
    folders = [name for name in names if name not in METHODS and Path(name).is_dir()]
    if names and len(folders) == len(names):
        new = {name: arguments[name] for name in ("seeds", "sweep", "select", "jobs", "slurm", "task")}
        new["method_option"] = request.options
        if extra := [*(flag(name) for name, value in new.items() if value), *run_words]:
            raise UserError(f"{extra[0]} is for new runs: name methods instead of folders, or leave it out.")
        return dataclasses.replace(request, arguments={"target": arguments["target"], "folders": folders})
    if folders and len(folders) < len(names):
        name = next(name for name in names if name not in folders)
        kind = "a method" if name in METHODS else "no folder"
        raise UserError(f"{folders[0]} is a folder and {name} is {kind}: name methods alone, or folders alone.")
    check_methods(names)
    run = _settings(names[0], run_words, parser)
    options = key_values(request.options, "method_option")
    plan = Plan.of(
        names, run.settings, options, sweep=read_sweep(arguments["sweep"]), seeds=arguments["seeds"] or "3",
        select=arguments["select"], target=arguments["target"],
    )  # fmt: skip
    jobs, number = arguments["jobs"] or "1", arguments["task"]
    if arguments["slurm"] and number:
        raise UserError(
            f"--slurm writes a script of all tasks, and --task {number} plays one: leave one of the two out."
        )
    if (arguments["slurm"] or number) and (arguments["select"] or jobs != "1"):
        reason = "--select waits for runs of other tasks" if arguments["select"] else f"--jobs {jobs} plays several"
        raise UserError(f"--slurm and --task are for one run a task, and {reason}: leave one of the two out.")
    planned = {"jobs": int(jobs) if jobs.isdecimal() else jobs, "plan": plan, "options": options}
    common = {name: getattr(request, name) for name in ("command", "out", "report", "quiet", "json")}
    return dataclasses.replace(run, arguments={**arguments, **planned}, **common)


def _settings(method: str, run_words: Sequence[str], parser: Parser) -> Request:
    """Return the run's settings behind the methods, as a request for one of the methods."""
    run = flags.parse_run([method, *run_words], parser)
    for name, way in _NOT_HERE.items():
        if getattr(run, name):
            raise UserError(f"--{name} is not for {parser.command}: {way}.")
    return run


def play(request: Request) -> int:
    """Compare methods or finished runs. Returns 0, 1 if a run failed, 130 after Ctrl-C and 143 after SIGTERM."""
    from fedkern.cli.backend_check import check_backend
    from fedkern.comparison import compared
    from fedkern.comparison.boards import choose_board
    from fedkern.comparison.cell_runner import Runner

    # Folders of finished runs are only read.
    arguments = request.arguments
    if "folders" in arguments:
        found = compared.compare_found(arguments["folders"], out=request.out, target=arguments["target"])
        return _tell(request, found, {})
    check_backend()
    live_board = choose_board(quiet=request.quiet, json=request.json)
    where: list[Path] = []
    tracebacks: dict[str, str] = {}

    def begin(out: Path) -> compared.Comparison | None:
        where.append(out)
        given_names = frozenset(request.settings)
        runner = Runner(
            out, lambda variant, seed: config_of(request, variant, seed), given_names, live_board,
            tracebacks=tracebacks, jobs=arguments["jobs"],
        )  # fmt: skip
        plan, number = arguments["plan"], arguments["task"]
        if number is None and not arguments["slurm"]:
            return compared.play_comparison(runner, plan)
        # Runs are numbered in the order of `cells`, so that a script and its tasks agree.
        pairs = [(variant, seed) for seed in plan.seeds for variant in chain(*plan.variants.values())]
        if number is not None and not (number.isdecimal() and int(number) < len(pairs)):
            raise UserError(f'--task must be the number of a run, from 0 to {len(pairs) - 1}, not "{number}".')
        chosen = pairs if number is None else [pairs[int(number)]]
        planned = [cell for variant, seed in chosen for cell in runner.plan([variant], [seed])]
        if arguments["slurm"]:
            _write_script(request, [cell.config for cell in planned], out)
        else:
            with closing(live_board):
                runner.play(planned)
            print(runner.folder(planned[0]))
        return None

    # After an interruption, print the command that continues the comparison.
    try:
        result = compared.in_folder(request.out, begin)
    except KeyboardInterrupt as stop:
        how, code = interrupts.end_by(stop)
        live_board.close()
        begun = bool(where) and any(where[0].glob("*/config.toml"))
        again = f"; go on with: {_again(arguments['words'], where[0])}" if begun else " before anything was written"
        print(f"{how}{again}", file=sys.stderr)
        return code
    return 0 if result is None else _tell(request, result, tracebacks)


def _write_script(request: Request, configs: Sequence[RunConfig], out: Path) -> None:
    """Write the array script of a comparison's runs, and say how to continue."""
    from fedkern.comparison.cells import most_threads

    words = [word for word in request.arguments["words"] if word != "--slurm"]
    fixed = [] if len({config.threads for config in configs}) > 1 else ["--threads", str(configs[0].threads)]
    command = f"{as_word(sys.executable or 'python')} -m fedkern.run{_again([*words, *fixed], out)[len(PROGRAM) :]}"
    text = f"""\
#!/bin/bash
#SBATCH --job-name=fedkern
#SBATCH --array=0-{len(configs) - 1}
#SBATCH --cpus-per-task={most_threads(configs)}
{"#SBATCH --gres=gpu:1" if any(config.device != "cpu" for config in configs) else ""}
# Task K plays run K.  When all tasks have ended, the same command without --slurm writes the result.
cd {as_word(Path.cwd())} || exit
exec {command} --task "$SLURM_ARRAY_TASK_ID"
"""
    path = out / "slurm.sh"
    atomic.make_folder(out)
    atomic.write_bytes(path, text.encode())
    hint = f"start: sbatch {as_word(path)}\nafter the last task: {_again(words, out)}"
    print_result({"script": str(path), "runs": len(configs)} if request.json else str(path) if request.quiet else hint)


def _again(words: Sequence[str], out: Path) -> str:
    named = any(word == "--out" or word.startswith("--out=") for word in words)
    return " ".join([PROGRAM, *map(as_word, words), *([] if named else ["--out", as_word(out)])])


def config_of(request: Request, variant: Variant, seed: int) -> RunConfig:
    from fedkern.comparison.cells import own_settings, spell_value

    method, options = variant.method, request.arguments["options"]
    common = {name: value for name, value in options.items() if name in method_registry.option_names(method)}
    options_given: Mapping[str, Any] = {**common, **variant.options}
    settings = {**own_settings(method, request.settings), **RunConfig.read(variant.settings), "seed": seed}
    words = tuple(f"{name}={spell_value(value)}" for name, value in options_given.items())
    return effective_config(dataclasses.replace(request, method=method, settings=settings, options=words))


def _tell(request: Request, comparison: Comparison, tracebacks: Mapping[str, str]) -> int:
    from fedkern.report.live.progress_bar import make_console
    from fedkern.report.names import print_line

    result = comparison.result
    places = [f"folder: {comparison.folder}", f"files:  {', '.join(path.name for path in comparison.files)}"]
    code = print_outcome(
        request, comparison.folder, lambda: result.to_json(comparison.folder), result.text_table(),
        [*result.sentences(), *places], tracebacks, comparison.failures,
    )  # fmt: skip
    if request.report:
        from fedkern.comparison.comparison_page import write_report

        written = write_report(comparison.folder, comparison.result, commands=first_commands(comparison.result))
        if not (request.json or request.quiet):
            print_line(make_console(), f"report: {written}")
    return code


def print_outcome(
    request: Request, folder: Path, as_json: Callable[[], object], table: Table, sentences: Iterable[str],
    tracebacks: Mapping[str, str], failures: Collection[str],
) -> int:  # fmt: skip
    from fedkern.report.live.progress_bar import make_console
    from fedkern.report.names import print_line

    if request.json:
        print_result(as_json())
    elif request.quiet:
        print(folder)
    else:
        console = make_console()
        console.print(table)
        for text in sentences:
            print_line(console, text)
    for text in tracebacks.values():
        print(make_printable(text), end="", file=sys.stderr)
    for text in failures:
        print(f"error: {text}", file=sys.stderr)
    return 1 if failures else 0
