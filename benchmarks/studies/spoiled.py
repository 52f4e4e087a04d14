"""``python -m fedkern.run`` with a client whose uploads cannot be used, to see what the others make without it.

    python -m benchmarks.studies.spoiled KIND ROUND METHOD [flags of fedkern.run]

KIND is ``nan`` (every floating-point tensor of the upload becomes NaN) or ``shape`` (its first tensor of two rows or
more loses one), ROUND the name of the round whose upload client 0 spoils, for example ``train`` or ``level1``.  With
``--on-nan skip`` the server leaves the upload out and says so; ``--resume DIR`` instead of METHOD spoils it again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedkern.methods import METHODS
from fedkern.run import USAGE, main

CLIENT = 0


def _nan(message: Any) -> Any:
    if isinstance(message, Mapping):
        return {name: _nan(value) for name, value in message.items()}
    return message * torch.nan if isinstance(message, Tensor) and message.is_floating_point() else message


def _shape(message: Any) -> Any:
    """The message whose first tensor of at least two rows has lost one."""
    if isinstance(message, Tensor):
        return message[1:] if message.dim() and len(message) > 1 else message
    if isinstance(message, Mapping):
        for name, value in message.items():
            cut = _shape(value)
            if cut is not value:
                return {**message, name: cut}
    return message


KINDS: Mapping[str, Callable[[Any], Any]] = {"nan": _nan, "shape": _shape}


def spoil(kind: str, round_name: str) -> None:
    """Makes client 0 of every registered method spoil what it uploads in the rounds named ``round_name``."""
    change = KINDS[kind]
    for name, method in list(METHODS.items()):

        def client_update(self: Any, client: Any, asked: Any, message: Any, of: Any = method) -> Any:
            upload = of.client_update(self, client, asked, message)
            return change(upload) if client.id == CLIENT and asked.name == round_name else upload

        METHODS[name] = type(method.__name__, (method,), {"client_update": client_update, "__doc__": method.__doc__})


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in KINDS:
        words = f"{{{','.join(KINDS)}}} ROUND METHOD [flags]"
        print(f"usage: python -m benchmarks.studies.spoiled {words}", file=sys.stderr)
        sys.exit(USAGE)
    spoil(sys.argv[1], sys.argv[2])
    sys.exit(main(sys.argv[3:]))
