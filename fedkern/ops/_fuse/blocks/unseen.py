"""FusedBlocks: refusal of what a trace of a block cannot see."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

from fedkern.ops.flat import separate_storages

# Methods of nn.Module that a class may replace, and that FusedBlocks would not call.
_METHODS = ("__call__", "train", "state_dict", "_save_to_state_dict", "get_extra_state")
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
# Hooks for all modules of the process, by the dictionaries in which torch keeps them.
_GLOBAL = {
    "_global_forward_pre_hooks": "register_module_forward_pre_hook",
    "_global_forward_hooks": "register_module_forward_hook",
    "_global_backward_pre_hooks": "register_module_full_backward_pre_hook",
    "_global_backward_hooks": "register_module_full_backward_hook",
}


def check_process() -> None:
    """Raises TypeError if the process has hooks for all modules: the blocks' layers would not be called with them."""
    for name, made_by in _GLOBAL.items():
        for hook in getattr(torch_module, name, {}).values():
            # Torch's own only watch: FlopCounterMode notes which module runs.
            if not str(getattr(hook, "__module__", "")).startswith("torch."):
                raise TypeError(
                    f"FusedBlocks does not support the hook {getattr(hook, '__qualname__', hook)} of torch.nn.modules."
                    f"module.{made_by}, which it would not call for the layers of its blocks; remove the hook, or use "
                    "the blocks themselves"
                )


def check_plain(module: nn.Module, where: str, *, layer: bool) -> None:
    """Raises TypeError if ``module``, which messages call ``where``, has hooks or methods that would not be called.

    ``layer``: whether the module is one of the supported layers, whose methods are all torch's.
    """
    kind = type(module)
    hooks = [
        name.strip("_").replace("_", " ")
        for name, value in vars(module).items()
        if name.endswith("_hooks") and any(hook is not separate_storages for hook in value.values())
    ]
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            hooks.append(f"hooks of {key}")
    if hooks:
        raise TypeError(
            f"FusedBlocks does not support {where}, a {kind.__name__} with {' and '.join(hooks)}, which it would not "
            "call; remove hooks, pruning and weight norms first"
        )
    replaced = [name for name in _METHODS if getattr(kind, name) is not getattr(nn.Module, name)]
    mine = [name for name, member in vars(module).items() if not getattr(member, "as_written", False)]
    replaced += [n for n in mine if callable(getattr(kind, n, None)) and (layer or hasattr(nn.Module, n))]
    if replaced:
        raise TypeError(
            f"FusedBlocks does not support {where}, a {kind.__name__} with {replaced[0]}() of its own, which it would "
            "not call"
        )


def check_tied(block: nn.Module, what: str) -> None:
    """Raises TypeError if a tensor of ``block`` has two names: the fused module would hold two tensors."""
    names: dict[int, str] = {}
    for tensors in (block.named_parameters, block.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            first = names.setdefault(id(tensor), name)
            if first != name:
                raise TypeError(f"FusedBlocks does not support {what}.{name}, which is {what}.{first} as well")


def check_tensors(layer: nn.Module, where: str) -> None:
    """Raises TypeError unless a supported layer has the tensors that its class has, in the shapes of its settings."""
    kind, tensors = type(layer).__name__, layer._parameters | layer._buffers
    shapes, needed = _tensors_of(layer)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name not in shapes or name in layer._non_persistent_buffers_set:
            odd = "outside of its state dict" if name in shapes else "that it does not read"
            raise TypeError(f"FusedBlocks does not support {where}, a {kind} with a tensor {name!r} {odd}")
        if tensor.shape != shapes[name]:
            raise TypeError(
                f"FusedBlocks does not support {where}, a {kind} whose {name!r} has shape {list(tensor.shape)}, not "
                f"{list(shapes[name])} as its settings say"
            )
    for name in shapes:
        if name not in tensors or (tensors[name] is None and name in needed):
            raise TypeError(f"FusedBlocks does not support {where}, a {kind} without a parameter or buffer {name!r}")


def _tensors_of(layer: nn.Module) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Shapes of a layer's tensors by name, and the names of those that may not be None."""
    if isinstance(layer, nn.Conv2d):
        rows = (layer.out_channels,)
        return {"weight": (*rows, layer.in_channels // layer.groups, *layer.kernel_size), "bias": rows}, ("weight",)
    if isinstance(layer, nn.Linear):
        return {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}, ("weight",)
    if isinstance(layer, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (layer.num_channels,)), ()
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        running = _RUNNING if layer.track_running_stats else ()
        shapes = dict.fromkeys(("weight", "bias", *running), (layer.num_features,))
        return {name: () if name == "num_batches_tracked" else shape for name, shape in shapes.items()}, running
    return {}, ()
