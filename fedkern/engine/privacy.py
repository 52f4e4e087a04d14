"""The differential privacy of a run, from the ledgers that its clients kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedkern.methods.base import Method, Server
from fedkern.privacy import LEDGER, Accountant


def privacy_figures(
    method: Method, server: Server, state_of: Callable[[int], Mapping[str, Any]], clients: int
) -> dict[str, Any]:
    """What summary.json says under ``privacy``; empty where the method gives none.

    Args:
        state_of: a client's state, by its id.
        clients: how many there are.

    Returns:
        ``epsilon`` (the largest of any client; infinite where a release had no noise), ``delta``, ``unit`` (what one
        neighbour differs in: ``"image"`` or ``"patient"``, with at most ``patient_images``), ``channels`` (the largest
        epsilon of each, alone at the whole delta), ``clients`` (every client's ``epsilon`` and ``channels``)
        and ``statement``, one sentence on what the figure covers and what not.

    Raises:
        UserError: dp-accounting is not installed.
    """
    said = method.guarantee(server)
    if said is None:
        return {}
    figures = {str(k): Accountant(state_of(k).get(LEDGER)).figure(said.delta) for k in range(clients)}
    channels: dict[str, float] = {}
    for figure in figures.values():
        for name, value in figure.channels.items():
            channels[name] = max(value, channels.get(name, 0.0))
    epsilon = max(figure.epsilon for figure in figures.values())
    return {
        "epsilon": epsilon,
        "delta": said.delta,
        "unit": said.unit.name,
        **({"patient_images": said.unit.images} if said.unit.name == "patient" else {}),
        "channels": channels,
        "clients": {k: {"epsilon": f.epsilon, "channels": dict(f.channels)} for k, f in figures.items()},
        "statement": said.statement(epsilon),
    }
