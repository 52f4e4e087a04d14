"""Picture of a run with client weights: every client's weight and held-out loss over the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from fedkern.report.figures.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    Points,
    add_point,
    entitle,
    frame,
    from_zero,
    legend_below,
    new_figure,
    over_rounds,
)
from fedkern.report.names import entry

COLOURS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#F0E442", "#000000")
NAMED = len(COLOURS)
"""Most clients that each get a colour; with more clients, only the one with the largest final weight gets one."""
FAINT = 200
"""Most clients without a colour that are drawn, evenly spaced by number."""
PANELS = {"weight": "client weight", "own_loss": "loss on held-out samples"}


def weights_picture(
    records: Sequence[Mapping[str, Any]], *, title: str = "", by_samples: bool = False
) -> Figure | None:
    """Draws the client weights of each round above the clients' losses; None if there was nothing to draw.

    Dotted lines are the initial weights: the clients' shares of the samples if ``by_samples``, otherwise equal.
    The ``clients`` of a record hold ``weight``, ``own_loss``, ``samples`` and, where clients have names, ``name``.
    """
    curves: dict[str, dict[str, Points]] = {name: {} for name in PANELS}
    for record in records:
        for client, info in record.get("clients", {}).items():
            for name, panel in curves.items():
                if isinstance(info.get(name), (int, float)):
                    add_point(panel, client, record["round"], info[name])
    shown = {name: panel for name, panel in curves.items() if panel}
    if "weight" not in shown:
        return None
    clients = sorted(shown["weight"], key=int)
    took_part = [pair for record in records for pair in record.get("clients", {}).items()]
    names = {client: str(info.get("name", f"client {client}")) for client, info in took_part}
    heaviest = max(clients, key=lambda client: shown["weight"][client][1][-1])
    centres = _shares(records) if by_samples else {}
    drawn = clients
    if len(clients) > NAMED + FAINT:
        drawn = sorted({heaviest, *(clients[i * len(clients) // FAINT] for i in range(FAINT))}, key=int)
        title = f"{title}: {len(drawn)} of {len(clients):,}"
    figure = new_figure(7.2, 2.4 + 2.2 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, panel) in zip(panels, shown.items(), strict=True):
        for i, client in enumerate(drawn):
            if client not in panel:
                continue
            named = len(clients) <= NAMED or client == heaviest
            colour = (COLOURS[i] if len(clients) <= NAMED else ORANGE) if named else GREY
            text = entry(names[client]) if named else None
            width, alpha = (2.0, 1.0) if named else (0.7, 0.4)
            axes.plot(
                *panel[client], color=colour, lw=width, alpha=alpha, label=text, marker="o" if named else "", ms=4,
                zorder=2.5 if named else 2,
            )  # fmt: skip
            if name == "weight" and by_samples and named:
                axes.axhline(centres[client], color=colour, lw=1, ls=":")
        if name == "weight" and not by_samples:
            axes.axhline(1 / len(clients), color=GREY, lw=1.5, ls=":", label="equal weights")
        elif name == "weight":
            axes.plot([], [], color=GREY, lw=1, ls=":", label="share of the samples")
        axes.set_ylabel(PANELS[name], fontsize=12)
        from_zero(axes, name == "weight")
        frame(axes)
    entitle(figure, title)
    over_rounds(panels[-1])
    legend_below(figure)
    return figure


def _shares(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Every client's share of all samples, including the samples of clients that never took part.

    In the first record the weights still are these shares, so samples over weights gives the sum of all samples.
    """
    known = [{k: info for k, info in r.get("clients", {}).items() if "weight" in info} for r in records]
    first = next(clients for clients in known if clients)
    total = sum(info["samples"] for info in first.values()) / sum(info["weight"] for info in first.values())
    return {client: info["samples"] / total for clients in known for client, info in clients.items()}
