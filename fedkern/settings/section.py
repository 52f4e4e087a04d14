"""Base of the sections of a run's settings, and fingerprints of the data, files and code that they name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from fedkern.methods import method_registry
from fedkern.methods.base import Method
from fedkern.methods.options import Options
from fedkern.typed_option import OptionTable, flag, option

_NEUTRAL = {
    "sample_fraction": 1, "choose": "uniform", "lr_decay": 1, "lr_end": 1, "optimizer_state": "new", "augment": "none",
    "dp_draws": "secret",
}  # fmt: skip
"""Neutral values of settings, beside 0, None and the mean."""
Values = dict[str, Any]
"""Settings by name: numbers, words, None, and tables of them."""
OF_METHOD = ("method_options", "method_instance")
"""Names of the cached properties of a method and its options."""


@dataclass(frozen=True)
class Section(OptionTable):
    """Base of all sections, which are one object, :class:`fedkern.settings.config.RunConfig`.

    A method that several sections have begins with ``super()``: all are called, a section after its bases.
    """

    method: str = option("fedavg", "name of the method")
    options: Mapping[str, Any] = field(default_factory=dict)

    def resolve(self) -> Values:
        """Return the settings that follow from others, to replace the given ones."""
        return {}

    def check(self) -> None:
        """Raise UserError if settings do not fit together or to the method.

        A forbidden pair is checked in the section of the setting that forbids it.
        """

    def find_unused(self) -> dict[str, str]:
        """Return the settings without effect beside the others, with the reason and the way out."""
        return dict.fromkeys(self.kind.ignored_settings, f"on {self.method}, whose clients train once: leave it out")

    @property
    def kind(self) -> type[Method]:
        return method_registry.get(self.method)

    @cached_property
    def method_options(self) -> Options:
        return self.kind.Options.parse(self.options, method=self.method)

    @cached_property
    def method_instance(self) -> Method:
        """Instance for questions about the method's abilities, while a run uses :meth:`new_method`."""
        return self.new_method()

    def new_method(self) -> Method:
        return self.kind(self.method_options)

    def __getstate__(self) -> Values:
        return {name: value for name, value in vars(self).items() if name not in OF_METHOD}

    def given_flags(self, *names: str) -> Iterator[str]:
        """Yield the flags of the settings that are not at neutral values."""
        return (flag(name) for name in names if getattr(self, name) not in ("mean", None, 0, _NEUTRAL.get(name)))


@dataclass(frozen=True)
class Fingerprints(Section):
    """Fingerprints, and facts about data and network.

    ``served`` says whether the run accelerates its network, and ``plan`` how.  ``main`` and ``better`` are
    classification's until the data are loaded.
    """

    model_sha256: str | None = None
    model_layout: str | None = None
    init_sha256: str | None = None
    method_sha256: str | None = None
    served: str | None = None
    plan: str | None = None
    output_bytes: int | None = None
    training: str | None = None
    training_sha256: str | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    main: str = "accuracy"
    better: str = "max"


FINGERPRINTS = tuple(field.name for field in fields(Fingerprints) if field.name not in ("method", "options"))
"""Names of the fingerprints and facts, which a resumed run compares by itself."""
