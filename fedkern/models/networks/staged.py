"""Base classes of the classifiers: features with named stages, and a linear head."""

import torch
from torch import Tensor, nn

from fedkern.errors import UserError, suggest_name
from fedkern.models.precision import autocasts, reduced_dtype


class Classifier(nn.Module):
    """Network with features ``[B, d]`` and a linear classifier, ``head``, on them."""

    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class StagedNetwork(Classifier):
    """Convolutional network that can be entered and left between its stages.

    ``features(x) == tail(stages(x, upto=s), after=s)`` for every stage ``s``.  Mixing feature maps (FedGID, arXiv
    2504.00850) and sending part of a network (FuseFL) need this.  The stages are ``"layer1"``, ..., ``"layerN"`` (maps
    ``[B, C, H, W]``) and ``"feature"`` (the global average of the last map, ``[B, d]``).  The stem belongs to
    ``"layer1"``.  Under ``compute_in("bf16")`` maps are bf16, pooled features fp32.

    Attributes:
        stage_names: ``("layer1", ..., "layerN", "feature")``.
        width: d, the number of pooled features.
        head: the linear classifier ``[B, d] -> [B, C]``.
    """

    stage_names: tuple[str, ...]
    width: int

    def __init__(self, stages: list[nn.Module], *, width: int, classes: int) -> None:
        super().__init__()
        names = tuple(f"layer{i}" for i in range(1, len(stages) + 1))
        for name, stage in zip(names, stages, strict=True):
            self.add_module(name, stage)
        self.head = nn.Linear(width, classes)
        self.stage_names = (*names, "feature")
        self.width = width

    def _position(self, stage: str) -> int:
        try:
            return self.stage_names.index(stage)
        except ValueError:
            raise ValueError(f"stage must be one of {', '.join(self.stage_names)}, got {stage!r}") from None

    @autocasts
    def _run(self, x: Tensor, begin: int, last: int) -> Tensor:
        """Apply stages ``begin`` to ``last``, both included."""
        for name in self.stage_names[begin : last + 1]:
            if name != "feature":
                x = getattr(self, name)(x)
            else:
                # As NHWC: the gradient of mean(dim=(2, 3)) is not channels-last, and the last stage would convert it.
                x = x.permute(0, 2, 3, 1).mean(dim=(1, 2), dtype=None if reduced_dtype() is None else torch.float32)
        return x

    def stage(self, name: str) -> nn.Module:
        """Return the module of a map stage, which shares its parameters with the network."""
        return self.get_submodule(name)

    @property
    def pooling(self) -> nn.Module:
        """Module that maps the last map stage's result to the features ``[B, d]``."""
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the leading stages with maps ``[B, C, H, W]`` as results."""
        return self.stage_names[:-1]

    def stages(self, x: Tensor, upto: str) -> Tensor:
        """Return the output of stage ``upto``.

        Args:
            x: normalised images ``[B, C, H, W]``; channels-last stays channels-last.
            upto: a name of ``stage_names``.

        Returns:
            The feature map ``[B, C', H', W']``, or for ``"feature"`` the pooled features ``[B, d]``.

        Raises:
            ValueError: ``upto`` is not a stage of this network.
        """
        return self._run(x, 0, self._position(upto))

    def tail(self, h: Tensor, after: str) -> Tensor:
        """Continue from the output of stage ``after`` to the pooled features.

        Args:
            h: the output of stage ``after``.
            after: a name of ``stage_names``; with ``"feature"``, ``h`` is returned unchanged.

        Returns:
            Pooled features ``[B, d]``.

        Raises:
            ValueError: ``after`` is not a stage of this network.
        """
        return self._run(h, self._position(after) + 1, len(self.stage_names) - 1)

    def features(self, x: Tensor) -> Tensor:
        """Return the pooled features ``[B, d]`` of images ``[B, C, H, W]``."""
        return self._run(x, 0, len(self.stage_names) - 1)


def resolve_stage(model: StagedNetwork, name: str) -> str:
    """Return the stage of ``model`` that ``name`` means.

    ``"map"`` is the second-to-last map stage (``layer3`` of a ResNet-18, ``layer2`` of the small CNN).  The last map
    stage is followed by a linear pooling alone, so mixing its maps is the same as mixing features
    (docs/methods/fedgid.md, section 6).

    Raises:
        UserError: the network has no such stage.
    """
    if name == "map":
        return model.stage_names[-3:][0]  # the only stage of a network with one
    if name not in model.stage_names:
        choices = ("map", *model.stage_names)
        hint = suggest_name(name, choices)
        raise UserError(f'this network has no stage "{name}", choose one of {", ".join(choices)}.{hint}')
    return name
