"""Objects of a run that its loop, parts and filters read, made after checks of all user input.

Nothing is written before the last check.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import nn

from fedkern.data.identity import Sight, data_fingerprint, identify_memory
from fedkern.data.sources.items import Items
from fedkern.data.types import FederatedData
from fedkern.engine.batches.reader import Reader
from fedkern.engine.client import Client, check_client
from fedkern.engine.client_privacy import ClientPrivacy
from fedkern.engine.clients import check_teachers, compare_teachers
from fedkern.engine.context import Notices, RunContext
from fedkern.engine.executors.executor import Executor, Handler
from fedkern.engine.executors.serial import Serial
from fedkern.engine.figures import diagnostics, own_figures
from fedkern.engine.figures.privacy_report import guarantee
from fedkern.engine.hooks import Hooks, MethodCode
from fedkern.engine.local.networks import Networks
from fedkern.engine.local.samples import Samples, Trial, check_test_sets
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.engine.participation import Participation
from fedkern.engine.rounds.ledger import Ledger
from fedkern.engine.rounds.progress import Progress
from fedkern.engine.rounds.round_log import ClientStates, RoundLog, Timing
from fedkern.engine.server import Server
from fedkern.engine.setup import own_model
from fedkern.engine.store import predictions as predictions_file
from fedkern.engine.store.checkpoints import BackgroundWriter, Checkpoints, Entry
from fedkern.engine.store.record_files import DataFacts, Metrics
from fedkern.engine.store.releases import Releases
from fedkern.engine.store.resuming import change_rounds, check_data_and_plan, check_settings, check_user_code, facts_of
from fedkern.engine.transport import torchrun_group
from fedkern.engine.uploads import asynchronous
from fedkern.errors import UserError, first_of
from fedkern.listeners.listener_group import ListenerGroup
from fedkern.messages.states import State
from fedkern.methods.aggregators import Rule
from fedkern.methods.base import Method, Round
from fedkern.methods.common.pooling import Pooling
from fedkern.methods.protocol import BEFORE
from fedkern.privacy import Guarantee
from fedkern.privacy.guarantee import Disclosure
from fedkern.settings import run_data
from fedkern.settings.config import RunConfig, read_code
from fedkern.settings.provenance import files_identity
from fedkern.usercode.code_identity import digest, list_uncompared

Remote = Callable[["RunObjects"], Executor]
"""Makes the executor of remote clients (see :attr:`Executor.remote`)."""


@dataclass(frozen=True)
class Request:
    """Request for a run beside its settings (see :func:`fedkern.engine.run.run`)."""

    out: Path
    data: FederatedData | None = None
    script: ScriptObjects = ScriptObjects()
    trusted: Collection[str] = ()
    resume: bool = False
    rounds: int | None = None
    profile: bool = False
    predictions: bool = False
    remote: Remote | None = None
    at_once: int = 1

    @property
    def has_samples(self) -> bool:
        return self.data is None or self.remote is None


class RunStore:
    """The folder of a run.

    Attributes:
        releases: digests of releases, or None without a guarantee.
        entry: the checkpoint from which the run continues, or None.
        facts: fingerprints that a resumed run is compared with; ``"data"`` is of the data that the server knows.
        check_lock: raises if another process has taken over the folder.
        part_states: returns the states of all parts and filters for a checkpoint.
    """

    def __init__(self, out: Path, private: bool) -> None:
        self.out, self.metrics = out, Metrics(out)
        self.checkpoints = Checkpoints(out, BackgroundWriter())
        self.releases = Releases(self.checkpoints.folder) if private else None
        self.entry: Entry | None = None
        self.facts: State = {}
        self.check_lock: Callable[[], object] = lambda: None
        self.part_states: Callable[[], State] = dict


@dataclass(frozen=True)
class RunObjects:
    """Objects that the loop, the parts and the filters of a run share."""

    request: Request
    context: RunContext
    listener: ListenerGroup
    method: Method
    pooling: Pooling
    server: Server
    progress: Progress
    code: MethodCode
    plan: list[Round]
    participation: Participation
    private: ClientPrivacy | None
    guarantee: Guarantee | None
    store: RunStore
    ledger: Ledger
    timing: Timing = field(default_factory=Timing)

    @property
    def config(self) -> RunConfig:
        return self.context.config

    @property
    def notices(self) -> Notices:
        return self.context.notices

    @property
    def networks(self) -> Networks:
        return self.context.networks

    @property
    def samples(self) -> Samples:
        return self.context.samples

    @property
    def out(self) -> Path:
        return self.request.out

    @cached_property
    def rounds(self) -> int:
        return sum(not entry.one_off for entry in self.plan)

    @property
    def sets(self) -> dict[str, Reader]:
        return self.samples.test_sets

    @cached_property
    def network(self) -> nn.Module:
        return self.networks.build()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @cached_property
    def hooks(self) -> dict[str, Hooks]:
        targets = {"method": self.method, "pooling": self.pooling}
        return {name: Hooks(name, handler, self.server, self.context, self.code) for name, handler in targets.items()}

    @property
    def handlers(self) -> dict[str, Handler]:
        figures = {own_figures.NAME: own_figures.OwnFigures(self.method)} if self.config.own_networks else {}
        return {"method": self.method, "pooling": self.pooling, **figures}

    @property
    def hides_dropouts(self) -> bool:
        """True if dropped clients are hidden, because no noise covers a drop."""
        return self.private is not None and not self.notices.disclosure.clients

    @property
    def samples_in_secret(self) -> bool:
        """True if epsilon uses amplification by secret sampling."""
        return self.private is not None and self.private.amplified

    @cached_property
    def states(self) -> ClientStates:
        """Client states, which hold the run's executor, at first this process's."""
        serial = Serial(self.context, self.handlers, self.store.checkpoints.reader, self.config.client_threads)
        return ClientStates(serial, self.store.checkpoints, self.context, self.progress, self.samples_in_secret)

    @cached_property
    def log(self) -> RoundLog:
        hint = ""  # for the author of a method that does not override Method.expects
        if type(self.method).expects is Method.expects:
            hint = f" ({self.config.method} declares no uploads of its own; Method.expects is where a method does.)"
        hidden = self.hides_dropouts
        return RoundLog(self.context, self.progress, self.states, self.listener, hides_dropouts=hidden, hint=hint)

    @property
    def executor(self) -> Executor:
        """Executor of the clients, this process's until the run has chosen one."""
        return self.states.executor

    @property
    def here(self) -> Serial:
        executor: Serial = self.executor.here
        return executor


