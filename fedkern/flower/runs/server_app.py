"""The ServerApp of a whole run over Flower: ``fedkern.flower.runs.server_app:app`` in a project's pyproject.toml.

Run folder, checkpoints and figures are the command line's. Like the command line, this module may import everything
below it.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedkern.data import FederatedData
from fedkern.engine.run import run
from fedkern.engine.store.run_folder import RUNS, reserve, run_name
from fedkern.errors import ClientFailed, RunFailed, UserError
from fedkern.flower.adapter import ERROR, INFO, WARNING, Context, Grid, NodeChannel, ServerApp, log, warn_of_version
from fedkern.flower.runs import run_settings
from fedkern.flower.runs.node_config import UserConfig
from fedkern.flower.runs.node_executor import NodeRegistry, Nodes
from fedkern.flower.runs.own_data import declare_federation
from fedkern.listeners.events import Listener, Record, RunInfo, Summary
from fedkern.settings.error_wording import key_words

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    warn_of_version()
    play(grid, context.run_config)


@key_words()
def play(grid: Grid, run_config: UserConfig) -> Summary:
    settings = run_settings.read_run_config(run_config)
    config, out, fresh = settings.config, settings.out, False
    run_settings.check_portable(config)
    if out is None:
        if settings.resume:
            raise UserError('resume=true goes on with a run: name its folder, out="DIR", in the run-config.')
        out, fresh = reserve(RUNS, run_name(config), 'name another run folder, out="DIR", in the run-config'), True
    # Logged first, so that a run that is stopped can be resumed from this folder.
    out = out.absolute()
    log(INFO, "run folder: %s", out)
    again = f"flwr run with the run-config 'out=\"{out}\" resume=true'"
    code = tuple(part for _, part in config.code())
    # The engine plays the run as for the command line, and only asks the nodes for the clients' answers.
    channel, listener, half = NodeChannel(grid), FlowerLog(), settings.transport == "bf16"
    registry = NodeRegistry(channel, wait=settings.wait, own_data=settings.own_data)
    try:
        summary = run(
            config,
            data=declare_federation(config, registry, _warn) if settings.own_data else None,
            out=out,
            resume=settings.resume,
            listener=listener,
            trusted=(*code, *config.plugins),
            predictions=settings.predictions,
            remote=lambda run: Nodes(
                run, channel, registry, deadline=settings.deadline, half=half, own_data=settings.own_data
            ),
        )
    except ClientFailed as error:
        log(ERROR, "%s\n%s", error, error.traceback)
        raise
    except KeyboardInterrupt:
        raise RunFailed(f"The run was stopped; go on with {again}.") from None
    finally:
        if fresh:
            with suppress(OSError):  # not empty: the run has begun
                out.rmdir()
    # The run is complete: whatever fails from here on is a warning.
    if wire := summary.get("wire"):
        log(INFO, "on the wire: %.3g MB to nodes, %.3g MB from nodes", wire["down"] / 1e6, wire["up"] / 1e6)
    draw(out, listener.data, config.data_root, code, settings.report)
    return summary


def _warn(name: str, text: str) -> None:
    log(WARNING, "%s", text)


def draw(out: Path, data: FederatedData | None, data_root: str | None, code: tuple[str, ...], report: bool) -> None:
    """Draw the pictures of a finished run and write its report. The run is complete without them."""
    from fedkern.report.figures.pictures import finished_pictures
    from fedkern.report.pages.run_page import write_report

    _, undrawn = finished_pictures(out, data=data, data_root=data_root, trusted=code, warn=partial(_warn, "no-picture"))
    if undrawn is not None:
        log(WARNING, "The run is complete, but not its pictures (%s).", undrawn)
    if report:
        try:
            write_report(out, trusted=code)
        except UserError as error:
            log(WARNING, "The run is complete, but not its report: %s", error)


class FlowerLog(Listener):
    """Listener that writes a run's events to Flower's log, and keeps the run's ``data``."""

    data: Any = None

    def on_start(self, run: RunInfo) -> None:
        self.data = run.data
        log(
            INFO, "%s on %s: %s clients, %s rounds", run.config.method, run.config.data, len(run.samples),
            len(run.rounds),
        )  # fmt: skip

    def on_notice(self, text: str) -> None:
        log(INFO, "%s", text)

    def on_round(self, record: Record) -> None:
        from fedkern.report.live.progress_bar import main_figures

        figures = [f"loss {record['loss']:.3f}"] if "loss" in record else []
        if text := main_figures(record, self.data.task.main, self.data.tests):
            figures.append(text)
        seconds = f"{record['round_seconds']:.1f} s"
        if clients := sorted({entry["client"] for entry in record.get("dropped", [])}):
            seconds += f", without client{'s' * (len(clients) > 1)} {', '.join(map(str, clients))}"
        log(INFO, "round %s of %s: %s", record["round"], record["rounds"], ", ".join([*figures, seconds]))

    def on_warning(self, name: str, text: str) -> None:
        log(WARNING, "%s", text)

    def on_end(self, summary: Summary) -> None:
        log(INFO, "the run is complete")
