"""Python attributes and hooks of user-defined networks, passed from client to client within a process."""

import functools
import io
import pickle
import sys

import torch
from torch import Tensor, nn

from fedkern.usercode.code_identity import digest, identity_table

_SHIPPED = {"fedkern", "torch", *sys.stdlib_module_names} - {"__main__"}
_ENGINES = {*vars(nn.Module()), "track_running_stats"}
"""Attributes that PyTorch and the engine change, not the user."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SMALL = 1 << 20
"""Most elements of a tensor that is compared by values instead of memory address and version."""


class _Pickler(pickle.Pickler):
    """Pickler without modules and parameters, which have hashes of their own."""

    def persistent_id(self, value: object) -> object:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if value.numel() > SMALL:
                return value.data_ptr(), value._version
            return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return "" if isinstance(value, (Tensor, nn.Module)) else None


def hash_attributes(network: nn.Module) -> dict[str, int]:
    """Return hashes of the attributes of modules and their classes beyond those of ``nn.Module``, by dotted name.

    In a user-defined network the attributes of PyTorch's layers count too, such as a dropout's ``p``, and hooks; of all
    user-defined classes also the values that their code names.  fedkern's own layers, cached properties and tensors of
    a graph do not.
    """
    kinds = dict.fromkeys(map(type, network.modules()))
    # Values that the code of the classes names.
    code = identity_table({"classes": [*kinds]}, weights=False, limit=1 << 14, local=True)
    hashes = {path: hash(text) for path, text in code.items() if path.count(".") > 1}  # members are fields, see below
    user_defined = getattr(network, "own", False) is True or type(network).__module__.partition(".")[0] != "fedkern"
    for path, module in network.named_modules():
        counts = user_defined and type(module).__module__.partition(".")[0] != "fedkern"
        of_module = hash_fields(module, shipped=counts)
        for name in HOOKS if counts else ():
            hooks = getattr(module, name).values()
            of_user = [hook for hook in hooks if getattr(hook, "__module__", "").partition(".")[0] not in _SHIPPED]
            of_code = digest(identity_table({"hooks": of_user}, weights=False, local=True)) if of_user else ""
            of_module[name] = hash((len(hooks), of_code))
        hashes |= {f"{path}.{name}".removeprefix("module.").removeprefix("."): x for name, x in of_module.items()}
    return hashes


def hash_fields(thing: object, *, shipped: bool = False) -> dict[str, int]:
    """Return hashes of the attributes of a user-defined (or ``shipped``) object and its class."""
    kinds = [kind for kind in type(thing).__mro__ if kind.__module__.partition(".")[0] not in _SHIPPED]
    of_classes = {name: value for kind in reversed(kinds) for name, value in vars(kind).items()}
    hashes: dict[str, int] = {}
    for name, value in {**of_classes, **vars(thing)}.items() if kinds or shipped else ():
        if name in _ENGINES or name.startswith("__") or isinstance(of_classes.get(name), functools.cached_property):
            continue
        if isinstance(value, dict):
            value = {key: entry for key, entry in value.items() if getattr(entry, "grad_fn", None) is None}
        elif getattr(value, "grad_fn", None) is not None:  # a leftover of the last pass
            continue
        try:
            with io.BytesIO() as file:
                _Pickler(file).dump(value)
                hashes[name] = hash(file.getvalue())
        except Exception:  # a value may be anything
            hashes[name] = hash(digest(identity_table({name: value}, weights=False, code=False, local=True)))
    return hashes
