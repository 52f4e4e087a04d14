"""Early ends of a run (``--stop-at``, ``--patience``)."""

import math

from fedkern.engine.parts.part import Record, SettingPart, Stop, Summary, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store.record_files import plain
from fedkern.engine.store.run_folder import BEST, BEST_SO_FAR, about_network, checksum, write_model
from fedkern.errors import UserError
from fedkern.messages.states import State
from fedkern.settings.federation import stop_target
from fedkern.tasks.figure_names import check_reachable, split_metric


@register_part("stop_at")
class StopAt(SettingPart):
    """Part that ends the run with the first evaluated round in which a public figure has reached a value."""

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._figure, self._sign, self._value = stop_target(run.config.stop_at or "")
        check_reachable("--stop-at", self._figure, self._value, falls=self._sign == "<=", own=run.context.data.tests)
        self._reason = ""  # once the value is reached

    def before_round(self, record: Record) -> Stop | None:
        return Stop("stop-at", self._reason) if self._reason else None

    def round_end(self, record: Record) -> Stop | None:
        if not record.due:
            return None
        entries = self._run.notices.disclosure.filter_entries(record.entries)
        figures = {name: value for name, value in entries.items() if isinstance(value, float) and name != "seconds"}
        if self._figure not in figures:
            raise UserError(
                f'--stop-at: the records of this run have no figure "{self._figure}", but {", ".join(sorted(figures))}.'
            )
        value = figures[self._figure]
        if value >= self._value if self._sign == ">=" else value <= self._value:
            target = f"{self._figure}{self._sign}{self._value:g}"
            self._reason = f"{self._figure} is {value:.4g} in round {record.number} (--stop-at {target})"
            return Stop("stop-at", self._reason)
        return None

    def state(self) -> State:
        return {"reason": self._reason} if self._reason else {}

    def restore(self, state: State) -> None:
        self._reason = state["reason"]


@register_part("patience")
class Patience(SettingPart):
    """Part that ends the run once the main figure on the validation set has not improved for some evaluations.

    The best round's network ends in ``best.safetensors``. Until then it alternates between two files, so that a
    checkpoint always finds the network that it names.
    """

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._most, self._out = run.config.patience or 0, run.out
        self._best: State = {}  # the best round: figure, value, round, file and its CRC-32, all figures
        self._kept = ""  # the file of the last checkpoint
        self._without = 0  # evaluations since the best
        if not len(run.context.data.validation):
            self._main({})  # raises the error now, before a round is played

    def before_round(self, record: Record) -> Stop | None:
        return self._stop()

    def round_end(self, record: Record) -> Stop | None:
        if not record.due:
            return None
        figure, value = self._main(self._run.notices.disclosure.filter_entries(record.entries))
        sign = -1 if self._run.config.better == "min" else 1
        if not sign * value > sign * self._best.get("value", -sign * math.inf):  # NaN is never the best
            self._without += bool(self._best)
            return self._stop()
        name = next(name for name in BEST_SO_FAR if name != self._kept)
        if (network := self._run.hooks["method"].network()) is None:
            return None
        context = self._run.context
        about = about_network(context, self._run.config, record.number, context.networks.is_flat(network))
        write_model(self._out / name, network, about)
        self._best = {"figure": figure, "value": value, "round": record.number, "file": name}
        self._best["metrics"], self._best["sum"] = plain(record.figures), checksum(self._out / name)
        self._without = 0
        return None

    def finish(self, summary: Summary) -> None:
        if not self._best:
            return
        (self._out / self._best["file"]).replace(self._out / BEST)
        self._best["file"] = BEST
        for name in BEST_SO_FAR:
            (self._out / name).unlink(missing_ok=True)
        summary.entries["best"] = {name: value for name, value in self._best.items() if name != "sum"}

    def state(self) -> State:
        self._kept = self._best.get("file", "")
        return {"best": self._best, "without": self._without} if self._best else {}

    def restore(self, state: State) -> None:
        self._best, self._without = dict(state["best"]), state["without"]
        files = [name for name in (self._best["file"], BEST) if checksum(self._out / name) == self._best["sum"]]
        if not files:
            raise UserError(
                f"{self._out / self._best['file']} is not what the run wrote of its best round: put the file back, or "
                "start the run again with another --out."
            )
        self._best["file"] = self._kept = files[0]

    def _main(self, metrics: State) -> tuple[str, float]:
        main, figures = self._run.config.main, {}
        for name, value in metrics.items():
            test_set, figure = split_metric(name, self._run.context.data.tests)
            if test_set == "validation" and figure.endswith(main):  # such as vote_accuracy, if there is no other
                figures[figure] = name, float(value)
        if figures:
            return figures.get(main) or next(iter(figures.values()))
        raise UserError(
            "--patience looks at the main figure on a validation set, and this run has none: give the data one, or end "
            "the run with --stop-at."
        )

    def _stop(self) -> Stop | None:
        if self._without < self._most:
            return None
        best = self._best
        return Stop(
            "patience",
            f"{best['figure']} has not improved on {best['value']:.4g} of round {best['round']} in {self._without} "
            f"evaluations (--patience {self._most})",
        )
