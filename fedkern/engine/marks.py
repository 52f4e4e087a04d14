"""Marks of the features that a method has used of a run, to find settings without effect.

Code that reaches the place in which a setting acts, such as the server's average, leaves its mark. A client's marks
travel with its answer.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from fedkern.settings.config import RunConfig

TRAINED = frozenset({"step", "clip", "batches", "augmented", "epochs", "lr"})
"""Marks of training in the run's own loop."""


@dataclass(frozen=True)
class Place:
    """A place in which settings act.

    Attributes:
        settings: their names.
        lacks: the end of a sentence about a method that never gets there.
        way: advice, in the imperative.
    """

    settings: tuple[str, ...]
    lacks: str
    way: str


_AVERAGE = "whose server never reaches the run's average", "call self.average(server, uploads) or super().average"
_STEP = "whose clients take no such step of the run's optimiser", "train with client.train or client.fit"
_BATCHES = "take them from client.batches()"
_RATES = ("lr", "lr_decay", "lr_end", "lr_steps", "lr_step_factor")
PLACES = {
    "drawn": Place(
        ("sample_fraction", "choose"), "in whose rounds all clients take part", "plan rounds of sampled clients"
    ),
    "average": Place(("aggregator",), *_AVERAGE),
    "server_step": Place(("server_rule", "server_lr"), *_AVERAGE),
    "step": Place(("optimizer", "optimizer_state", "momentum", "weight_decay"), *_STEP),
    "clip": Place(("clip_norm",), *_STEP),
    "batches": Place(("batch_size", "straggler_rate"), "whose clients take no batches of the run", _BATCHES),
    "augmented": Place(("augment",), "whose clients take no augmented images", _BATCHES),
    "epochs": Place(("local_epochs", "local_steps"), "whose clients do not train for client.epochs", "loop over them"),
    "lr": Place(_RATES, "whose clients never read client.lr", "give your optimiser lr=client.lr"),
    "statistics": Place(("freeze_bn_after",), "whose clients never call client.statistics_fixed", "call it"),
    "teachers": Place(("teachers",), "whose clients load no networks", "call client.load_pretrained"),
}
"""Places by the name of their mark."""


def find_unused(config: RunConfig, names: Collection[str], marks: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each given setting of ``names`` whose mark is missing."""
    subject, own = _code(config)
    factory = {"optimizer"} if config.training and not config.training.startswith("train ") else set()
    for mark, place in PLACES.items():
        labels = {*config.given_flags(*(key for key in place.settings if key in names)), *factory & {*place.settings}}
        for label in () if mark in marks else sorted(labels):
            way = f"{place.way}, or leave {label} out" if own else f"leave {label} out"
            yield f"{label} has no effect on {subject}, {place.lacks}: {way}."


def comparison_notes(config: RunConfig, names: Collection[str], marks: Collection[str]) -> Iterator[str]:
    """Yield sentences on settings without effect: a comparison's ``names``, and defaults."""
    for name, way in config.find_unused().items():
        yield from (f"{label} has no effect {way}." for label in config.given_flags(name) if name in names)
    yield from find_unused(config, names, marks)
    unmarked = {name for mark, place in PLACES.items() if mark not in marks for name in place.settings}
    if labels := sorted(config.given_flags(*(unmarked - {*names, *config.find_unused()}))):
        yield f"The defaults of {', '.join(labels)} have no effect on {_code(config)[0]}."


def _code(config: RunConfig) -> tuple[str, bool]:
    """Return the method's class in words, and whether a user wrote it."""
    subject, script = config.kind.__name__, (config.training or "").startswith("train ")
    name = f"{subject} with the {config.training}" if script else subject
    return name, script or not config.kind.__module__.startswith("fedkern.")
