"""SGD, Adam and AdamW for networks other than the clients', bit for bit as in ``torch.optim``.

The first ``torch.optim`` optimiser of a process imports torch's compiler, which takes a second.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedkern.ops._core.private_torch import foreach_add, foreach_add_, fused_adam, fused_adamw

EPSILON = 1e-8


def cosine(start: float, end: float, progress: float) -> float:
    """Return a learning rate on half a cosine from ``start`` to ``end``."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class _Optimiser:
    """Base class of both optimisers, with state tensors by parameter from its first step on."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        self.lr = lr
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._parameters = list(parameters)

    def _with_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [(p, p.grad) for p in self._parameters if p.grad is not None]
        return [p for p, _ in pairs], [gradient for _, gradient in pairs]

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class SGD(_Optimiser):
    """``torch.optim.SGD`` without dampening, for parameters of one dtype and device."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.0, *, weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(parameters, lr)
        self._momentum, self._decay, self._nesterov = momentum, weight_decay, nesterov

    @torch.no_grad()
    def step(self) -> None:
        parameters, gradients = self._with_gradients()
        if not parameters:
            return
        if self._decay:
            gradients = list(foreach_add(gradients, parameters, alpha=self._decay))
        if self._momentum:
            velocities = []
            for parameter, gradient in zip(parameters, gradients, strict=True):
                state = self.state.get(parameter)
                if state is None:
                    velocity = self.state.setdefault(parameter, {})["momentum_buffer"] = gradient.clone()
                else:
                    velocity = state["momentum_buffer"].mul_(self._momentum).add_(gradient)
                velocities.append(velocity)
            gradients = list(foreach_add(gradients, velocities, alpha=self._momentum)) if self._nesterov else velocities
        foreach_add_(parameters, gradients, alpha=-self.lr)


class Adam(_Optimiser):
    """``torch.optim.Adam(fused=True)``, or ``AdamW(fused=True)`` with ``decoupled`` (arXiv 1711.05101)."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999), *,
        weight_decay: float = 0.0, decoupled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(parameters, lr)
        self._betas, self._decay = betas, weight_decay
        self._fused = fused_adamw if decoupled else fused_adam

    @torch.no_grad()
    def step(self) -> None:
        parameters, gradients = self._with_gradients()
        if not parameters:
            return
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        steps, means, squares = (
            [self.state[parameter][name] for parameter in parameters] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        foreach_add_(steps, 1)
        self._fused(
            parameters, gradients, means, squares, [], steps, lr=self.lr, beta1=self._betas[0], beta2=self._betas[1],
            weight_decay=self._decay, eps=EPSILON, amsgrad=False, maximize=False,
        )  # fmt: skip
