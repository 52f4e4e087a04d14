"""Differential privacy of a run: its guarantee, and figures from the clients' ledgers."""

from collections.abc import Callable

from fedkern.methods.base import Method
from fedkern.methods.protocol import Message
from fedkern.methods.roles import Server
from fedkern.privacy import LEDGER, Accountant, Guarantee


def guarantee(method: Method, server: Server, records: str | None) -> Guarantee | None:
    """Return the method's guarantee or None, with the records as a further release unless ``--records private``."""
    result = method.guarantee(server)
    return result if result is None or records == "private" else result.with_records()


def privacy_figures(bound: Guarantee | None, state_of: Callable[[int], Message], clients: int) -> dict[str, object]:
    """Return the ``privacy`` entry of summary.json, empty without a guarantee.

    Returns:
        These entries:

        * ``epsilon``: the largest of any client; infinite if a release had no noise.
        * ``delta``.
        * ``unit``: what neighbours differ in, ``"image"``, or ``"patient"`` with at most ``patient_images``.
        * ``covers``, ``leaves_uncovered``: names of the releases.
        * ``channels``: the largest epsilon of each mechanism, alone at the whole delta.
        * ``clients``: every client's ``epsilon`` and ``channels``.
        * ``statement``: one sentence on what the figure covers and what not.

        With an uncovered release, both ``epsilon`` are called ``epsilon_covered``.
    """
    if bound is None:
        return {}
    figures = {str(k): Accountant(state_of(k).get(LEDGER)).figure(bound.delta) for k in range(clients)}
    channels: dict[str, float] = {}
    for figure in figures.values():
        for name, value in figure.channels.items():
            channels[name] = max(value, channels.get(name, 0.0))
    epsilon = max(figure.epsilon for figure in figures.values())
    return {
        bound.figure: epsilon,
        "delta": bound.delta,
        "unit": bound.unit.name,
        **({"patient_images": bound.unit.images} if bound.unit.name == "patient" else {}),
        **bound.to_dict(),
        "channels": channels,
        "clients": {k: {bound.figure: f.epsilon, "channels": dict(f.channels)} for k, f in figures.items()},
        "statement": bound.statement(epsilon),
    }
