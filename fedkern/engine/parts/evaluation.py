"""Figures of the global network on the test sets, in evaluated rounds and at the end."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from functools import partial

from torch import nn

from fedkern.engine.batches.reader import Reader
from fedkern.engine.client import Client
from fedkern.engine.evaluate import evaluate, evaluate_clients, set_evaluation_threads
from fedkern.engine.figures.client_figures import over_clients, with_undefined, worst_client
from fedkern.engine.figures.clients_figures import ClientsFigures
from fedkern.engine.figures.final_figures import final_figures, hash_test_labels
from fedkern.engine.figures.intervals import intervals
from fedkern.engine.parts.part import Record, RunPart, Summary, register_part
from fedkern.engine.setup.run_objects import RunObjects
from fedkern.engine.store import record_files
from fedkern.engine.store.record_files import ONLY, OWN
from fedkern.errors import warn_instead
from fedkern.messages.states import State
from fedkern.methods.common.figures import gradcam
from fedkern.privacy.guarantee import About
from fedkern.tasks.figure_names import direction
from fedkern.tasks.task import better_values


@register_part("evaluation")
class Evaluation(RunPart):
    """Part that evaluates the method's network.

    Attributes:
        latest: the figures of the last evaluation, by name.
        best: the best finite value so far of the main figure, with any prefix: ``ood_accuracy``, ``vote_accuracy``.
        of_clients: figures of every client on its own test set or its part of the run's; empty if private.
    """

    def __init__(self, run: RunObjects) -> None:
        super().__init__(run)
        self._context = run.context
        self._client_sets, self._clients = run.samples.client_sets, run.notices.disclosure.clients
        # None if the method's network is judged, not the clients'.
        self._networks = ClientsFigures(run) if run.config.own_networks else None
        self._kept = False  # whether the test sets have kept the present network's answers
        self.latest: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.of_clients: dict[int, dict[str, float]] = {}

    def round_end(self, record: Record) -> None:
        self._kept = False
        if record.entry.one_off:
            return
        if losses := [info["loss"] for info in record.clients.values() if "loss" in info]:
            record.put({"loss": sum(losses) / len(losses)}, About.CLIENTS)
        if not record.due:
            return
        begun = time.perf_counter()
        if (network := self._run.hooks["method"].network()) is not None:
            self._evaluate(network, last=record.last, locally=record.in_server_process)
            record.figures = {**self.latest}
            record.put(self.latest)
            if self.of_clients:
                record.put(
                    {"client_metrics": {str(k): figures for k, figures in self.of_clients.items()}}, About.CLIENTS
                )
            config, better = self._run.config, min if self._run.config.better == "min" else max
            for name, value in self.latest.items():
                if name.endswith(config.main) and math.isfinite(value):  # a checkpoint has no other values
                    self.best[name] = better(value, self.best.get(name, value))
        record.seconds["evaluate"] = time.perf_counter() - begun

    def finish(self, summary: Summary) -> None:
        network = summary.network
        if not self._kept:  # resumed after the last round, or ended before it
            self._evaluate(network, last=True, locally=True)
        test_set, own_sets = OWN, self._client_sets
        if not own_sets and (own_sets := self._context.samples.site_sets):
            test_set = ONLY
            if self._networks is None:
                self._evaluate_clients(network, own_sets)
            elif self._clients:
                _, self.of_clients = self._networks("site_sets", tests=False, keep=False, locally=True)
        summary.of_clients, summary.client_set = with_undefined(self.of_clients, own_sets), test_set
        classes = self._context.data.classes
        summary.final = final_figures(self._run.sets, classes)
        answers = [answer for data in self._run.sets.values() if data.task.target == "class" for _, answer in data.kept]
        if classes and (widths := {answer.shape[-1] for answer in answers if answer.dim() == 2} - {len(classes)}):
            text = f"The network has {max(widths)} outputs for {len(classes)} named classes, so AUROC, calibration and "
            self._context.notices.warn(
                "unnamed-outputs", text + "figures of classes are missing: name all in classes=."
            )
        # The method's figures come first, and win over built-in figures of the same name.
        summary.of_tests = {**self.latest, **summary.final.metrics, **self.latest, **self._gradcam(network)}
        summary.latest, summary.best = self.latest, self.best
        summary.metrics.update(summary.of_tests)
        known: dict[str, str | None] = {}
        for reader in self._run.sets.values():
            known |= {metric.name: better_values(metric.function) for metric in getattr(reader, "metrics", ())}
            known |= reader.task.directions
        prefixes = [prefix[:-1] for prefix in self._run.sets]
        summary.entries["better"] = {name: direction(name, known, prefixes) for name in summary.metrics}
        summary.entries.update(self._of_clients(test_set, own_sets))
        if self._clients:
            data, seed, are_personal = self._context.data, self._run.config.seed, self._networks is not None
            summary.entries["intervals"] = intervals(self._run.sets, self._client_sets, data, seed, are_personal)
            summary.entries["test_labels"] = hash_test_labels(self._run.sets)
        if summary.final.per_class:
            summary.entries["per_class"] = summary.final.per_class

    def state(self) -> State:
        return {"best": self.best, "latest": record_files.plain(self.latest)}

    def restore(self, state: State) -> None:
        self.best.update(state["best"])
        self.latest.update(state["latest"])

    def _evaluate(self, network: nn.Module, last: bool, locally: bool) -> None:
        """Evaluate the network, and keep the ``last`` answers for the final figures."""
        if self._networks is None:
            code = partial(self._run.code, "evaluate")
            with self._at_once(network) as at_once:
                metrics = evaluate(
                    self._run.method, network, self._run.sets, code, at_once, seed=self._run.config.seed, keep=last
                )
            self._evaluate_clients(network, self._client_sets, keep=last)
        else:
            own = "client_sets" if self._clients else ""
            metrics, self.of_clients = self._networks(own, tests=True, keep=last, locally=locally)
        self.latest.clear()
        self.latest.update(metrics)
        self.latest.update(over_clients(self.of_clients, self._client_sets))
        self._kept = last

    def _evaluate_clients(self, network: nn.Module, sets: dict[int, Reader], keep: bool = False) -> None:
        if self._clients:
            names, seed = self._context.data.client_names, self._run.config.seed
            code = lambda label: self._run.code("evaluate_own", f" for client {label}")  # noqa: E731
            with self._at_once(network) as at_once:
                self.of_clients = evaluate_clients(
                    self._run.method, network, sets, at_once, names, code, self._client, seed, keep
                )

    def _client(self, k: int) -> Client:
        return Client(self._context, k, self._run.store.checkpoints.client_state(k))

    def _at_once(self, network: nn.Module) -> AbstractContextManager[int]:
        return set_evaluation_threads(self._run.config, self._context.networks.is_flat(network))

    def _of_clients(self, test_set: str, sets: dict[int, Reader]) -> State:
        if not self.of_clients:
            return {}
        names, worst = self._context.data.client_names, worst_client(self.of_clients, sets)

        def name_entry(k: int) -> dict[str, str]:
            return {} if names is None else {"name": names[k]}

        metrics = with_undefined(self.of_clients, sets)
        entries: State = {
            "client_test_set": test_set,
            "client_metrics": {str(k): {**name_entry(k), **figures} for k, figures in metrics.items()},
        }
        if worst is not None:
            k, figure = worst
            value = self.of_clients[k][figure]
            entries["worst_client"] = {"client": k, **name_entry(k), "metric": figure, "value": value}
        return entries

    def _gradcam(self, network: nn.Module) -> dict[str, float]:
        # Grad-CAM takes single images in eval mode, which needs running statistics.
        judged, config = self._networks is None, self._run.config  # whether by this network
        count = config.grad_cam if config.statistics and judged else 0
        with warn_instead(
            lambda why: self._context.notices.warn("no-grad-cam", f"The figures of Grad-CAM are missing: {why}.")
        ):
            return gradcam(network, self._run.sets, count)
        return {}
