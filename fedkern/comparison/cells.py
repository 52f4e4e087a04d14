"""Plan of a comparison: variants (a method with its settings), and cells (a variant with a seed)."""

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedkern.errors import UserError, hint_owners, suggest_name
from fedkern.methods import method_registry
from fedkern.ops._core.checks import python_number
from fedkern.settings.config import RESUMABLE, RunConfig
from fedkern.settings.section import FINGERPRINTS
from fedkern.typed_option import Option, Value, as_typed

T = TypeVar("T")

MOST_CELLS = 100_000
_FIXED = {
    "method": "name the methods before the flags",
    "seed": "--seeds gives the seeds",
    **dict.fromkeys((*RESUMABLE, "device"), "it changes no figure"),
    "data": "a comparison is on one data set",
}
"""Settings that cannot be swept, with the reason or the alternative."""
OF_ROUNDS = ("rounds", "local_steps")
"""Settings that one-shot methods, which plan their own rounds, do not take."""


@dataclass(frozen=True)
class Variant:
    """A method with the settings and options of a sweep point, and the options of a given method object."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name of the variant for people: ``fedgid alpha=0.3``. An unregistered class goes by its own name."""
        swept = (f"{name}={spell_value(value)}" for name, value in self.swept.items())
        return " ".join([method_registry.short_name(self.method), *swept])

    @property
    def swept(self) -> dict[str, object]:
        return {**self.settings, **self.options}


@dataclass(frozen=True)
class Cell:
    variant: Variant
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        return run_name(self.variant, self.seed)


def run_name(variant: Variant, seed: int) -> str:
    """Return the folder name of a variant's run: ``fedgid_alpha=0.3_seed=0``."""
    return folder_name([*variant.label.split(" "), f"seed={seed}"])


