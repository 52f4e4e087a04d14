"""Bytes of messages, by client and phase."""

import torch

from fedkern.engine.rounds.ledger import Ledger, message_bytes
from fedkern.methods.base import Phase


def test_ledger_counts_tensors_numbers_and_texts():
    message = {
        "a": torch.zeros(5),
        "b": {"c": torch.zeros(3, dtype=torch.float16), "n": 2},
        "t": "äb",
        "l": [1.0, None],
    }
    assert message_bytes(message) == 20 + 6 + 8 + 3 + 8
    ledger = Ledger(2)
    ledger.book(0, "up", message, phase=Phase(0, "level1", "update"))
    ledger.book(1, "down", message, phase=Phase(1, "level2", "update"))
    ledger.book(1, "down", message)
    summary = ledger.summary()
    assert (summary["up"], summary["down"], summary["one_off_down"], summary["total"]) == (45, 45, 45, 135)
    assert summary["clients"]["1"] == {"up": 0, "down": 45, "one_off_up": 0, "one_off_down": 45}


def test_ledger_tells_what_has_changed():
    ledger, rows = Ledger(1000), {}
    for number in range(1, 30):
        phase = Phase(number, "train", "update")
        ledger.book(number % 7, "up", 1.0, phase=phase)
        ledger.book(900, "down", "abc")
        changed = ledger.changed_rows()
        assert list(changed) == [number % 7, 900]
        rows |= changed
    assert (ledger.total_up, ledger.total_down) == (29 * 8, 0)
    again = Ledger(1000)
    again.restore(ledger.sums(), rows)
    assert again == ledger
    assert again.summary() == ledger.summary()
    assert again.changed_rows() == {}