def open_store(run: RunObjects, check_lock: Callable[[], object]) -> None:
    """Open the folder of a new run, or restore server and progress from its last checkpoint."""
    store, context, resume = run.store, run.context, run.request.resume
    store.check_lock = check_lock
    run.timing.begin()
    entry = store.checkpoints.open(fresh=not resume, begun=resume and store.metrics.path.exists())
    facts = facts_of(context, data_fingerprint(context.data), store.out)
    if entry is None:
        compare_teachers(context, facts["data"])
    else:
        entry = change_rounds(entry, run.request.rounds)
        check_data_and_plan(entry, facts, run.plan, store.out)
        facts["code"] = read_code(entry["info"])  # of the run's start
        run.server.state = store.checkpoints.server_state()
        messages = store.checkpoints.messages_in_flight()
        run.participation.restore(store.checkpoints.participation_state(), messages, entry["round"])
        run.progress.done, run.progress.planned = entry["round"], entry["plan"]
    store.entry, store.facts = entry, facts
    DataFacts.of(context.data, private=not context.notices.disclosure.clients).write(store.out)


def make_context(
    request: Request, config: RunConfig, notice: Callable[[str], None], stored: RunConfig | None, entry: Entry | None
) -> RunContext:
    """Load the data of a run, and complete its settings by all that data, network and functions decide."""

    # Other ranks cannot see objects of this process.
    data, script, known, out = request.data, request.script, request.has_samples, request.out
    is_in_memory = bool(script.functions) or (data is not None and isinstance(data.validation, Items))
    if is_in_memory and torchrun_group.find_rank() is not None:
        raise UserError(
            "Data sets of PyTorch and functions that train are in the memory of this process, and torchrun's other "
            "ranks have none: start the script without torchrun, with workers=N, or have python -m fedkern.run load "
            "FILE.py:NAME."
        )

    # The data and their identity, which a resumed run takes from its checkpoint.
    are_loaded = data is None
    if data is None:
        data = run_data.load_data(config, notice=notice, identify=entry is None)
    items = data = run_data.inspect_items(config, data) if known else data
    has_identity = entry is not None or (are_loaded and data.identity)  # from a file, or the checkpoint
    identity = identify_memory(data) if known and not has_identity else data.identity

    # The settings that the data decide, and the data that these leave.
    data = run_data.with_images(config, data)
    config = run_data.complete_settings(config, data, are_loaded=are_loaded)
    data = run_data.kept_data(config, data)
    code = script.code_at_begin(config, data)
    if entry is None:
        hashes: dict[str, str] = {name: digest(code[name]) for name in ("network", "loss_fn") if name in code}
        identity = {**identity, **files_identity(config), **hashes}
    else:
        identity = entry["info"]["config"].get("identity", {})
    if stored is not None:
        check_settings(config, stored, out)
    run_data.check_data(config, data)

    # The settings that describe the network and the functions.
    found, data, notes = own_model.find_facts(config, data, stored, out, known=known)
    config = config.replace(**found, identity=identity)

    # Trials of batches before anything is written, and only for a new run.
    build, alike = RunContext(config, data).networks.build, dict[str, str]()
    is_compared = isinstance(items.validation, Items) and known and stored is None
    if is_compared and isinstance(data.validation, Items):
        trial = Trial(data, config.kind, build)
        if script.train is None and config.on_error != "skip":
            trial.check_clients(config.batch_size)
        trial.check_tests()
        items = data
    if is_compared and (items is data or config.held_out_client is None):
        alike = check_test_sets(items)

    # A resumed run goes on with the code of its start, unless the user trusts the change.
    training, warnings = script.describe_training(build, code)
    config = config.replace(**training) if training else config
    changed: list[str] = []
    if stored is not None:
        config, changed = check_user_code(config, stored, entry, code, out, request.trusted)

    # Notices come last, when nothing can fail any more.
    for sentence in (
        *run_data.list_caveats(data),
        *(run_data.equal_samples(data) if is_compared and not alike else ()),
        *notes,
        *_not_compared(code, next(iter(data.sights.values()), None)),
    ):
        notice(sentence)
    context = RunContext(config, data, notice, script=script, code=code)
    context.notices.warnings.update(warnings | alike)
    if data.form.outside and config.records != "private":
        context.notices.warn("pixels-outside-window", data.form.outside)
    if changed:
        before = entry["info"]["parts"].get("warnings", {}).get("other-code", "") if entry is not None else ""
        context.notices.warn(
            "other-code", " ".join([before, *(text for text in changed if text not in before)]).strip()
        )
    if request.at_once > 1:
        text = f"Up to {request.at_once} runs shared the machine: their seconds are not those of runs alone."
        context.notices.warn("shared-machine", text)
    return context


