"""Whole comparisons: of new runs (`play_comparison`), of existing runs (`compare_found`), and `compare` for Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from fedkern.comparison import cells
from fedkern.comparison.cell_runner import Runner, check_out, pick_best, reserve_folder
from fedkern.comparison.cells import OF_ROUNDS, Cell, Variant, own_settings
from fedkern.comparison.found_runs import SHOWN, FoundRun, group_runs, read_runs
from fedkern.comparison.run_results import Result
from fedkern.comparison.seed_statistics import Target
from fedkern.data import FederatedData
from fedkern.engine.local.script_objects import ScriptObjects
from fedkern.errors import RunFailed, UserError, first_of, make_printable
from fedkern.methods import METHODS, Method, method_registry
from fedkern.process.extras import import_extra
from fedkern.settings import run_data
from fedkern.settings.config import RunConfig
from fedkern.settings.error_wording import python_words
from fedkern.settings.in_memory import check_in_memory
from fedkern.tasks.figure_names import direction, split_metric
from fedkern.typed_option import Value, flag

T = TypeVar("T")
Given = tuple[str, Mapping[str, Value]]
"""Name of a method, and the options of a given method object."""


@dataclass
class Comparison:
    """A finished comparison.

    Attributes:
        result: groups of runs, compared with the first group.
        folder: folder of ``comparison.csv``, ``comparison.md``, ``comparison.tex`` and ``comparison.png``.
        files: paths of the files in ``folder``.
    """

    result: Result
    folder: Path
    files: list[Path] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<fedkern.Comparison of {len(self.result.groups)} groups in {str(self.folder)!r}>"

    def __str__(self) -> str:
        return self.result.text_table(self.result.all_sentences()).markdown()

    def _repr_html_(self) -> str:
        return self.result.text_table([*self.result.all_sentences(), f"files in {self.folder}"]).html()

    @property
    def table(self) -> list[dict[str, Any]]:
        """The table, a dict for every group with plain numbers, None where there is no value.

        Every main figure has its mean under the figure's name, and ``FIGURE_std``, ``FIGURE_difference``,
        ``FIGURE_low`` and ``FIGURE_high`` (the 95 % interval of the difference to the first group). The other keys are
        ``group``, ``method``, ``seeds``, ``bytes`` and ``seconds``. A target adds ``reached``, ``rounds_to_target``,
        ``bytes_to_target`` and ``seconds_to_target``.
        """
        return self.result.table

    @property
    def notes(self) -> list[str]:
        """Sentences on the table: seeds, intervals, settings that differ, choices, warnings."""
        return self.result.sentences()

    @property
    def failures(self) -> list[str]:
        """A sentence for every failed run."""
        return self.result.failures

    def to_pandas(self) -> Any:
        """Return the table as a ``pandas.DataFrame``.

        Raises:
            UserError: pandas is not installed.
        """
        return import_extra("to_pandas needs pandas", "pandas", "pandas").DataFrame(self.table)

    def plot(self) -> list[Path]:
        """Return the picture of the curves, as a list of paths that a notebook displays.

        The list is empty if nothing was drawn.
        """
        from fedkern.report.live.notebook import Pictures

        return Pictures(path for path in self.files if path.suffix == ".png")

    def report(self) -> Path:
        """Write ``report.html``, one file of the comparison to read in a browser, and return its path.

        Raises:
            UserError: the folder cannot be written.
        """
        from fedkern.comparison.comparison_page import write_report

        return write_report(self.folder, self.result)


@dataclass(frozen=True)
class Plan:
    """Plan of a comparison of new runs.

    Attributes:
        variants: of every method.
        seeds: the seeds, of which the first is used for ``select``.
        select: ``"validation"`` runs only the best variant of every method with all seeds, None runs all variants.
        notes: sentences on settings and options that some methods ignore.
    """

    variants: Mapping[str, Sequence[Variant]]
    seeds: tuple[int, ...]
    select: str | None
    target: Target | None
    notes: list[str]

    @classmethod
    def of(
        cls, methods: Sequence[str], settings: Mapping[str, Any], options: Mapping[str, object], *,
        sweep: Mapping[str, Sequence[object]], seeds: str | int | Sequence[int], select: str | None, target: str | None,
        similar: Collection[str] = (),
    ) -> Plan:  # fmt: skip
        """Return the plan for some methods, with the settings and options of all runs, or raise UserError.

        ``similar``: see `check_option`.
        """
        for name in options:
            cells.check_option(name, methods, similar)
        if select not in (None, "validation"):
            raise UserError(f'--select must be validation, not "{select}".')
        if select is not None and not sweep:
            raise UserError("--select picks among the settings of a sweep: give --sweep NAME=VALUE,VALUE too.")
        return cls(
            cells.variants(methods, sweep, {*settings, *options}),
            cells.read_seeds(seeds, int(settings.get("seed", 0))), select,
            None if target is None else Target.read(target), describe_ignored(methods, settings, options),
        )  # fmt: skip


def play_comparison(runner: Runner, plan: Plan) -> Comparison:
    """Run the unfinished runs of a comparison and write its files."""
    all_variants, target = [*chain(*plan.variants.values())], plan.target
    texts = [*plan.notes]
    try:
        planned = runner.plan(all_variants, plan.seeds)  # every mistake in the settings shows before the first run
        data, several = runner.data(planned[0].config), len(plan.variants) > 1
        if data is None and several and not all((runner.folder(cell) / "summary.json").exists() for cell in planned):
            with suppress(Exception):  # a run names what is wrong with its data
                data = run_data.load_data(planned[0].config, masks=False)
        if data is not None:
            for cell in planned:
                run_data.check_kind(cell.config, data)
            known = data.task.directions
            if target is not None and split_metric(target.figure, data.tests)[1] in known:
                target.with_direction([direction(target.figure, known, data.tests)]).check_direction()
        if plan.select is not None:
            winners, sentences = pick_best(runner, plan.variants, plan.seeds[0])
            texts += sentences
            planned = [cell for cell in planned if cell.variant in winners]
        runner.play(planned, None if target is None else _target_check(target, [*plan.variants], runner.out))
    finally:
        runner.board.close()
    finished = [cell for cell in planned if cell.name not in runner.failures]
    failures = list(runner.failures.values())
    if not finished:
        raise RunFailed(f"No run of the comparison succeeded: {' '.join(failures)}")
    order = {variant.label: number for number, variant in enumerate(all_variants)}
    finished.sort(key=lambda cell: (order[cell.variant.label], cell.seed))
    labels = {runner.folder(cell): cell.variant.label for cell in finished}
    groups = group_runs([runner.read(cell) for cell in finished], lambda run: labels[run.folder])
    present = {*labels.values(), *(method_registry.short_name(cell.variant.method) for cell in finished)}
    planned_names = [*(cell.variant.label for cell in planned), *map(method_registry.short_name, plan.variants)]
    if missing := [name for name in dict.fromkeys(planned_names) if name not in present]:
        texts.append(f"No run of {', '.join(missing)} succeeded.")
    result = Result(groups, target, texts, failures)
    result.check_target()
    return Comparison(result, runner.out, result.write(runner.out))


def _target_check(target: Target, methods: Sequence[str], out: Path) -> Callable[[Cell, FoundRun], None]:
    """Return a check that ends a comparison once every method has a run and none has the target's figure."""
    runs: dict[str, FoundRun] = {}

    def check(_: Cell, run: FoundRun) -> None:
        if run.method not in runs:
            runs[run.method] = run
            if len(runs) == len(methods):
                try:
                    Result(group_runs(runs.values()), target).check_target()
                except UserError as error:
                    raise UserError(f"{error} The same command with --out {out} goes on.") from None

    return check


