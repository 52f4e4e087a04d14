"""Objects that only a script can give a run: network, training loop, optimiser factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedkern.data import FederatedData
from fedkern.data.identity import list_user_code
from fedkern.engine.local.own_optimizer import make_optimizer, stepped_by
from fedkern.errors import UserError, first_of, format_value
from fedkern.methods import method_registry
from fedkern.methods.base import LocalTraining
from fedkern.methods.roles import Client
from fedkern.models.users.user_models import check_module, unwrap_module
from fedkern.settings.config import RunConfig
from fedkern.tasks.user_tasks import user_module
from fedkern.usercode.code_identity import digest, identity_table, select_code
from fedkern.usercode.named_code import INSTANCE

_PARTS = ("client_update", "loss", "terms", "adjust_gradient", "draw", "prepare")
"""Functions of a method's local training. A user's function replaces FedAvg's, whatever the method's server does."""
_UNREAD = {
    "train": ("momentum", "weight_decay", "clip_norm", "freeze_bn_after", "optimizer", "optimizer_state"),
    "optimizer": ("lr", "momentum", "weight_decay"),
}
"""Settings that a user's function replaces."""


def _check_arguments(name: str, function: Callable[..., object] | None, words: str, count: int) -> None:
    try:
        if function is not None:
            inspect.signature(function).bind(*range(count))
    except ValueError:  # it has no signature
        return
    except TypeError as error:
        code = getattr(function, "__code__", None)
        where = f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""
        raise UserError(f"{name} must be a function of {words}: {error}{where}.") from None


