"""Division of a user-defined network into its classifier and the stages that run one after another.

A cut counts only if the network and its pieces give the same logits on random images, in eval and in train mode.
Parameters are moved a little first: a classifier or a residual block that starts at zero would hide missing pieces.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedkern.errors import UserError, suggest_name

FLATTEN = ""
"""Name of a piece that flattens maps to features, as networks do in ``forward`` before a linear layer."""


@dataclass(frozen=True)
class Cut:
    """Stages and classifier of a divided network.

    Attributes:
        stages: stages in order, each with the names of its submodules (or ``FLATTEN``); the last is ``"feature"``, the
            classifier's input ``[B, d]``.
        head: name of the classifier.
        maps: number of leading stages with a map ``[B, C, H, W]`` as result.
        changed: stages with results that a later submodule changes in place (an in-place ReLU).
    """

    stages: tuple[tuple[str, tuple[str, ...]], ...]
    head: str
    maps: int
    changed: frozenset[str] = frozenset()


class NotCut(Exception):
    """Error for a network that cannot be cut, with the reason as a part of a sentence."""


def find_logits(output: object) -> Any:
    """Return the logits in a network's output: the tensor, or the entry ``logits``."""
    if isinstance(output, (Tensor, fx.Proxy)):
        return output
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def find_head(module: nn.Module, images: Tensor) -> str | None:
    trial = move_weights(module)
    trial.eval()  # a user-defined eval() may return None
    calls: dict[str, list[Tensor]] = {}
    for name, layer in trial.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            layer.register_forward_hook(lambda _, __, output, name=name: calls.setdefault(name, []).append(output))
    with torch.no_grad():
        logits = find_logits(trial(images.clone()))
    heads = [name for name, found in calls.items() if len(found) == 1 and found[0] is logits and logits.dim() == 2]
    return heads[0] if heads else None


def find_cut(module: nn.Module, images: Tensor, declared: object = None) -> Cut:
    """Return the cut of a network, tried on ``images`` ``[B, C, H, W]`` with B of at least 2.

    Args:
        declared: the network's attribute ``stages``: names of stages, each with the submodule that ends the stage, or a
            list of submodules.  None: a stage for every child of the network that has parameters.

    Raises:
        NotCut: the pieces do not give the network's logits.
    """
    paths = _read_stages(declared)
    names = _pieces(module, set(paths.values()))
    if not names:
        raise NotCut("it has no submodules")
    _check_shared(module, names)
    while True:
        names_used, shapes, changed = _try_pieces(module, names, images)
        pieces, head = names_used[:-1], names_used[-1]
        stages = _divide_declared(paths, pieces, module) if paths else _divide_automatically(module, pieces, shapes)
        finer = _open_sequentials(module, names)
        if paths or len(stages) > 1 or finer == names:
            break
        names = finer
    ends = [sum(len(inside) for _, inside in stages[: i + 1]) for i in range(len(stages))]
    maps = next((i for i, end in enumerate(ends) if len(shapes[end - 1]) != 4), len(ends))
    inputs = frozenset(stage for (stage, _), end in zip(stages, ends, strict=True) if end - 1 in changed)
    return Cut((*stages, ("feature", tuple(pieces[ends[-1] :]))), head, maps, inputs)


def _read_stages(declared: object) -> dict[str, str]:
    paths: dict[str, Any] = {}
    if declared is None:
        return paths
    if isinstance(declared, Mapping):
        paths = {str(name): path for name, path in declared.items()}
    elif isinstance(declared, Sequence) and not isinstance(declared, str):
        paths = {str(path): path for path in declared}
    if not paths or not all(isinstance(path, str) and path for path in paths.values()) or "feature" in paths:
        raise UserError(
            "the network's attribute stages must name submodules, {'layer1': 'backbone.1', ...} or ['stem', ...], "
            f"without a stage called feature, and is {declared!r}."
        )
    return paths


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the submodules in order, with repeated ones such as an activation."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _pieces(module: nn.Module, opened: set[str], prefix: str = "") -> list[str]:
    """List the submodules in order, and open those in ``opened``, a single child and a last Sequential."""
    names: list[str] = []
    children = _children(module)
    for name, child in children:
        full_name, nested = prefix + name, _children(child)
        last = name == children[-1][0] and isinstance(child, nn.Sequential)
        inside = any(path.startswith(full_name + ".") for path in opened)
        if nested and (inside or last or len(children) == 1):
            names += _pieces(child, opened, full_name + ".")
        else:
            names.append(full_name)
    return names


def _open_sequentials(module: nn.Module, names: Sequence[str]) -> list[str]:
    opened: list[str] = []
    for name in names:
        child = module.get_submodule(name)
        inner = [f"{name}.{part}" for part, _ in _children(child)] if isinstance(child, nn.Sequential) else []
        opened += inner or [name]
    return opened


