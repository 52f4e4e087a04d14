"""Devices of the clients (``--devices FILE.toml``): compute, links and hours, from which simulated seconds follow."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedkern.errors import UserError, format_value, suggest_name
from fedkern.files.filesystem import read_text, report_unreadable
from fedkern.settings.section import Values
from fedkern.streams import stream
from fedkern.typed_option import Option, OptionTable, option

HOUR, HOURS = 3600, range(24)
MEGABIT = 125_000
"""Bytes of a megabit."""


@dataclass(frozen=True)
class Device(OptionTable):
    """Device of one or more clients.

    Attributes:
        clients: ids of its clients. None: it serves clients that no device names.
        hours: hours of the day in which it can begin a round. The simulation begins at midnight.
    """

    label = "{}"

    name: str = ""
    step_seconds: float = option(1.0, "seconds of a local step at speed 1", above=0)
    speed: float = option(1.0, "divides step_seconds", above=0)
    up: float = option(math.inf, "Mbit/s to the server", above=0, infinite=True)
    down: float = option(math.inf, "Mbit/s from the server", above=0, infinite=True)
    share: float = option(1.0, "share, relative to other devices, of the clients that no device names", above=0)
    clients: Sequence[int] | None = None
    hours: Sequence[int] = HOURS

    def seconds_of_training(self, steps: int) -> float:
        return steps * self.step_seconds / self.speed

    def seconds_of_transfer(self, down: int, up: int) -> float:
        """Return the seconds of a message of ``down`` bytes and an upload of ``up`` bytes."""
        return down / (self.down * MEGABIT) + up / (self.up * MEGABIT)

    def seconds_of_wait(self, start: float) -> float:
        """Return the seconds from ``start`` until the device is available."""
        hour = int(start // HOUR)
        ahead = next(number for number in HOURS if (hour + number) % len(HOURS) in self.hours)
        return (hour + ahead) * HOUR - start if ahead else 0.0


def read_devices(text: str) -> str:
    """Return the devices in a TOML file as JSON, which a run stores, or the stored JSON itself.

    Raises:
        UserError: the file cannot be read, or a device is wrong.
    """
    if text.startswith("["):
        return text
    try:
        with report_unreadable(text):
            table = tomllib.loads(read_text(text, "utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--devices {text} is not a valid TOML file: {error}.") from None
    devices = table.pop("device", None)
    if table or not isinstance(devices, list) or not devices:
        extra = f", not {next(iter(table))}" if table else ""
        raise UserError(f"--devices {text} must hold [[device]] tables{extra}.")
    return json.dumps([_read_device(entry, text) for entry in devices])


def _read_device(table: object, path: str) -> Values:
    """Return the arguments of a :class:`Device`."""
    if not isinstance(table, Mapping) or not isinstance(name := table.get("name"), str) or not name:
        raise UserError(f'Each [[device]] of {path} needs a name, such as name = "phone".')
    where = f'of device "{name}" in {path}'
    options: dict[str, Option] = {entry.name: entry for entry in Device.list_options()}
    values: Values = {"name": name}
    for key, value in table.items():
        if key in options:
            values[key] = replace(options[key], label=f"{key} {where}").convert(value)
        elif key in ("clients", "hours"):
            values[key] = _read_numbers(value, f"{key} {where}", HOURS[-1] if key == "hours" else None)
        elif key != "name":
            raise UserError(f'Unknown key "{key}" {where}.{suggest_name(key, [*options, "clients", "hours"])}')
    if "step_seconds" not in values:
        raise UserError(f"step_seconds {where} is missing: give the seconds of a local step.")
    return values


def _read_numbers(value: object, label: str, high: int | None) -> list[int]:
    numbers = value if isinstance(value, list) else []
    if not numbers or any(type(entry) is not int or not 0 <= entry <= (high or entry) for entry in numbers):
        kind = "of client numbers from 0 on" if high is None else f"of hours from 0 to {high}, at least one"
        raise UserError(f"{label} must be a list {kind}, not {format_value(value)}.")
    return numbers


def assign_devices(text: str, clients: int, seed: int) -> list[Device]:
    """Return the device of every client.

    Clients that no device names are shared out by ``share`` in an order of the seed.

    Args:
        text: result of :func:`read_devices`.
        clients: number of clients.

    Raises:
        UserError: a client has no device or two, or does not exist.
    """
    devices = [Device(**entry) for entry in json.loads(text)]
    named: dict[int, Device] = {}
    for device in devices:
        for k in device.clients or ():
            if k in named or k >= clients:
                fault = f'as does "{named[k].name}"' if k in named else f"and the run has {clients}"
                raise UserError(f'--devices: device "{device.name}" names client {k}, {fault}: correct its clients.')
            named[k] = device
    unnamed = [k for k in range(clients) if k not in named]
    shared = [device for device in devices if device.clients is None]
    if unnamed and not shared:
        raise UserError(
            f"--devices has no device for client {unnamed[0]}: name the client in the clients of a device, or add a "
            "device without clients, which serves all others."
        )
    ends = np.cumsum([device.share for device in shared])
    for place, index in enumerate(stream(seed, "devices", round=-1).permutation(len(unnamed))):
        named[unnamed[index]] = shared[int(np.searchsorted(ends, (place + 0.5) / len(unnamed) * ends[-1]))]
    return [named[k] for k in range(clients)]
