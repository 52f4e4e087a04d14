"""A run that is killed between two clients, and what must be the same in the end."""

import json

from fedkern.engine import Listener
from fedkern.engine.records import read_metrics


class Cut(Listener):
    def __init__(self, left):
        self.left = left

    def on_client(self, *_):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def outcome(out):
    summary = json.loads((out / "summary.json").read_text())
    drop = ("seconds", "round_seconds", "phases")
    records = [{k: v for k, v in record.items() if k not in drop} for record in read_metrics(out)]
    return (out / "model.safetensors").read_bytes(), records, {k: v for k, v in summary.items() if k not in drop}
