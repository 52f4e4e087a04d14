"""Round loop of one run: plays the method's plan, evaluates, records, writes checkpoints and the final results."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedkern.data.identity import data_fingerprint
from fedkern.engine import device_use, diagnostics
from fedkern.engine.audience import Audience
from fedkern.engine.client import Client
from fedkern.engine.client_states import ClientStates
from fedkern.engine.clients import Everybody, check_teachers, compare_teachers
from fedkern.engine.context import RunContext
from fedkern.engine.disclosure import Disclosure
from fedkern.engine.evaluate import check_sets, client_sets, evaluate, evaluate_clients, gradcam, site_sets, test_sets
from fedkern.engine.events import RunInfo
from fedkern.engine.exchange import Exchange
from fedkern.engine.executors import team
from fedkern.engine.executors.base import Executor, ServerSide
from fedkern.engine.executors.ranks import Ranks
from fedkern.engine.executors.serial import Serial
from fedkern.engine.executors.sizing import worker_bytes, workers_for
from fedkern.engine.executors.workers import Workers
from fedkern.engine.final_figures import answers, final_figures, set_name, unique_names
from fedkern.engine.hooks import Hooks, MethodCode
from fedkern.engine.participants import absent_clients, fewest_uploads, sample_clients
from fedkern.engine.privacy_report import guarantee, privacy_figures
from fedkern.engine.progress import Progress
from fedkern.engine.round_log import RoundLog
from fedkern.engine.samples import TestSet
from fedkern.engine.server import Server
from fedkern.engine.store import confusions, predictions, records, server_secret
from fedkern.engine.store.artifacts import Artifact, Gallery
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.evaluation_file import ONLY, OWN, rows, write_evaluation
from fedkern.engine.store.releases import Releases
from fedkern.engine.store.resuming import changes, repairs
from fedkern.engine.store.saved_model import about_network, lacks_statistics, results, write_model
from fedkern.engine.store.scribe import Scribe
from fedkern.engine.tracing import FILE as TRACE
from fedkern.engine.tracing import traced
from fedkern.engine.uploads.bytes import Ledger
from fedkern.engine.uploads.filters import Asked, Filter
from fedkern.engine.uploads.private_mean import PrivateMean
from fedkern.errors import RunFailed, UserError
from fedkern.interrupts import check
from fedkern.methods import registry
from fedkern.methods.aggregators import Rule
from fedkern.methods.base import Method, Round, Step
from fedkern.methods.common.client_figures import over_clients, with_undefined, worst_client
from fedkern.methods.common.figures import is_main
from fedkern.methods.common.pooling import Pooling
from fedkern.methods.protocol import BEFORE
from fedkern.methods.uploads import all_finite, infinite_as_sent
from fedkern.privacy import Guarantee
from fedkern.privacy.guarantee import EPSILON, PART
from fedkern.settings.config import RunConfig, clients_of_a_round
from fedkern.torch_modes import cpu_threads


class Run:
    """The round loop of one run."""

    def __init__(
        self,
        config: RunConfig,
        context: RunContext,
        out: Path,
        listener: Audience,
        *,
        resume: bool,
        profile: bool = False,
        predictions: bool = False,
        elsewhere: Callable[[ServerSide], Executor] | None = None,
        filters: Callable[[Run], Sequence[Filter]],
    ) -> None:
        self.config, self.context, self.out, self.listener, self._resume = config, context, out, listener, resume
        self._elsewhere, self._make_filters = elsewhere, filters
        self.progress = Progress()
        kind = registry.get(config.method)
        if kind.pooled:
            context.pool()
        self.method = kind(kind.Options.parse(config.options, method=config.method))
        self._pooling = Pooling(self.method, on=config.buffers == "pool")
        self.method_code = MethodCode(kind, config.method, self.progress)
        self.ledger = Ledger(config.trained_clients)
        self.wire: dict[str, int] = {}  # bytes that left and reached this machine; empty where nothing travels
        self._scribe = Scribe()
        self.checkpoints = Checkpoints(out, self._scribe, config.trained_clients)
        self.releases: Releases | None = None  # None without differential privacy
        self.private: PrivateMean | None = None  # of whole clients
        self.metrics = records.Metrics(out)
        self.alone: Callable[[], object] = lambda: None  # raises where another process has taken over the folder
        self.observed = diagnostics.Observations()
        self.server = Server(context)
        self.best: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.last_clients: dict[str, Any] = {}
        self.phases: dict[str, float] = {}
        self.tracing = False
        self._until_trace = 1 if profile else None  # communication rounds to play before the traced one
        self._predictions = predictions  # whether predictions.csv is written at the end
        self._dropped: list[dict[str, Any]] = []  # clients dropped before this process and since the last record
        self.sets: dict[str, TestSet] = {}
        self.client_sets: dict[int, TestSet] = {}
        # Of every client on its own test set or its part of the run's; empty in private runs.
        self.own_figures: dict[int, dict[str, float]] = {}
        self.askers: dict[str, Any] = {"method": self.method, "pooling": self._pooling}
        self.hooks = {
            name: Hooks(name, asked, self.server, context, self.method_code) for name, asked in self.askers.items()
        }
        here = Serial(context, self.askers, self.checkpoints.reader, config.client_threads)
        self.executor: Executor = here
        self._plan: list[Round] = []  # the communication rounds
        self._evaluated = False  # whether self.latest describes the present state
        self._final_warnings: list[str] = []  # names of those about the final network
        self._elapsed = 0.0
        self._started = time.perf_counter()
        self._told: set[str] = set()
        self.said: Guarantee | None = None  # which of the run's releases the epsilon covers

    def prepare(self, *, known: bool = True) -> None:
        """Checks everything that can fail because of the user's input, before anything is written.

        Args:
            known: whether the clients' samples are in this process.

        Raises:
            UserError: data, network or settings do not fit the method.
        """
        check_sets(self.context.data)
        for k in range(self.context.federation.clients) if known else ():
            with self.method_code("check"):
                self.method.check(Client(self.context, k, {}))
        if self.context.data.task == "retrieval":
            network = self.context.network("server")  # raises where an encoder's folder cannot be read
            self._pooling.check(network.module)
        with self.context.drawing(self.server, BEFORE), self.method_code("start"):
            self.method.start(self.server)
        if self.config.dp_clip is not None:
            self.private = PrivateMean(self.config, self.method, self.server, self.context)
            self.said = self.private.guarantee()
        else:
            with self.method_code("guarantee"):
                self.said = guarantee(self.method, self.server, self.config.records)
        if self.config.privacy_unit != "image" and self.said is None:
            raise UserError(
                f"--privacy-unit {self.config.privacy_unit} says what an epsilon protects, and this run of "
                f"{self.config.method} promises none: ask for one with a privacy option of its method (fediod has "
                "some), or leave it out."
            )
        self.context.disclosure = Disclosure.of(self.config.records, self.said)
        if self._until_trace is not None and not self.context.disclosure.clients:
            raise UserError(
                "--profile writes what every client computed, step by step, and the records of this run are private: "
                "leave it out, or profile the same run with --records all."
            )
        if self._predictions:
            predictions.check(self.context.data.task, told=self.context.disclosure.clients)
        if self.said is not None and not self.said.complete:
            self.context.warn("partly-covered", self.said.warning())
        for name, text in diagnostics.emulated(self.config.precision, self.config.device).items():
            self.context.warn(name, text)
        if not self._resume or self.checkpoints.peek() is None:  # a resumed run has loaded most of them already
            check_teachers(self.method, self.context)
        with self.method_code("rounds"):
            self._plan = [entry for entry in self.method.rounds(self.context.federation) if not entry.one_off]
        rule = Rule(self.config.aggregator)
        if rule.entry.function is not None:
            rule.check(fewest_uploads(self.config, len(self._plan)))
        self.gallery = Gallery(self.out, len(self._plan))

    # -- the whole run ---------------------------------------------------------------------------------------------

    def go(self) -> dict[str, Any]:
        entry = self.checkpoints.open(fresh=not self._resume, begun=self._resume and self.metrics.path.exists())
        if entry is None:
            self.metrics.truncate(0)
            self._book_beforehand()
            compare_teachers(self.context, self.fingerprint)
        else:
            self._restore(entry)
        self.server.traffic = self.ledger.rounds
        if self.said is not None:
            self.releases = Releases(self.checkpoints.folder)
            self.releases.open(self.planned)
            if self.private is not None and self.config.dp_draws == "secret":
                self.private.secret = server_secret.of_a_run(self.checkpoints.folder, begun=entry is not None)
            self.checkpoints.write_at_once()  # a release may leave a client only after its privacy cost is on disk
        self.context.uploaded.clear()
        self.sets, self.client_sets = test_sets(self.context), client_sets(self.context)
        self.executor = self._executor()
        memoryless = self.private is not None and self.private.amplified
        states = ClientStates(self.executor, self.checkpoints, self.context, self.progress, memoryless)
        self.log = RoundLog(
            self.context, self.progress, states, self.listener, silent=self.silent, hint=self._undeclared()
        )
        self.log.dropped, self.states = self._dropped, states
        self.filters = self._make_filters(self)
        try:
            self._announce()
            self._play_all()
        finally:
            self.executor.close()
            self.executor = self.executor.here
            self._scribe.close()
        return self._finish()

    def _play_all(self) -> None:
        for number, entry_round in enumerate(self.method.rounds(self.context.federation)):
            if number < self.planned:
                continue
            check()
            self.alone()
            play = self._trace if self._traces(entry_round) else self._play
            play(entry_round)
            self.progress.planned = number + 1
            if entry_round.one_off or self.done % self.config.checkpoint_every == 0 or self.done == self._rounds:
                self._commit()
        self.checkpoints.write_at_once()

    def _traces(self, entry: Round) -> bool:
        """Whether ``--profile`` traces this round: the second communication round that is played, or the only one."""
        if self._until_trace is None or entry.one_off:
            return False
        if self._until_trace == 0 or self.done + 1 == self._rounds:
            return True
        self._until_trace -= 1
        return False

    def _trace(self, entry: Round) -> None:
        self.tracing, self._until_trace = True, None
        with traced(self.out / TRACE):
            self._play(entry)
        self.tracing = False

    def _executor(self) -> Executor:
        """Chooses the executor; the rest of the plan says how often clients will be asked."""
        if self._elsewhere is not None:
            return self._elsewhere(self._server_side())
        here, config = self.executor.here, self.config
        left = islice(self.method.rounds(self.context.federation), self.planned, None)
        asks = config.sampled_clients * sum(len(entry.exchanges) for entry in left if not entry.cohort)
        if (ranks := team.present()) is not None:
            return self._on_ranks(ranks, asks)
        count = workers_for(config, self.context, asks, self._parameters)
        if count < 2:
            return here
        expected = asks if config.workers == "auto" else None
        return Workers(self.context, here, self.askers, self.checkpoints.reader, count, asks=expected)

    def _server_side(self) -> ServerSide:
        """What an executor of clients elsewhere works with."""
        return ServerSide(
            context=self.context,
            here=self.executor.here,
            hooks=self.hooks,
            checkpoints=self.checkpoints,
            progress=self.progress,
            out=self.out,
            data=self.fingerprint,
            promised=self.said is not None,
            wire=self.wire,
        )

    def _on_ranks(self, ranks: team.Team, asks: int) -> Executor:
        """The executor of several ranks; this process alone, where others would have nothing to do."""
        if self.config.workers not in ("auto", "1"):
            why = "each rank of torchrun has its clients work one after another"
            self.context.warn("no-workers", f"--workers {self.config.workers} changes nothing here, as {why}.")
        here = self.executor.here
        if not asks or clients_of_a_round(self.config) < 2:
            return here
        found = Ranks(self.context, here, self.askers, self.checkpoints.reader, ranks)
        self.server.summing = found.accumulator
        return found

    def _book_beforehand(self) -> None:
        """Books what travels before any round: raw data for a pooled method, and the words of a shared vocabulary."""
        for k, raw in enumerate(self.context.uploaded):
            self.ledger.book(k, "up", raw)
        words = self.context.words() if any(entry.booked for entry in self._plan) else None
        if words is not None:
            for k, own in enumerate(words[0]):
                self.ledger.book(k, "up", own)
                self.ledger.book(k, "down", words[1])

    @property
    def done(self) -> int:
        """Communication rounds done."""
        return self.progress.done

    @property
    def planned(self) -> int:
        """Rounds of the plan done, one-off ones included."""
        return self.progress.planned

    @property
    def _rounds(self) -> int:
        return len(self._plan)

    @cached_property
    def fingerprint(self) -> int:
        """Of all images and labels (:func:`data_fingerprint`)."""
        return data_fingerprint(self.context.data)

    @cached_property
    def _parameters(self) -> int:
        """Number of parameters of one network of the run."""
        return sum(parameter.numel() for parameter in self.context.build().parameters())

    def seconds(self) -> float:
        """Seconds of work on this run, over all its resumptions."""
        return self._elapsed + time.perf_counter() - self._started

    def _announce(self) -> None:
        alike = isinstance(self.executor, Ranks) or self.executor.apart
        workers = 1 if alike else self.executor.count
        self.listener.on_start(
            RunInfo(
                config=self.config,
                out=self.out,
                first_round=self.done,
                samples=self.context.federation.samples,
                parameters=self._parameters,
                rounds=tuple(self._plan),
                test_sets={prefix.rstrip("_"): len(data) for prefix, data in self.sets.items()},
                data=self.context.data,
                private=not self.context.disclosure.clients,
                guarantee=self.said,
                model=self.context.model_name,
                workers=workers,
                worker_bytes=worker_bytes(self.context, self._parameters) if workers > 1 else 0,
            )
        )

    # -- one round -------------------------------------------------------------------------------------------------

    def _play(self, entry: Round) -> None:
        start = time.perf_counter()
        device_use.begin(self.context.device)
        self.progress.begin(entry)
        self.log.begin()
        index, shown = self.progress.index, self.progress.shown
        if isinstance(entry.participants, tuple):
            participants = list(entry.participants)
        elif entry.participants == "all":
            participants = list(range(self.context.federation.clients))
        else:
            participants = self._sample(index)
        self.listener.on_round_start(shown, entry.name, participants)
        if entry.one_off and entry.trains:
            self.listener.on_notice(f"set-up: {entry.trains}")
        self.server.showing = self.context.disclosure.server and not entry.one_off and self.gallery.wants(shown)
        phases = {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0}
        travelled: dict[str, dict[str, int]] = {}
        sent = self.ledger.total_up, self.ledger.total_down
        due = (self.done + 1) % self.config.eval_every == 0 or self.done + 1 == self._rounds
        exchanges = self._pooling.exchanges(entry, due)
        absent = {} if entry.one_off else absent_clients(self.config, index, participants)
        asked = len(participants)
        participants = [k for k in participants if k not in absent]
        for name, asker in exchanges:
            self.progress.exchange, self.progress.last_exchange = name, name == exchanges[-1][0]
            begun, before = time.perf_counter(), (self.ledger.total_up, self.ledger.total_down)
            step = Step(index, entry.name, name)
            hooks = self.hooks["method" if asker is self.method else "pooling"]
            outgoing = hooks.send(step)
            sent_now = hooks.messages(outgoing, participants)
            exchange = Exchange(
                Asked(step, entry, self.planned, asked, tuple(participants), hooks, sent_now),
                self.filters,
                self._here_where_needed(entry),
                self.log,
                self.context.federation.samples,
            )
            exchange.lose(hooks.messages(outgoing, absent), absent)
            absent = {}
            hooks.server_update(step, exchange.uploads())
            for k, reason in self.server.refused:
                self.log.leave_out(k, {"exchange": name, "reason": reason})
            self.server.refused.clear()
            phases["train"] += exchange.seconds
            if len(exchanges) > 1:
                phases[f"train/{name}"] = exchange.seconds
                up, down = self.ledger.total_up - before[0], self.ledger.total_down - before[1]
                travelled[f"train/{name}"] = {"up": up, "down": down}
            phases["aggregate"] += time.perf_counter() - begun - exchange.seconds
            participants = [k for k in participants if k not in self.log.left]
            if not participants:
                self.log.none_left()
        with self.method_code("vectors"):
            vectors = self.method.vectors(self.server)
        self._check_finite({**self.server.state, **vectors}, self.progress.when())
        self.states.end_round()
        for report in self.log.reports:
            self.observed.add(report)
        self.server.round_cache.clear()
        for name, (value, axes) in self.server.artifacts.items():
            self.gallery.add(Artifact(name, shown, value, axes))
        self.server.artifacts.clear()
        self._evaluated = False
        if entry.one_off:
            return
        self.progress.done += 1
        self._record(entry, start, sent, phases, travelled, due)

    def _here_where_needed(self, entry: Round) -> Executor:
        """The executor of a round: this process's, where a cohort works together or a trace is made."""
        together = (entry.cohort or self.tracing) and not self.executor.apart
        return self.executor.here if together else self.executor

    def _sample(self, index: int) -> list[int]:
        return sample_clients(self.config, index) if self.private is None else self.private.participants(index)

    def _record(
        self,
        entry: Round,
        start: float,
        sent: tuple[int, int],
        phases: dict[str, float],
        travelled: dict[str, dict[str, int]],
        due: bool,
    ) -> None:
        clients = {k: self.context.disclosure.client(info) for k, info in self.log.clients.items()}
        losses = [info["loss"] for info in clients.values() if "loss" in info]
        record: dict[str, Any] = {
            "round": self.done,
            "rounds": self._rounds,
            "name": entry.name,
            "seconds": 0.0,
            "bytes_up": self.ledger.total_up,
            "bytes_down": self.ledger.total_down,
            "round_bytes_up": self.ledger.total_up - sent[0],
            "round_bytes_down": self.ledger.total_down - sent[1],
            "evaluated": due,
        }
        if self.private is not None:
            record.update(self.private.spent(self.done))
        if travelled:
            record["bytes"] = travelled
        if losses:
            record["loss"] = sum(losses) / len(losses)
        if due:
            begun = time.perf_counter()
            network = self._network()
            if network is not None:
                self._check_network(network)
                self._evaluate(network, last=self.done == self._rounds)
                record.update(self.latest)
                if self.own_figures:
                    record["client_metrics"] = {str(k): figures for k, figures in self.own_figures.items()}
                for name, value in self.latest.items():
                    if is_main(name):
                        self.best[name] = max(value, self.best.get(name, 0.0))
            phases["evaluate"] = time.perf_counter() - begun
        self._add_report(record)
        if self.context.disclosure.clients:
            record["clients"] = {k: {**self.context.named(int(k)), **info} for k, info in clients.items()}
        if self.log.dropped:
            record["dropped"] = self.log.dropped
        record["phases"] = {name: round(value, 6) for name, value in phases.items()}
        self._add_phases(phases)
        if used := device_use.figures(self.context.device):
            record["device"] = used
        record["round_seconds"] = time.perf_counter() - start
        record["seconds"] = self.seconds()
        self.metrics.append({name: value for name, value in record.items() if name not in ("rounds", "evaluated")})
        self.log.dropped = []
        self.last_clients = self.log.clients
        self._tell_warnings()
        self.listener.on_round(record)

    def _network(self) -> nn.Module | None:
        """The network that the method evaluates and saves, in eval mode; None while there is none."""
        with self.method_code("model"):
            network = self.method.model(self.server)
        if network is not None and not self.context.is_flat(network):
            network.eval()
        return network

    def _check_network(self, network: nn.Module) -> None:
        if not self.context.is_flat(network):  # vectors of a flat network were checked at the end of their round
            self._check_finite(network.state_dict(), f"in round {self.done}")

    def _evaluate(self, network: nn.Module, last: bool) -> None:
        """Evaluates the network; the test sets keep the answers to the last one, for the figures of the run's end."""
        code = partial(self.method_code, "evaluate")
        with self._at_once(network) as at_once:
            self.latest = evaluate(self.method, network, self.sets, code, at_once, keep=last)
        self._evaluate_clients(network, self.client_sets)
        self.latest.update(over_clients(self.own_figures, self.client_sets))
        self._evaluated = True

    def _evaluate_clients(self, network: nn.Module, sets: dict[int, TestSet]) -> None:
        if self.context.disclosure.clients:
            names = self.context.data.client_names
            with self._at_once(network) as at_once:
                self.own_figures = evaluate_clients(self.method, network, sets, at_once, names, self._own_code)

    def _own_code(self, label: str) -> AbstractContextManager[None]:
        return self.method_code(f"evaluate_own for client {label}")

    @contextmanager
    def _at_once(self, network: nn.Module) -> Iterator[int]:
        """Sets the threads of an evaluation; yields how many sets are evaluated side by side."""
        config, at_once = self.config, 1
        # Several sets at a time only with the run's own network.  A module of the method may be traced at its first
        # call, and torch.fx patches every module's call while it traces.
        if self.context.device.type == "cpu" and self.context.is_flat(network):
            at_once = config.threads // config.client_threads
        with cpu_threads(config.client_threads if at_once > 1 else config.threads):
            yield at_once

    def _add_report(self, record: dict[str, Any]) -> None:
        for name, value in self.server.report.items():
            if name in record:
                raise ValueError(f'server.report: expected names of its own, given "{name}", which the engine writes')
            # JSON has no NaN or infinity: such a value is None after a resume.
            self.server.report[name] = math.nan if value is None else float(value)
        record.update(self._told_report())

    def _told_report(self) -> dict[str, float]:
        """The server's report; empty where ``--records private`` withholds it."""
        return dict(self.server.report) if self.context.disclosure.server else {}

    def _undeclared(self) -> str:
        """Hint for the author of a method that does not override ``Method.expects``; else empty."""
        if type(self.method).expects is not Method.expects:
            return ""
        return f" ({self.config.method} declares no uploads of its own; Method.expects is where a method does.)"

    @property
    def silent(self) -> bool:
        """Whether nothing is told of a client that is left out: no noise covers that its upload was no good."""
        return self.private is not None and not self.context.disclosure.clients

    def _check_finite(self, tensors: Mapping[str, Any], when: str) -> None:
        """Raises RunFailed where the server's new model is not finite."""
        for name, value in tensors.items():
            if isinstance(value, Tensor) and not all_finite(value):
                if name == "buffers" and infinite_as_sent(value, self.context.initial_buffers()[name]):
                    continue
                raise RunFailed(
                    f"The model {when} is not finite ({name}), though every upload was: nothing of that round is kept; "
                    "lower --lr, or refuse large updates with --max-update-norm."
                )

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        begun = time.perf_counter()
        self.alone()
        info = self._info()
        self.gallery.write()
        self.checkpoints.commit(
            round=self.done,
            plan=self.planned,
            server=self.server.state,
            info=info,
            before=self.metrics.sync,
            booked=self.ledger.changed_rows(),
        )
        if self.releases is not None:
            self.releases.forget(self.checkpoints.entries[0]["plan"])
        self._add_phases({"checkpoint": time.perf_counter() - begun})

    def _info(self, finished: bool = False) -> dict[str, Any]:
        info = {
            "ledger": self.ledger.sums() if self.checkpoints.tabled else self.ledger.to_dict(),
            "seconds": self.seconds(),
            "metrics_bytes": self.metrics.size,
            "metrics_sha256": self.metrics.digest,
            "shown_sha256": self.gallery.digest,
            "observed": self.observed.to_dict(),
            "warnings": self.context.warnings,
            "best": self.best,
            "latest": records.plain(self.latest),
            "report": dict(self.server.report),
            "clients": self.last_clients,
            "phases": self.phases,
            "dropped": self.log.dropped,
            "config": self.config.to_dict(),
            "data": self.fingerprint,
            "names": self._name_sums,
            "versions": records.versions(),
            "kernels": records.kernels(self.config.device),
            "finished": finished,
        }
        if self.private is not None and self.said is not None:
            info["planned"] = {"rounds": self._rounds, "epsilon": self.private.planned}
        if self.wire:
            info["wire"] = self.wire
        if (place := team.place()) is not None:
            info["torchrun"] = place.job  # by which a restart knows the run
        if states := self.listener.states():
            info["listeners"] = states
        if finished:
            info["results"] = results(self.out)
            info["final_warnings"] = self._final_warnings
        return dict(records.plain(info))

    @cached_property
    def _name_sums(self) -> dict[str, int]:
        """CRC-32 of the names of clients and classes, which records and summary hold."""
        data = self.context.data
        names = {"clients": data.client_names or (), "classes": data.classes}
        return {what: zlib.crc32(json.dumps(list(each)).encode()) for what, each in names.items()}

    def _add_phases(self, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self.phases[name] = self.phases.get(name, 0.0) + value

    def _restore(self, entry: dict[str, Any]) -> None:
        info = entry["info"]
        if info["data"] != self.fingerprint:
            raise UserError(
                f"The data are not those that {self.out} was started with: restore the files, or start anew."
            )
        for what, total in self._name_sums.items():
            if info["names"][what] != total:
                raise UserError(
                    f"The {what} of the data have other names than when the run in {self.out} began: put the names "
                    "back, or start a new run with another --out."
                )
        so_far = islice(self.method.rounds(self.context.federation), entry["plan"])
        if sum(not one.one_off for one in so_far) != entry["round"]:
            raise UserError(
                f"The run in {self.out} was begun by a version of fedkern in which {self.config.method} had other "
                "rounds: go on with that version, or start the run again."
            )
        self.server.state = self.checkpoints.server_state()
        self.progress.done, self.progress.planned = entry["round"], entry["plan"]
        self.gallery.restore(self.done, info["shown_sha256"])
        self.ledger = self._ledger(entry)
        self.wire = dict(info.get("wire", {}))
        self.observed = diagnostics.Observations(info["observed"])
        self.context.warnings = dict(info["warnings"])
        self._final_warnings = list(info.get("final_warnings", ()))
        self._told = set(self.context.warnings)
        self.best, self.latest = dict(info["best"]), dict(info["latest"])
        self.server.report = dict(info["report"])
        self.last_clients, self.phases = info["clients"], dict(info["phases"])
        self._dropped = info["dropped"]
        self._elapsed = info["seconds"]
        self.metrics.truncate(info["metrics_bytes"], info["metrics_sha256"])
        self.listener.restore_all(info.get("listeners", {}))
        if self.private is not None and info.get("planned", {}).get("rounds", self._rounds) != self._rounds:
            before = info["planned"]
            self.context.warn(
                "larger-epsilon",
                f"The run was planned for {before['rounds']} rounds with epsilon {before['epsilon']:.3g}: its "
                f"{self._rounds} rounds have epsilon {self.private.planned:.3g}.",
            )
        for name, text in {**changes(info, self.config), **repairs(self.checkpoints, entry, self.out)}.items():
            self.context.warn(name, text)

    def _ledger(self, entry: Mapping[str, Any]) -> Ledger:
        """The ledger of a checkpoint."""
        clients, stored = self.config.trained_clients, entry["info"]["ledger"]
        if "table" in entry:
            return Ledger.of_rows(clients, self.checkpoints.booked(), stored)
        return Ledger(clients, **stored)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        network = self._network()
        if network is None:
            raise ValueError("model: expected a module at the end of the plan, given None")
        self._check_network(network)
        if not self._evaluated:  # resumed after the last round
            self._evaluate(network, last=True)
        own, own_sets = OWN, self.client_sets
        if not own_sets and (own_sets := site_sets(self.context)):
            own = ONLY
            self._evaluate_clients(network, own_sets)
        told, classes = self.context.disclosure, self.context.data.classes
        own_figures = with_undefined(self.own_figures, own_sets)
        final = final_figures(self.sets, classes)
        # The method's own figures come first, and stay where one has the name of a figure of ours.
        of_tests = {**self.latest, **final.metrics, **self.latest, **self._gradcam(network)}
        metrics = {**of_tests, **self._told_report()}
        if self._elsewhere is None and (told.appraised is None or told.appraised):
            with self.method_code("oracle_metrics"):
                found = self.method.oracle_metrics(self.server, Everybody(self.context, self.checkpoints), self.sets)
            metrics.update(told.oracle_metrics(found, ("", *self.sets)))
        if self.private is not None:
            private = self.private.report(self.done)
        else:
            private = privacy_figures(self.said, self.checkpoints.client_state, self.config.trained_clients)
        metrics.update({name: private[name] for name in (EPSILON, PART, "delta") if name in private})
        flat = self.context.is_flat(network)
        constant = diagnostics.constants(self.sets, classes) if told.clients else {}
        warn = self.context.warn
        with self.method_code("diagnose"):
            observed = self.method.diagnose(self.observed.summary()) if told.clients else {}
        for texts in (
            diagnostics.collapsed_classes(self.sets, classes),
            diagnostics.unvaried_labels(self.sets),
            diagnostics.outlying_drift(self.last_clients, self.context.data.client_label) if told.clients else {},
            diagnostics.poor_metrics(metrics, self.best, len(classes), constant),
            diagnostics.missing_statistics(self.config, flat and lacks_statistics(self.context, self.config)),
            diagnostics.missing_metrics(self.config, self.sets, self.latest),
            diagnostics.undefined_figures(self.sets, own_figures, self.context.data.client_label),
            observed,
        ):
            for name, text in texts.items():
                if name not in self.context.warnings:
                    self._final_warnings.append(name)
                warn(name, text)
        self.alone()
        if told.clients and final.confusion:  # counts of images, which private records do not tell
            confusions.write(self.out, classes, final.confusion)
        if self._predictions:
            self._write_predictions()
        self._tell_warnings()
        names = self.context.data.client_names
        write_evaluation(self.out, rows(of_tests, [*self.sets], own_figures, names, own))
        write_model(self.out, network, about_network(self.context, self.config, self.done, flat))
        summary: dict[str, Any] = {
            "method": self.config.method,
            "data": self.config.data,
            "model": self.context.model_name,
            "seed": self.config.seed,
            "rounds": self.done,
            "clients": self.config.clients,
            **self._names(),
            "metrics": metrics,
            **self._own(own, own_sets),
            **({"per_class": final.per_class} if final.per_class else {}),
            "bytes": self._bytes(),
            **({"wire": self.wire} if self.wire else {}),
            "seconds": self.seconds(),
            "phases": self.phases,
            "diagnostics": self.context.warnings,
            "records": self.config.records,
            "versions": records.versions(),
        }
        if self.log.dropped:  # clients dropped after the last record
            summary["dropped"] = self.log.dropped
        if private:
            summary["privacy"] = private
        records.write_summary(self.out, summary)
        self.checkpoints.amend(self._info(finished=True))
        self.listener.on_end(summary)
        return summary

    def _names(self) -> dict[str, Any]:
        """The clients' names as entries of the summary; empty where they have none."""
        data = self.context.data
        if data.client_names is None:
            return {}
        held = {} if data.statistics.held_out is None else {"held_out_client_name": data.statistics.held_out[0]}
        return {"client_names": list(data.client_names), **held}

    def _own(self, test_set: str, sets: dict[int, TestSet]) -> dict[str, Any]:
        """The clients' figures on their own ``sets`` as entries of the summary; empty where nothing may be told.

        ``test_set`` says what these sets are, as in evaluation.csv.
        """
        if not self.own_figures:
            return {}
        names, worst = self.context.data.client_names, worst_client(self.own_figures, sets)
        own = with_undefined(self.own_figures, sets)

        def named(k: int) -> dict[str, Any]:
            return {} if names is None else {"name": names[k]}

        found: dict[str, Any] = {
            "client_test_set": test_set,
            "client_metrics": {str(k): {**named(k), **figures} for k, figures in own.items()},
        }
        if worst is not None:
            k, figure = worst
            value = self.own_figures[k][figure]
            found["worst_client"] = {"client": k, **named(k), "metric": figure, "value": value}
        return found

    def _bytes(self) -> dict[str, Any]:
        """The ledger's totals; not those of single clients where it is secret who took part in which round."""
        found = self.ledger.summary()
        if self.private is not None and self.private.amplified:
            del found["clients"]
        return found

    def _write_predictions(self) -> None:
        classes = unique_names(self.context.data.classes)
        sets = {
            set_name(prefix): (data.split.ids, data.labels.cpu(), answers(data, len(classes)))
            for prefix, data in self.sets.items()
        }
        if any(kept for _, _, kept in sets.values()):
            predictions.write(self.out, classes, sets)
        else:
            why = f"the figures of {self.config.method} come from code of its own, which hands on no logits"
            self.context.warn("no-predictions", f"{predictions.FILE} was not written: {why}.")

    def _gradcam(self, network: Any) -> dict[str, float]:
        # Grad-CAM takes single images in eval mode, which needs running statistics.
        count = self.config.grad_cam if self.config.statistics else 0
        return gradcam(network, self.sets, count)

    def _tell_warnings(self) -> None:
        for name, text in self.listener.warnings.items():  # told already, to the listeners that are left
            self.context.warn(name, text)
            self._told.add(name)
        for name, text in self.context.warnings.items():
            if name not in self._told:
                self._told.add(name)
                self.listener.on_warning(name, text)
