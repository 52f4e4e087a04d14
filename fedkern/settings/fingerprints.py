"""Fingerprints of the data, files and code that settings name, stored among the settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from fedkern.settings.section import Section


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
