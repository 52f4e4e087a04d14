"""A model as one flat vector in a Flower message, for clients and servers that both use fedkern."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from fedkern.errors import UserError
from fedkern.flower import adapter
from fedkern.flower.array_bytes import FLOATS, Misfit, dtype_name
from fedkern.flower.model_layout import Layout, Model

__all__ = ["pack", "unpack"]


def pack(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> adapter.ArrayRecord:
    """Write a state dict as one vector of all floating entries, and an array for every other entry.

    Args:
        state: tensors by name, on any device, as ``module.state_dict()`` returns them.
        dtype: float32, float64, float16 or bfloat16, to which the vector is rounded. None: the widest dtype of the
            floating entries.

    Returns:
        A record that `fedkern.flower.strategies` and :func:`unpack` read.

    Raises:
        UserError: an entry is not a tensor of real numbers, or ``dtype`` is another one.
    """
    dtypes = tuple(FLOATS.values())
    if dtype is not None and dtype not in dtypes:
        raise UserError(f"pack: dtype must be float32, float64, bfloat16 or float16, not {dtype}.")
    forms = []
    for key, value in state.items():
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.is_complex() or (value.is_floating_point() and value.dtype not in dtypes):
            kind = value.dtype if is_tensor else type(value).__name__
            raise UserError(f"pack: {key!r} must be a tensor of real numbers, not {kind}.")
        forms.append((key, tuple(value.shape), str(value.dtype).removeprefix("torch.")))
    layout = Layout(forms)
    layout.flat = dtype_name(dtype or layout.dtype)
    parts = [state[entry.key].detach().cpu().reshape(-1).to(FLOATS[layout.flat]) for entry in layout.floating]
    vector = torch.cat(parts) if parts else torch.empty(0, dtype=FLOATS[layout.flat])
    integer_arrays = {entry.key: state[entry.key].detach().cpu().numpy() for entry in layout.integers}
    return adapter.make_record(layout, vector, integer_arrays)


def unpack(record: adapter.ArrayRecord) -> OrderedDict[str, Tensor]:
    """Read a record as a state dict, flat or plain, with every entry in its own dtype.

    Args:
        record: what :func:`pack` returned, or any ``ArrayRecord``.

    Returns:
        Tensors by name, on the CPU, which share no memory with the record.

    Raises:
        UserError: the record's arrays cannot be read.
    """
    try:
        layout = Layout.of(record)
        model = Model(record, layout)
    except Misfit as misfit:
        raise UserError(f"unpack: the record {misfit}.") from None
    state: OrderedDict[str, Tensor] = OrderedDict()
    for entry in layout.entries:
        if entry.floating:
            state[entry.key] = model.entry(entry).to(FLOATS[entry.dtype], copy=True).reshape(entry.shape)
        else:
            state[entry.key] = torch.from_numpy(model.integers[entry.key].copy())
    return state
