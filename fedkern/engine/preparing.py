"""Everything that can fail because of what the user gave, before anything is written; and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkern.data.identity import of_memory
from fedkern.data.sources.inspection import Sight
from fedkern.data.sources.items import Items
from fedkern.engine import asynchronous, own_figures, own_model
from fedkern.engine.client import Client, check_client
from fedkern.engine.client_privacy import ClientPrivacy
from fedkern.engine.clients import check_teachers
from fedkern.engine.context import RunContext
from fedkern.engine.executors import torchrun_group
from fedkern.engine.hooks import Hooks, MethodCode
from fedkern.engine.item_sets import Trial, check_apart
from fedkern.engine.participation import Participation
from fedkern.engine.progress import Progress
from fedkern.engine.script_objects import ScriptObjects
from fedkern.engine.server import Server
from fedkern.engine.store import predictions as predictions_file
from fedkern.engine.store.resuming import check_settings, same_code, with_identity
from fedkern.errors import UserError, first_of
from fedkern.methods.aggregators import Rule
from fedkern.methods.base import Method, Round
from fedkern.methods.common import diagnostics
from fedkern.methods.common.pooling import Pooling
from fedkern.methods.common.privacy_report import guarantee
from fedkern.methods.protocol import BEFORE
from fedkern.privacy import Guarantee
from fedkern.privacy.disclosure import Disclosure
from fedkern.settings import run_data
from fedkern.settings.config import RunConfig
from fedkern.settings.grounds import files_identity
from fedkern.usercode.identity import digest, left_out


@dataclass(frozen=True)
class Prepared:
    """A method and its server, checked against data and settings.

    Attributes:
        config, context: of the run.
        method: the method.
        pooling: the pooling of statistics.
        server: the server, as the method's ``start`` has left it.
        progress: where the run stands.
        code: names the method in an exception.
        hooks: what is asked of method and pooling in an exchange, by the names of the handlers.
        plan: the rounds, one-off ones included.
        participation: says who takes part in a round.
        private: privacy of whole clients; None without it.
        said: which of the run's releases its epsilon covers; None where it promises none.
        profile, predictions: what the user asks for beside.
    """

    config: RunConfig
    context: RunContext
    method: Method
    pooling: Pooling
    server: Server
    progress: Progress
    code: MethodCode
    hooks: dict[str, Hooks]
    plan: list[Round]
    participation: Participation
    private: ClientPrivacy | None
    said: Guarantee | None
    profile: bool
    predictions: bool

    @property
    def rounds(self) -> int:
        """Communication rounds of the plan."""
        return sum(not entry.one_off for entry in self.plan)

    @property
    def handlers(self) -> dict[str, object]:
        """Objects whose ``client_update`` may be called, by name."""
        figures = {own_figures.NAME: own_figures.OwnFigures(self.method)} if self.config.own_networks else {}
        return {"method": self.method, "pooling": self.pooling, **figures}

    @property
    def silent(self) -> bool:
        """Whether nothing is told of a client that is left out: no noise covers that its upload was no good."""
        return self.private is not None and not self.context.disclosure.clients

    @property
    def amplified(self) -> bool:
        """Whether epsilon counts that nobody knows who takes part in a round."""
        return self.private is not None and self.private.amplified


def with_data(
    config: RunConfig,
    data: Any,
    notice: Callable[[str], None],
    script: ScriptObjects,
    stored: RunConfig | None,
    entry: dict[str, Any] | None,
    out: Path,
    trusted: Collection[str],
    *,
    known: bool,
) -> RunContext:
    """The context of a run: its data, and its settings with all that data, network and functions decide.

    Args:
        config: the settings; ``MODELS`` has the network.
        data: federated data; None: those that the settings name are loaded.
        notice: told what the user should know of the data and the network.
        script: the objects that a script gives.
        stored: the settings of the run that is resumed, or None.
        entry: the checkpoint that the run goes on from, or None.
        out: the run folder.
        trusted: code that may have changed since the run began (`same_code`).
        known: whether the clients' samples are in this process.

    Raises:
        UserError: settings, data, network and functions do not fit together, or are not those that the run began with.
    """
    is_new = known and entry is None
    is_in_memory = bool(script.functions) or (data is not None and isinstance(data.validation, Items))
    if is_in_memory and torchrun_group.launched() is not None:
        raise UserError(
            "Data sets of PyTorch and functions that train are in the memory of this process, and torchrun's other "
            "ranks have none: start the script without torchrun, with workers=N, or have python -m fedkern.run load "
            "FILE.py:NAME."
        )
    if data is None:
        data = run_data.load_data(config, notice=notice, identify=entry is None)
        config, is_new = run_data.decided(config, data), is_new and not data.identity
    data = run_data.inspect_items(config, data) if known else data
    identity = of_memory(data) if is_new else data.identity
    items = data
    data = run_data.with_images(config, data)
    config = run_data.effective(config, data)
    data = run_data.kept_data(config, data)
    if entry is None:
        config = config.replace(identity={**identity, **files_identity(config)})
    else:
        config = with_identity(config, entry)
    code = script.code_at_begin(config, data)
    if stored is not None:
        check_settings(config, stored, out)
    run_data.check_data(config, data)
    config, data, notes = own_model.resolve(config, data, stored, out, known)
    context, alike = RunContext(config, data), dict[str, str]()
    is_compared = isinstance(items.validation, Items) and known and stored is None
    if is_compared and isinstance(data.validation, Items):
        trial = Trial(data, config.kind, context.build)
        if script.train is None and config.on_error != "skip":
            trial.check_clients(config.batch_size)
        trial.check_tests()
        items = data
    if is_compared and (items is data or config.held_out_client is None):
        alike = check_apart(items)
    config, warnings = script.resolve(context, code)
    warnings |= alike
    changed: list[str] = []
    if stored is not None:
        config, changed = same_code(config, stored, entry, code, out, trusted)
    hashes = {name: digest(code[name]) for name in ("network", "loss_fn") if name in code}
    if entry is None:
        config = config.replace(identity={**config.identity, **hashes})
    for sentence in (
        *run_data.caveats(data),
        *(run_data.equal_samples(data) if is_compared and not alike else ()),
        *notes,
        *_not_compared(code, next(iter(data.sights.values()), None)),
    ):
        notice(sentence)
    context = RunContext(config, data, notice, script=script, code=code)
    context.warnings.update(warnings)
    if data.form.outside and config.records != "private":
        context.warn("pixels-outside-window", data.form.outside)
    if changed:
        before = entry["info"]["parts"].get("warnings", {}).get("other-code", "") if entry is not None else ""
        context.warn("other-code", " ".join([before, *(text for text in changed if text not in before)]).strip())
    return context


def _not_compared(code: Mapping[str, Mapping[str, str]], sight: Sight | None) -> list[str]:
    """Return a sentence on values of code and items that no comparison looks at, if there are some."""
    paths = [path for table in code.values() for path in left_out(table)]
    paths += [] if sight is None else sight.left_out
    return [f"A run that goes on does not compare {first_of(paths, 3)}."] if paths else []


def prepare(context: RunContext, *, known: bool, begun: bool, profile: bool, predictions: bool) -> Prepared:
    """Makes method and server, and checks them.

    Args:
        context: of the run.
        known: whether the clients' samples are in this process.
        begun: whether the run goes on from a checkpoint.
        profile, predictions: what the user asks for beside.

    Raises:
        UserError: data, network or settings do not fit the method.
    """
    config = context.config
    if config.kind.pooled:
        context.pool()
    method = config.new_method()
    pooling, progress, server = Pooling(method, on=config.buffers == "pool"), Progress(), Server(context)
    code = MethodCode(config.kind, config.method, progress)
    run_data.check_sets(context.data, config.plugins)
    data = context.data
    if own_model.gives_probabilities(context):
        context.warn(
            "probabilities",
            f"The network {config.model} gives probabilities, and cross-entropy takes logits, of which it takes a "
            "softmax itself: leave the softmax out of the network.",
        )
    for sight in [sight for sight in data.sights.values() if not sight.is_steady][:1]:
        context.warn(
            "unsteady-items",
            f"An item of {sight.owner} is another one when it is read again from the same seeds of torch, NumPy and "
            "random: it draws from a generator or a clock of its own, and the run may give other bits when repeated.",
        )
    if any(sight.piles_threads for sight in [*data.sights.values()][:1]):
        context.warn(
            "piling-threads",
            "Every item of client 0 that is read leaves another thread running: start it once, or end it in the item.",
        )
    for k in range(context.federation.clients) if known else ():
        with code("check"):
            check_client(method, Client(context, k, {}))
    if context.described:
        network = context.network("server")  # raises where an encoder's folder cannot be read
        pooling.check(network.module)
    with context.drawing(server, BEFORE), code("start"):
        method.start(server)
    participation = (asynchronous.Asynchronous if config.asynchronous else Participation)(config, context.federation)
    private, run_guarantee = _privacy(config, context, method, server, code, participation)
    context.disclosure = Disclosure.of(config.records, run_guarantee)
    if profile and not context.disclosure.clients:
        raise UserError(
            "--profile writes what every client computed, step by step, and the records of this run are private: "
            "leave it out, or profile the same run with --records all."
        )
    if predictions:
        predictions_file.check(context.data.task, told=context.disclosure.clients)
    if run_guarantee is not None and not run_guarantee.complete:
        context.warn("partly-covered", run_guarantee.warning())
    warnings = diagnostics.emulated(config.precision, config.device) | diagnostics.unrepeatable(context)
    for name, text in warnings.items():
        context.warn(name, text)
    if not begun:  # a run that goes on has loaded most of them already
        check_teachers(method, context)
    with code("rounds"):
        plan = list(method.rounds(context.federation))
    asynchronous.check_plan(config, plan)
    hooks = {
        name: Hooks(name, target, server, context, code) for name, target in (("method", method), ("pooling", pooling))
    }
    prepared = Prepared(
        config, context, method, pooling, server, progress, code, hooks, plan, participation, private, run_guarantee,
        profile, predictions,
    )  # fmt: skip
    rule = Rule(config.aggregator)
    if rule.entry.function is not None:
        rule.check(participation.fewest_uploads(plan))
    return prepared


def _privacy(
    config: RunConfig,
    context: RunContext,
    method: Method,
    server: Server,
    code: MethodCode,
    participation: Participation,
) -> tuple[ClientPrivacy | None, Guarantee | None]:
    """Privacy of whole clients, and the guarantee of the run."""
    private: ClientPrivacy | None = None
    run_guarantee: Guarantee | None
    if config.dp_clip is not None:
        private = ClientPrivacy(config, method, server, context, participation)
        run_guarantee = private.guarantee()
    else:
        with code("guarantee"):
            run_guarantee = guarantee(method, server, config.records)
    if config.privacy_unit != "image" and run_guarantee is None:
        raise UserError(
            f"--privacy-unit {config.privacy_unit} says what an epsilon protects, and this run of {config.method} "
            "promises none: ask for one with a privacy option of its method (fediod has some), or leave it out."
        )
    return private, run_guarantee
