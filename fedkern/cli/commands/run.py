"""A run: ``METHOD``, whose flags are in `fedkern.cli.flags`, and ``--resume DIR``."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedkern import listeners
from fedkern.cli import flower_project
from fedkern.cli.backend_check import check_backend
from fedkern.cli.front_page import PROGRAM
from fedkern.cli.parser import as_word
from fedkern.cli.repeat import command_line, repeat_command
from fedkern.cli.request import Request, effective_config, find_trusted_code
from fedkern.data.dataset_registry import given_options
from fedkern.engine.run import run
from fedkern.engine.store.extending import REPORT
from fedkern.engine.store.predictions import FILE as PREDICTIONS
from fedkern.engine.store.record_files import plain
from fedkern.engine.store.run_folder import RUNS, check_free, check_vacant, reserve, run_name
from fedkern.errors import UserError
from fedkern.listeners.events import Listener, Listeners, Summary
from fedkern.methods import method_registry
from fedkern.process import interrupts, machine
from fedkern.process.standard_streams import print_result
from fedkern.settings.config import RESUMABLE, RunConfig, load_settings, stored_settings
from fedkern.usercode import plugins


@contextmanager
def _folder(request: Request, config: RunConfig) -> Iterator[Path]:
    """Make the run folder, or return the given one.

    The default folder is made at once, so that no other run takes it, and removed if left empty.
    """
    from fedkern.report.figures.pictures import PICTURE_LIST, PICTURES

    if request.resume is not None:
        yield request.resume
        return
    if request.out is not None:
        check_vacant(request.out)
        check_free(request.out, (*PICTURES.values(), PICTURE_LIST, *([REPORT] if request.report else [])))
        yield request.out
        return
    new_parent = not RUNS.exists()
    out = reserve(RUNS, run_name(config), "name another run folder with --out")
    try:
        yield out
    finally:
        for folder in (out, RUNS) if new_parent else (out,):
            with suppress(OSError):  # not empty: a run has begun there
                folder.rmdir()


def play(request: Request) -> int:
    """Play a run or, with ``--flower``, write a project. Returns 0, or 130 after Ctrl-C and 143 after SIGTERM."""
    if request.flower is not None:
        return flower_project.write_project(request)
    check_backend()
    config = effective_config(request) if request.resume is None else _load_stored_config(request)
    with _folder(request, config) as out, _workers_ahead(config):
        return _run(request, config, out)


def _workers_ahead(config: RunConfig) -> AbstractContextManager[None]:
    """Fork the process that starts workers, if the run may use workers, before this process computes anything."""
    from fedkern.engine.executors import choice, fork_server
    from fedkern.engine.transport import torchrun_group

    in_one_process = (
        config.workers == "1" or config.trained_clients < 2 or bool(choice.find_worker_obstacle(config.device))
    )
    in_one_process = in_one_process or bool(plugins.loaded_plugins())  # a plugin may have computed already
    in_one_process = in_one_process or torchrun_group.find_main_group() is not None  # clients work on ranks
    idle = min(machine.usable_cores(), config.threads) > 1 or config.workers != "auto"
    return fork_server.prefork_server() if interrupts.whole_process() and idle and not in_one_process else nullcontext()


def _run(request: Request, config: RunConfig, out: Path) -> int:
    from fedkern.report.live.notebook import choose_display
    from fedkern.report.names import print_line

    if request.resume is None:  # the user named this code, in flags or in --config
        code = tuple(part for _, part in config.code())
    else:
        code = find_trusted_code(out, request.options, request.settings)
    loggers = trackers(request)
    view = choose_display(quiet=request.quiet, json=request.json)
    tee = Listeners(*loggers, view)  # a tracker that asks something at its start does so before the progress bar
    complete = False
    try:
        summary = run(
            config, out=out, resume=request.resume is not None, listener=tee, trusted=code, profile=request.profile,
            predictions=request.predictions, rounds=request.arguments.get("rounds"),
        )  # fmt: skip
        complete = True
        view.close()
        data: Any = None if tee.info is None else tee.info.data
        if data is not None and config.augment == data.form.augment:
            config = config.replace(augment=None)  # the data set's default, not the user's choice
        _close(request, config, out, summary)
        _illustrate(request, config, out, data, code, view)
    except KeyboardInterrupt as stop:
        how, status = interrupts.end_by(stop)
        view.close()
        if (out / "config.toml").exists():
            again = " ".join([as_word(out), *dict.fromkeys(flag for flag, _ in config.code())])
            way = "the run is complete, draw its pictures with" if complete else "continue with"
            print_line(view.console, f"{how}; {way}: {PROGRAM} --resume {again}{' --report' * request.report}")
        else:
            print_line(view.console, f"{how} before anything was written; start again.")
        return status
    finally:
        view.close()
    return 0


def _illustrate(
    request: Request, config: RunConfig, out: Path, data: object, code: tuple[str, ...], view: Listener
) -> None:
    from fedkern.report.figures.pictures import finished_pictures
    from fedkern.report.live.progress_bar import make_console
    from fedkern.report.names import print_line

    def tell(text: str) -> None:
        if not request.quiet and not request.json:
            print_line(make_console(), text)

    missing: list[str] = []
    warn = partial(view.on_warning, "no-picture")
    pictures, undrawn = finished_pictures(out, data=data, data_root=config.data_root, trusted=code, warn=warn)
    if undrawn is not None:
        missing.append(f"pictures ({undrawn}): draw them with {PROGRAM} --resume {as_word(out)}")
    elif pictures:
        tell(f"pictures:   {', '.join(path.name for path in pictures)}")
    if request.report:
        from fedkern.report.pages.run_page import write_report

        try:
            tell(f"report:     {write_report(out, command=repeat_command(out), trusted=code)}")
        except UserError as error:
            missing.append(f"report ({str(error).rstrip('.')}): write it with {PROGRAM} report {as_word(out)}")
    if missing:
        raise UserError(f"The run is complete, but not its {missing[0]}.")


def trackers(request: Request) -> list[Listener]:
    loggers: list[Listener] = []
    if request.tensorboard:
        loggers.append(listeners.TensorBoard())
    if request.wandb is not None:
        loggers.append(listeners.WandB(request.wandb, quiet=request.quiet or request.json))
    if request.mlflow is not None:
        loggers.append(listeners.MLflow(request.mlflow))
    return loggers


def _load_stored_config(request: Request) -> RunConfig:
    """Return the settings of the run to resume.

    Flags may repeat stored settings. Only --data-root, --cache, --device, --keep-items and --workers may differ.
    """
    assert request.resume is not None
    changes = dict(request.settings)
    stored = load_settings(request.resume, **({"device": changes["device"]} if "device" in changes else {}))
    plugins.check_given(request.plugins, stored.plugins, request.resume)
    if request.method is not None and request.method != stored.method:
        changes["method"], changes["options"] = request.method, {}
    elif request.options:
        changes["options"] = {**stored.options, **method_registry.given_options(stored.method, request.options)}
    if request.data_options:
        typed = given_options(str(changes.get("data", stored.data)), request.data_options)
        changes["data_options"] = {**stored.data_options, **typed}
    changes.pop("device", None)
    differences = stored.replace(**changes).with_client_threads().differences(stored) if changes else []
    if differences:
        raise UserError(
            f"The run in {request.resume} has other settings ({'; '.join(differences)}): leave these flags out to "
            "resume it, or start a new run without --resume."
        )
    stored = stored.replace(rounds=request.arguments.get("rounds", stored.rounds))  # of an extended run
    return stored.replace(**{name: changes.get(name, getattr(stored, name)) for name in RESUMABLE})


def _close(request: Request, config: RunConfig, out: Path, summary: Summary) -> None:
    if request.json:
        print_result(plain(summary))
        return
    if request.quiet:
        print(out, flush=True)
        return
    from fedkern.report.live.progress_bar import make_console
    from fedkern.report.names import print_line
    from fedkern.report.tables import class_table, final_table, intervals_tables, own_tests_table, worst_client_line

    console = make_console()
    main = stored_settings(out)["main"]
    console.print(final_table(summary, main))
    if (classes := class_table(summary)) is not None:
        console.print(classes)
    if summary.get("client_metrics"):
        console.print(own_tests_table(summary, main))
        if worst := worst_client_line(summary):
            print_line(console, worst)
    for table in intervals_tables(summary.get("intervals", ())):
        console.print(table)
    if names := sorted(summary.get("diagnostics") or ()):
        print_line(console, f"warnings: {', '.join(names)} (see diagnostics in {out / 'summary.json'})")
    from fedkern.methods import METHODS

    one_shot = METHODS[config.method].one_shot
    baseline, name = ("oneshot-fedavg", "one-shot FedAvg") if one_shot else ("fedavg", "FedAvg")
    if config.method != baseline:
        baseline_config = config if METHODS[baseline].takes_teachers else config.replace(teachers=None)
        print_line(console, f"{name} on the same split: {command_line(baseline, baseline_config)}")
    print_line(console, f"run folder: {out}")
    if request.predictions and (out / PREDICTIONS).exists():
        print_line(console, f"answers:    {PREDICTIONS}")
