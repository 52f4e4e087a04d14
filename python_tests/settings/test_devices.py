"""Devices of clients: their file, and which client has which."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fedkern.errors import UserError
from fedkern.settings.config import RunConfig
from fedkern.settings.devices import HOUR, Device, assign_devices, read_devices

EXAMPLE = Path(__file__).parents[2] / "examples" / "phones.toml"


def test_clients_without_a_device_of_their_own_get_one_by_the_shares():
    text = read_devices(str(EXAMPLE))
    assert read_devices(text) == text
    assert RunConfig.make("fedavg", devices=EXAMPLE).devices == text
    names = [device.name for device in assign_devices(text, 11, seed=0)]
    assert Counter(names[1:]) == {"phone on Wi-Fi": 4, "old phone on mobile data": 6}
    assert names[0] == "tablet of client 0"
    assert [device.name for device in assign_devices(text, 11, seed=1)] != names


def test_seconds_of_a_device():
    device = Device("a", step_seconds=0.5, speed=4, up=1, down=8, hours=(0, 5))
    assert device.seconds_of_training(12) == 1.5
    assert device.seconds_of_transfer(down=1_000_000, up=250_000) == 3
    assert Device("fast").seconds_of_transfer(1, 1) == 0
    waits = {0: 0, HOUR - 1: 0, HOUR: 4 * HOUR, 6 * HOUR: 18 * HOUR, 23.5 * HOUR: HOUR / 2, 29 * HOUR: 0}
    assert {start: device.seconds_of_wait(start) for start in waits} == waits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed =", "is not a valid TOML file"),
        ("name = ''", r"Each \[\[device\]\] of .* needs a name"),
        ("name = 'a'\n[phone]", r"must hold \[\[device\]\] tables, not phone"),
        ("name = 'a'\nspeeds = 2", 'Unknown key "speeds" of device "a" in .*Did you mean "speed"'),
        ("name = 'a'\nup = -1", 'up of device "a" in .* must be above 0, not -1'),
        ("name = 'a'\nstep_seconds = true", "step_seconds of device .* must be a number"),
        ("name = 'a'\nhours = []", r"hours of device .* must be a list of hours from 0 to 23, at least one, not \[\]"),
        ("name = 'a'\nhours = [24]", "must be a list of hours from 0 to 23"),
        ("name = 'a'\nclients = 3", "clients of device .* must be a list of client numbers from 0 on, not 3"),
        ("name = 'a'\nspeed = 2", 'step_seconds of device "a" in .* is missing'),
    ],
)
def test_a_wrong_file_is_refused(text, message, tmp_path):
    path = tmp_path / "phones.toml"
    path.write_text(f"[[device]]\n{text}")
    with pytest.raises(UserError, match=message):
        RunConfig.make("fedavg", devices=path)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([[0, 1]], r"--devices has no device for client 2: name the client"),
        ([[0, 1], [1, 2]], 'device "1" names client 1, as does "0"'),
        ([[0, 1, 2, 3]], 'device "0" names client 3, and the run has 3'),
    ],
)
def test_every_client_has_one_device(clients, message):
    text = json.dumps([{"name": str(number), "clients": row} for number, row in enumerate(clients)])
    with pytest.raises(UserError, match=message):
        assign_devices(text, 3, 0)