def _not_compared(code: Mapping[str, Mapping[str, str]], sight: Sight | None) -> list[str]:
    paths = [path for table in code.values() for path in list_uncompared(table)]
    paths += [] if sight is None else sight.left_out
    return [f"Resuming does not check {first_of(paths, 3)} for changes."] if paths else []


def prepare(request: Request, context: RunContext, listener: ListenerGroup, *, is_begun: bool) -> RunObjects:
    """Make the objects of a run, and check them."""

    # Data and method: every client's data must fit.
    config = context.config
    if config.kind.pooled:
        context.pool()
    method = config.new_method()
    pooling, progress, server = Pooling(method, on=config.buffers == "pool"), Progress(), Server(context)
    code = MethodCode(config.kind, config.method, progress)
    run_data.check_sets(context.data, config.plugins)
    _warn_of_samples(context)
    for k in range(context.federation.clients) if request.has_samples else ():
        with code("check"):
            check_client(method, Client(context, k, {}))
    if context.task_facts:
        pooling.check(context.networks.get("server").module)  # raises if an encoder's folder cannot be read

    # The method makes its state first, as privacy and participation depend on it.
    with context.drawing(server, BEFORE), code("start"):
        method.start(server)
    participation = (asynchronous.Asynchronous if config.asynchronous else Participation)(config, context.federation)
    private, run_guarantee = _privacy(context, method, server, code, participation)

    # What may be disclosed decides which outputs are allowed.
    context.notices.disclosure = Disclosure.of(config.records, run_guarantee)
    if request.profile and not context.notices.disclosure.clients:
        raise UserError(
            "--profile writes what every client computed, step by step, and the records of this run are private: "
            "leave it out, or profile the same run with --records all."
        )
    if request.predictions:
        predictions_file.check(context.data.task, told=context.notices.disclosure.clients)
    if run_guarantee is not None and not run_guarantee.complete:
        context.notices.warn("partly-covered", run_guarantee.warning())

    # Warnings about the machine's arithmetic.
    warnings = diagnostics.warn_emulated(config.precision, config.device)
    shape = getattr(context.data.form, "shape", ())
    warnings |= diagnostics.warn_unrepeatable(lambda: context.networks.get("server").module, shape, context.device)
    context.notices.warn_all(warnings)

    # Teachers and plan, which every round relies on.
    if not is_begun:  # a resumed run has loaded most of them already
        check_teachers(method, context)
    with code("rounds"):
        plan = list(method.rounds(context.federation))
    asynchronous.check_plan(config, plan)
    rule = Rule(config.aggregator)
    if rule.entry.function is not None:
        rule.check(participation.fewest_uploads(plan))
    store = RunStore(request.out, run_guarantee is not None)
    return RunObjects(
        request, context, listener, method, pooling, server, progress, code, plan, participation, private,
        run_guarantee, store, Ledger(config.trained_clients),
    )  # fmt: skip


def _warn_of_samples(context: RunContext) -> None:
    if own_model.gives_probabilities(context):
        context.notices.warn(
            "probabilities",
            f"The network {context.config.model} gives probabilities, and cross-entropy takes logits, of which it "
            "takes a softmax itself: leave the softmax out of the network.",
        )
    sights = [*context.data.sights.values()]
    if unsteady := [sight for sight in sights if not sight.is_steady]:
        context.notices.warn(
            "unsteady-items",
            f"An item of {unsteady[0].owner} changes between reads with the same seeds of torch, NumPy and random: it "
            "draws from a generator or a clock of its own, and the run may give other bits when "
            "repeated.",
        )
    if sights and sights[0].piles_threads:
        context.notices.warn(
            "piling-threads",
            "Every item of client 0 that is read leaves another thread running: start it once, or end it in the item.",
        )


def _privacy(
    context: RunContext, method: Method, server: Server, code: MethodCode, participation: Participation
) -> tuple[ClientPrivacy | None, Guarantee | None]:
    config, private = context.config, None
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
