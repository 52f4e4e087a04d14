"""Networks with named stages, and their registry."""

from fedkern.models.cnn import CNN
from fedkern.models.registry import MODELS, ModelEntry, build, initialise
from fedkern.models.resnet import BasicBlock, ResNet
from fedkern.models.staged import StagedNetwork, resolve_stage

__all__ = [
    "CNN",
    "MODELS",
    "BasicBlock",
    "ModelEntry",
    "ResNet",
    "StagedNetwork",
    "build",
    "initialise",
    "resolve_stage",
]