def _begins(layer: nn.Module) -> bool:
    """Return whether a stage can begin with this layer: it has parameters and is no norm."""
    norm = isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
    return any(True for _ in layer.parameters()) and not norm


def _check_shared(module: nn.Module, names: Sequence[str]) -> None:
    owners: dict[int, str] = {}
    inside = 0
    for name in names:
        parameters = {id(parameter) for parameter in module.get_submodule(name).parameters()}
        inside += len(parameters)
        for parameter in parameters:
            if owners.setdefault(parameter, name) != name:
                raise NotCut(f"{owners[parameter]} and {name} share parameters")
    if inside != sum(1 for _ in module.parameters()):
        raise NotCut("it has parameters outside of the modules that run one after another")


def move_weights(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return twin


def _run(module: nn.Module, names: Sequence[str], x: Tensor) -> tuple[list[str], list[Tensor], set[int]]:
    """Return the pieces with ``FLATTEN`` where needed, their results, and which change in place later."""
    steps: list[tuple[str, Tensor, int]] = []  # a piece, its result, and the result's version
    for name in names:
        layer = module.get_submodule(name)
        if isinstance(layer, nn.Linear) and x.dim() == 4 and x.shape[-1] != layer.in_features:
            x = x.flatten(1)
            steps.append((FLATTEN, x, x._version))
        x = layer(x)
        if not isinstance(x, Tensor):
            raise NotCut(f"{name} gives {type(x).__name__}, not a tensor")
        steps.append((name, x, x._version))
    changed = {i for i, (_, result, version) in enumerate(steps) if result._version != version}
    return [name for name, _, _ in steps], [result for _, result, _ in steps], changed


@torch.no_grad()
def _try_pieces(
    module: nn.Module, names: Sequence[str], images: Tensor
) -> tuple[list[str], list[tuple[int, ...]], set[int]]:
    """Check that the pieces give the network's logits, and return what :func:`_run` does, with shapes for results."""
    used: list[str] = []
    results: list[Tensor] = []
    changed: set[int] = set()
    for training in (True, False):
        network, parts = move_weights(module), move_weights(module)
        for copied in (network, parts):
            copied.train(training)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # dropout
            expected = find_logits(network(images.clone()))  # a network may change its input in place
            torch.default_generator.manual_seed(0)
            try:
                used, results, later = _run(parts, names, images.clone())
            except NotCut:
                raise
            except Exception:  # a module may raise anything on unsuitable inputs
                raise NotCut("its modules do not run one after another") from None
        changed |= later
        outputs = results[-1] if results else images
        if outputs.shape != expected.shape or not torch.allclose(outputs, expected, rtol=1e-4, atol=1e-5):
            raise NotCut("its modules, run one after another, give other logits")
    layer = module.get_submodule(used[-1])
    if not isinstance(layer, nn.Linear) or layer.bias is None or len(results) < 2 or results[-2].dim() != 2:
        raise NotCut("its last module is no linear layer with a bias on features [B, d]")
    return used, [tuple(result.shape) for result in results], changed


def _divide_declared(
    paths: Mapping[str, str], names: Sequence[str], module: nn.Module
) -> list[tuple[str, tuple[str, ...]]]:
    stages: list[tuple[str, tuple[str, ...]]] = []
    start = 0
    for stage, path in paths.items():
        ends = [i for i, name in enumerate(names) if name == path or name.startswith(path + ".")]
        if not ends:
            modules = [name for name, _ in module.named_modules() if name]
            raise UserError(
                f'the network\'s attribute stages ends "{stage}" with "{path}", which is no submodule before the '
                f"classifier.{suggest_name(path, modules)}"
            )
        if ends[-1] < start:
            raise UserError(f'the network\'s attribute stages has "{stage}" after a stage that ends later.')
        stages.append((stage, tuple(names[start : ends[-1] + 1])))
        start = ends[-1] + 1
    return stages


def _divide_automatically(
    module: nn.Module, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> list[tuple[str, tuple[str, ...]]]:
    """Return a stage for every piece with weights.

    Pieces before the first block, such as a stem, join the first stage.  Pieces after the last map of several pixels
    make the features.
    """
    maps = [i for i in range(len(names)) if len(shapes[i]) == 4 and shapes[i][2] * shapes[i][3] > 1]
    last = maps[-1] + 1 if maps else len(names)
    layers = [None if name == FLATTEN else module.get_submodule(name) for name in names[:last]]
    blocks = [i for i, layer in enumerate(layers) if layer is not None and _children(layer) and _begins(layer)]
    starts = [i for i, layer in enumerate(layers) if layer is not None and _begins(layer)]
    starts = [i for i in starts if i > blocks[0]] if blocks else starts[1:]
    bounds = [0, *starts, last]
    return [(f"layer{i + 1}", tuple(names[a:b])) for i, (a, b) in enumerate(itertools.pairwise(bounds))]