def spell_value(value: object) -> str:
    """Return a setting's value as the command line takes it, an integer without decimals."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    return as_typed(value)


def folder_name(words: Iterable[str]) -> str:
    """Join words into a folder name. A name with replaced characters or cut to length ends in a hash."""
    text = "_".join(words)
    name = re.sub(r"[^A-Za-z0-9._=-]", "-", text)[:150]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_methods(names: Sequence[str]) -> None:
    if not names:
        raise UserError("Nothing to compare: name methods, such as fedgid fedavg, or folders of runs.")
    for name in names:
        method_registry.get(name)
        if names.count(name) > 1:
            raise UserError(f"{method_registry.short_name(name)} is named twice: name every method once.")


def check_option(name: str, methods: Sequence[str], similar: Collection[str] = ()) -> None:
    """Raise UserError for a method option that no method has. ``similar`` are other names for the hint."""
    options = {option for method in methods for option in method_registry.option_names(method)}
    if name not in options:
        names = ", ".join(map(method_registry.short_name, methods))
        raise UserError(
            f'None of the methods ({names}) has an option "{name}".{suggest_name(name, {*options, *similar})}'
            f"{hint_owners(name, method_registry.option_owners())} METHOD --help lists a method's options."
        )


def own_settings(method: str, settings: Mapping[str, T]) -> dict[str, T]:
    """Return the settings that a method takes: all, or for a one-shot method all but `OF_ROUNDS`."""
    one_shot = method_registry.get(method).one_shot
    return {name: value for name, value in settings.items() if not (one_shot and name in OF_ROUNDS)}


def variants(
    methods: Sequence[str], sweep: Mapping[str, Sequence[object]], singles: Iterable[str] = ()
) -> dict[str, list[Variant]]:
    """Return the variants of every method: all combinations of the swept settings that the method has.

    ``sweep`` has values by name of a run's setting or of a method option (a name of both means the run's setting),
    ``singles`` the names that are given with one value.
    """
    declared = {setting.field: setting for setting in RunConfig.list_options()}
    swept: dict[str, Sequence[Any]] = {}
    for flag, values in sweep.items():
        name = flag.strip().replace("-", "_")
        if name in _FIXED or name in FINGERPRINTS:
            raise UserError(f"{name} cannot be swept: {_FIXED.get(name, 'a run finds its value itself')}.")
        if name in swept:
            raise UserError(f'The sweep over "{name}" is given twice: give all values at once.')
        if name in singles:
            raise UserError(f'"{name}" is swept and given with one value too: leave one of the two out.')
        choices = {*declared, *(option for method in methods for option in method_registry.option_names(method))}
        if name not in choices:
            raise UserError(
                f'Neither the runs nor the methods have a setting "{name}" to sweep.{suggest_name(name, choices)}'
            )
        if not values:
            raise UserError(f'The sweep over "{name}" has no values: write {name}=VALUE,VALUE.')
        swept[name] = values
    result: dict[str, list[Variant]] = {}
    for method in methods:
        declarations = {option.name: option for option in method_registry.get(method).Options.list_options()}
        fields = {option.field: name for name, option in declarations.items()}
        axes: list[list[tuple[str, str, Any]]] = []
        for name, values in swept.items():
            if name in declared:
                if name in own_settings(method, {name: None}):
                    axes.append([("settings", name, value) for value in _distinct(declared[name], values, name)])
            elif name in declarations or name in fields:
                key = fields.get(name, name)
                axes.append([("options", key, value) for value in _distinct(declarations[key], values, name)])
        for point in itertools.product(*axes):
            settings, options = ({n: value for p, n, value in point if p == part} for part in ("settings", "options"))
            result.setdefault(method, []).append(Variant(method, settings, options))
    return result


def _distinct(option: Option, values: Sequence[object], name: str) -> list[Value]:
    result = [option.convert(value) for value in values]
    for value in result:
        if result.count(value) > 1:
            raise UserError(f'The sweep over "{name}" has the value {spell_value(value)} twice: leave one out.')
    return result


def cells(choices: Iterable[Variant], seeds: Sequence[int], make: Callable[[Variant, int], RunConfig]) -> list[Cell]:
    """Return the runs of some variants, seed by seed: after the first pass every variant has a run."""
    all_variants = list(choices)
    if len(all_variants) * len(seeds) > MOST_CELLS:
        raise UserError(f"These are {len(all_variants) * len(seeds)} runs: sweep fewer values, or take fewer seeds.")
    return [Cell(variant, seed, make(variant, seed)) for seed in seeds for variant in all_variants]


def read_seeds(text: str | int | Sequence[int], first_seed: int = 0) -> tuple[int, ...]:
    """Return seeds from a number (``3``: three seeds from ``first_seed``) or a list (``0,4,7``), or raise UserError."""
    wrong = UserError(f'--seeds must be a number of seeds, at least 1, or a list such as 0,4,7, not "{text}".')
    try:
        if isinstance(text, str):
            text = [int(part) for part in text.split(",")] if "," in text else int(text)
        if type(count := python_number(text)) is int and 1 <= count <= MOST_CELLS:
            return tuple(range(first_seed, first_seed + count))
        seeds = tuple(python_number(seed) for seed in text)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise wrong from None
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int for seed in seeds):
        raise wrong
    return seeds


def most_threads(configs: Iterable[RunConfig]) -> int:
    return max((max(config.threads, config.client_threads) for config in configs), default=1)


def read_sweep(words: Iterable[str]) -> dict[str, list[str]]:
    """Read sweeps ``NAME=VALUE,VALUE``, with semicolons between values that have commas, or raise UserError."""
    sweep: dict[str, list[str]] = {}
    for sweep_word in words:
        name, equals, text = sweep_word.partition("=")
        values = [value.strip() for value in text.split(";" if ";" in text else ",")]
        if not equals or not name.strip() or not all(values):
            raise UserError(f'--sweep needs the form NAME=VALUE,VALUE, got "{sweep_word}".')
        name = name.strip().replace("-", "_")
        if name in sweep:
            raise UserError(f'The sweep over "{name}" is given twice: give all values at once.')
        sweep[name] = values
    return sweep