def compare_found(folders: Iterable[str | Path], *, out: Path | None, target: str | None) -> Comparison:
    """Compare existing runs, grouped by method and settings except the seed, into ``out`` or a new folder."""
    runs, unfinished = read_runs(folders)
    notes = [f"Left out, as not finished: {first_of(unfinished, SHOWN)}."] if unfinished else []
    result = Result(group_runs(runs), None if target is None else Target.read(target), notes)
    result.check_target()
    return in_folder(out, lambda folder: Comparison(result, folder, result.write(folder)))


def describe_ignored(methods: Sequence[str], settings: Collection[str], options: Iterable[str]) -> list[str]:
    flags = " and ".join(flag(name) for name in OF_ROUNDS if name in settings)
    one_shot = [method for method in methods if flags and method_registry.get(method).one_shot]
    ignoring = {f"{flags} is not used by {{}}, which plans its own rounds.": one_shot}
    for name in options:
        without = [method for method in methods if name not in method_registry.option_names(method)]
        ignoring[f'The option "{name}" is not read by {{}}.'] = without
    return [
        sentence.format(", ".join(map(method_registry.short_name, ignorant)))
        for sentence, ignorant in ignoring.items() if ignorant
    ]  # fmt: skip


@python_words()
def compare(
    methods: Sequence[str | Method | type[Method]] | Sequence[str | Path],
    *,
    seeds: int | Sequence[int] = 3,
    sweep: Mapping[str, Sequence[object]] | None = None,
    select: str | None = None,
    target: str | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    jobs: int = 1,
    **settings: Any,
) -> Comparison:
    """Compare methods over seeds, or runs that exist, as ``fedkern compare`` does, and warn of runs that fail.

    Call again with the same ``out`` to continue where the comparison stopped::

        result = fedkern.compare(["fedgid", "fedavg"], seeds=3, data="digits", rounds=5, out="comparisons/x")
        result.table[1]["accuracy_difference"]

    Args:
        methods: names of methods, classes derived from :class:`fedkern.methods.Method` and objects of them, as in
            :func:`fedkern.simulate`, or folders of finished runs. Several objects of one class are several settings of
            one method.
        seeds: the number of seeds, or a list of seeds.
        sweep: values by the name of a setting or of a method option.
        select: ``"validation"`` runs all seeds only with each method's best setting by its validation figure.
        target: ``"accuracy=0.8"`` counts rounds, bytes and seconds up to this figure.
        out: folder of the runs and of the result, by default ``comparisons/<time>``.
        progress: whether to show the progress on standard error.
        jobs: how many runs to play at once, each in its own process, with the same bits as one after another.
        **settings: settings of all runs, as in :func:`fedkern.simulate`, ``data`` and ``model`` included. Options go to
            the methods that have them.

    Returns:
        The finished :class:`Comparison`.

    Raises:
        UserError: a mistake in the arguments, or every run failed.
    """
    from fedkern import api
    from fedkern.comparison.boards import choose_board
    from fedkern.usercode import plugins

    # A single method need not be in a list, and folders of finished runs may stand in place of methods.
    single = isinstance(methods, (str, Path, Method, type)) or not isinstance(methods, Iterable)
    items = [methods] if single else list(methods)
    entries: list[Any] = [str(item) if isinstance(item, Path) else item for item in items]
    folder = None if out is None else api.folder_of(out)
    folders = [entry for entry in entries if isinstance(entry, str) and entry not in METHODS and Path(entry).is_dir()]
    if folders and len(folders) == len(entries):
        if settings or sweep or select or jobs != 1:
            raise UserError("Settings are for new runs: name methods instead of folders, or leave the settings out.")
        return compare_found(folders, out=folder, target=target)
    # Plugins first, as they register what the other arguments may name.
    plugins.load_given(api.plugins_of(settings.get("plugins")))
    pairs = [api.find_method(entry) for entry in entries]
    names = _distinct_names(pairs)
    points = api.table_of(sweep, "sweep")
    for name, values in points.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UserError(f"sweep must have a list of values for {name}, not {values!r}.")
    for name in ("train", "optimizer", "init"):
        if callable(settings.get(name)):
            raise UserError(f"{name} as a function or a module is for one run, fedkern.simulate: leave it out.")
    # Keyword arguments describe data sets, name options of the methods, or are settings of the runs.
    about = {name: settings.pop(name) for name in api.ABOUT if name in settings}
    options = api.table_of(settings.pop("options", None), "options")
    fields = {setting.field for setting in RunConfig.list_options()} | {"data_options", "plugins"}
    options |= {name: settings.pop(name) for name in list(settings) if name not in fields}
    plan = Plan.of(
        names, settings, options, sweep=points, seeds=seeds, select=select, target=target, similar={*fields, *api.ABOUT}
    )
    plan = replace(plan, variants={name: _of_objects(name, pairs, plan.variants[name], options) for name in names})
    data, model = settings.pop("data", None), settings.pop("model", None)
    check_in_memory(data, model, {**settings, **{name: values[0] for name, values in points.items() if values}})
    # Runs that draw and share out the same samples share one copy in memory.
    cache: dict[tuple[str, ...], str | FederatedData | None] = {}

    def data_of(how: Mapping[str, object]) -> str | FederatedData | None:  # every seed draws and shares out anew
        key = tuple(str(how.get(name)) for name in ("seed", "clients", "partition", "train_samples"))
        if key not in cache:
            cache[key] = api.federate(data, about, {**how, "model": model})
        return cache[key]

    def make(variant: Variant, seed: int) -> RunConfig:
        subset = {key: value for key, value in options.items() if key in method_registry.option_names(variant.method)}
        merged = {**own_settings(variant.method, settings), **variant.settings, "seed": seed}
        network = merged.pop("model", model)
        return api.read_request(
            variant.method, data_of(merged), network, {**merged, "options": {**subset, **variant.options}}
        )[0]

    def in_memory(config: RunConfig) -> FederatedData | None:
        source = data_of(vars(config))
        return source if isinstance(source, FederatedData) else None

    # A notebook has no exit code, so failures of single runs are a warning.
    tracebacks: dict[str, str] = {}

    def begin(where: Path) -> Comparison:
        display, script = choose_board(quiet=not progress, json=False), ScriptObjects.of(model, None, {})
        runner = Runner(where, make, frozenset(settings), display, in_memory, script, tracebacks=tracebacks, jobs=jobs)
        return play_comparison(runner, plan)

    comparison = in_folder(folder, begin)
    if comparison.failures:
        traces = map(make_printable, tracebacks.values())
        lines = ["Not every run of the comparison succeeded.", *comparison.failures, *traces]
        warnings.warn("\n".join(lines), stacklevel=3)
    return comparison


