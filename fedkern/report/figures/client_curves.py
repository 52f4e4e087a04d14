"""Curves of single clients: what records tell of each, and the picture of the clients' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from fedkern.report.figures.curves import Curve, Panel, Points, by_name, look, over_clock, thin_curves
from fedkern.report.figures.plots import GREY, ORANGE

CLIENTS = 12
"""Most clients that have a curve each; of more clients the lowest, the middle and the highest value are drawn."""
SPREAD: Mapping[str, Callable[[list[float]], float]] = {"highest": max, "middle": median, "lowest": min}
WEIGHTS = {"weight": "client weight", "own_loss": "loss on held-out samples"}


def client_curves(records: Sequence[Mapping[str, Any]], key: str) -> list[Curve]:
    """A figure's curve for every client by its number, or for many clients of the highest, middle and lowest one."""
    points = _points(records, key)
    if len(points) <= CLIENTS:
        names = _names(records)
        return [Curve(names[k], *points[k]) for k in sorted(points, key=int)]
    values: dict[int, list[float]] = {}
    for rounds, curve in points.values():
        for at, value in zip(rounds, curve, strict=True):
            values.setdefault(at, []).append(value)
    every = sorted(values)
    return [Curve(name, every, [pick(values[at]) for at in every]) for name, pick in SPREAD.items()]


def weight_panels(records: Sequence[Mapping[str, Any]], *, by_samples: bool = False) -> list[Panel]:
    """Every client's weight, and its loss on held-out samples, over the rounds; none without weights.

    Dotted lines are the initial weights: the clients' shares of the samples if ``by_samples``, otherwise equal.  Of
    more than `CLIENTS` clients only the one with the largest final weight has a curve that stands out.
    The ``clients`` of a record hold ``weight``, ``own_loss``, ``samples`` and, where clients have names, ``name``.
    """
    weights = _points(records, "weight")
    if not weights:
        return []
    clients = sorted(weights, key=int)
    heaviest = max(clients, key=lambda client: weights[client][1][-1])
    few = len(clients) <= CLIENTS
    looks = {k: look(number) for number, k in enumerate(clients)} if few else {heaviest: (ORANGE, "-", "o")}
    names, panels = _names(records), []
    for key, axis in WEIGHTS.items():
        points = _points(records, key)
        curves = [] if few else thin_curves({k: points[k] for k in clients if k in points})
        curves += [Curve(names[k], *points[k], looks[k]) for k in looks if k in points]
        levels, name = {}, ""
        if key == "weight" and by_samples:
            shares = _shares(records)
            levels = {shares[k]: colour for k, (colour, _, _) in looks.items()}
            curves.append(Curve("share of the samples", [], [], (GREY, ":", "")))  # the name of all these lines
        elif key == "weight":
            levels, name = {1 / len(clients): GREY}, "equal weights"
        summary = [] if few else client_curves(records, key)
        if points:
            panels.append(Panel(axis, curves, "", key == "weight", False, levels, name, summary))
    return over_clock(records, panels)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, Points]:
    return by_name((k, r["round"], info.get(key)) for r in records for k, info in r.get("clients", {}).items())


def _names(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    names = {k: info.get("name") for r in records for k, info in r.get("clients", {}).items()}
    return {k: f"client {k}" if name is None else str(name) for k, name in names.items()}


def _shares(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Every client's share of all samples, including the samples of clients that never took part.

    In the first record the weights still are these shares, so samples over weights gives the sum of all samples.
    """
    weighted = [{k: info for k, info in r.get("clients", {}).items() if "weight" in info} for r in records]
    first = next(clients for clients in weighted if clients)
    total = sum(info["samples"] for info in first.values()) / sum(info["weight"] for info in first.values())
    return {client: info["samples"] / total for clients in weighted for client, info in clients.items()}