@dataclass(frozen=True)
class ScriptObjects:
    """Objects of a script beside settings and data, which a resumed run needs again.

    A script's loss, metrics and collation are in the task of the data.

    Attributes:
        network: the run's network: a module, which is copied with its weights, or a class or function that makes one.
        train: ``train(model, client)`` in place of a method's local training.
        optimizer: ``optimizer(parameters)``, a factory for the run's loop.
        began: identities of the run's code when these objects were first used, by group, as objects may change while
            they run; None: the present ones count.
    """

    network: nn.Module | None = None
    train: Callable[[Any, Any], None] | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    began: dict[str, dict[str, str]] | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[type[ScriptObjects], tuple[object, ...]]:
        return ScriptObjects, (None, self.train, self.optimizer)  # another process gets the network from MODELS

    @classmethod
    def of(cls, network: object, train: Any, settings: dict[str, Any]) -> ScriptObjects:
        """Return the objects among the arguments of a run, and remove an optimiser factory from ``settings``."""
        optimizer = None if isinstance(settings.get("optimizer"), str) else settings.pop("optimizer", None)
        pairs = (("train", train, "a model and a client", 2), ("optimizer", optimizer, "a list of parameters", 1))
        for name, function, arguments, count in pairs:
            if function is not None and not callable(function):
                raise UserError(f"{name} must be a function of {arguments}, not {format_value(function)}.")
            _check_arguments(name, function, arguments, count)
        replacing = "train" if train is not None else "optimizer" if optimizer is not None else ""
        for name in _UNREAD.get(replacing, ()):
            if settings.get(name) is not None or (name == "optimizer" and optimizer is not None):
                raise UserError(f"{name} has no effect beside a function {replacing}, which decides it: set it there.")
        return cls(None if isinstance(network, str) else unwrap_module(network), train, optimizer, {})

    @property
    def functions(self) -> bool:
        return self.train is not None or self.optimizer is not None

    def code(self, config: RunConfig, data: FederatedData | None) -> dict[str, dict[str, str]]:
        training = {"train": self.train, "optimizer": self.optimizer}
        groups: dict[str, dict[str, Any]] = {
            "method": {"method": config.kind} if config.method in method_registry.GIVEN else {},
            "network": {} if self.network is None else {"model": self.network},
            "training": {name: function for name, function in training.items() if function is not None},
            "loss_fn": {} if data is None else list_user_code(data),
        }
        return {name: identity_table(things, weights=name != "network") for name, things in groups.items() if things}

    def code_at_begin(self, config: RunConfig, data: FederatedData | None) -> dict[str, dict[str, str]]:
        """Return the result of :meth:`code` at the first use of these objects, unless functions or classes differ."""
        current = self.code(config, data)
        for name, table in current.items() if self.began is not None else ():
            before = self.began.setdefault(name, table)  # type: ignore[union-attr]
            if select_code(before) != select_code(table):
                self.began[name] = table  # type: ignore[index]
        return current if self.began is None else {name: self.began[name] for name in current}

    def train_model(self, model: nn.Module, client: Client) -> nn.Module:
        """Train the model in place, and return it."""
        assert self.train is not None
        result: Any = self.train(model, client)
        if result is not None and result is not model:
            raise UserError(
                f"train must return nothing, not {format_value(result)}: what it leaves in the model that it was given "
                'is the upload, and figures go into client.report["NAME"].'
            )
        return model

    def describe_settings(self, config: RunConfig) -> RunConfig:
        kind, usual = config.kind, method_registry.get("fedavg")
        if self.functions and kind.is_private(config.method_options):
            raise UserError(f"{config.method} with differential privacy has an optimiser of its own: leave yours out.")
        plain = issubclass(kind, LocalTraining) and all(getattr(kind, part) is getattr(usual, part) for part in _PARTS)
        if self.train is not None and not plain:
            raise UserError(
                f"A train function would drop what {method_registry.short_name(config.method)} adds to local training: "
                "write a class derived from it with a client_update (client.model, client.batches, client.upload), "
                "give an optimizer factory instead, or take fedavg."
            )
        if self.network is None:
            return config
        code = getattr(self.network, "func", self.network)  # of functools.partial
        is_module = isinstance(self.network, nn.Module)
        name = INSTANCE + (type(code).__name__ if is_module else getattr(code, "__name__", type(code).__name__))
        if isinstance(self.network, nn.Module):
            check_module(self.network, name)
        elif not callable(self.network):
            raise UserError(
                "model must be an nn.Module, a class or function that makes one, or the name of a network, not "
                f"{format_value(self.network)}."
            )
        return config.replace(model=name, width=None)

    def check_given(self, stored: RunConfig, out: Path) -> None:
        """Raise UserError if a stored run needs a module or a function that is missing."""
        if stored.model.startswith(INSTANCE) and self.network is None:
            raise UserError(
                f"The run in {out} trains a module that a script made ({stored.model.removeprefix(INSTANCE)}): go on "
                "with it in Python, fedkern.load(DIR, model=MODULE).resume()."
            )
        if stored.training is not None and not self.functions:
            name = "train" if stored.training.startswith("train ") else "optimizer"
            raise UserError(
                f"The run in {out} trains with a script's own {stored.training}: go on with it in Python, "
                f"fedkern.load(DIR, {name}=FUNCTION).resume()."
            )

    def describe_training(
        self, build: Callable[[], nn.Module], code: Mapping[str, Mapping[str, str]]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return settings that describe the functions in words and as a hash, and warnings by name.

        An optimiser of the network that ``build`` makes is made once as a trial.
        """
        warnings: dict[str, str] = {}
        if not self.functions:
            return {}, warnings
        if self.optimizer is None:
            words = f"train function {getattr(self.train, '__qualname__', type(self.train).__name__)}"
        else:
            trained = {name: x for name, x in user_module(build()).named_parameters() if x.requires_grad}
            optimizer = make_optimizer(self.optimizer, [*trained.values()])
            stepped = {id(tensor) for tensor in stepped_by(optimizer)}
            values = {name: value for name, value in optimizer.defaults.items() if value not in (None, False)}
            words = f"{type(optimizer).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
            if left := [name for name, parameter in trained.items() if id(parameter) not in stepped]:
                words += f" of {len(stepped)} of {len(trained)} parameters"
                warnings["partly-trained"] = (
                    f"The optimizer of the script steps {len(stepped)} of the network's {len(trained)} parameters and "
                    f"leaves {first_of(left, 3)} as they are: freeze these (requires_grad_(False)) if that is meant."
                )
        return {"training": words, "training_sha256": digest(code["training"])}, warnings