def _distinct_names(entries: Sequence[Given]) -> list[str]:
    plain = [name for name, options in entries if not options]
    cells.check_methods(plain if len(plain) == len(entries) else list(dict.fromkeys(name for name, _ in entries)))
    for entry in entries:
        if entries.count(entry) > 1:
            name = method_registry.short_name(entry[0])
            raise UserError(f"{name} is given twice with the same options: leave one out.")
    names = list(dict.fromkeys(name for name, _ in entries))
    shorts = [method_registry.short_name(name) for name in names]
    for name, short in zip(names, shorts, strict=True):
        if shorts.count(short) > 1:
            raise UserError(
                f"Two methods are called {short}, one of them {name}: give one of the classes another name."
            )
    return names


def _of_objects(
    name: str, entries: Sequence[Given], swept: Sequence[Variant], options: Mapping[str, object]
) -> list[Variant]:
    """Return the variants of a method: of every given object, with all points of the sweep."""
    beside = method_registry.given_options(
        name, {key: options[key] for key in method_registry.option_names(name) & options.keys()}
    )
    keys = {*beside, *(key for variant in swept for key in variant.options)}
    result = []
    for made_with in (arguments for method_name, arguments in entries if method_name == name):
        if twice := [key for key in made_with if key in keys]:
            short = method_registry.short_name(name)
            raise UserError(f"{twice[0]} is given twice, in {short}(...) and beside it: leave one of the two out.")
        result += [replace(variant, options={**made_with, **variant.options}) for variant in swept]
    return result


def in_folder(out: Path | None, begin: Callable[[Path], T]) -> T:
    """Call ``begin`` with the comparison's folder. A new folder that stays empty is removed."""
    fresh = [] if out is None else [folder for folder in (out, *out.parents) if not folder.exists()]
    if out is not None:
        check_out(out)
    folder = reserve_folder() if out is None else out
    try:
        return begin(folder)
    finally:
        for path in (folder, folder.parent) if out is None else fresh:
            with suppress(OSError):  # not empty: runs are there
                path.rmdir()
