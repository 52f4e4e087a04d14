"""Networks with named stages, U-Nets, their registry, ensembles, generators of images, and Grad-CAM."""

from fedkern.models.cnn import CNN
from fedkern.models.efficientnet import EfficientNetB0
from fedkern.models.ensemble import Ensemble
from fedkern.models.generator import Generator
from fedkern.models.gradcam import grad_cam, gradcam_stage, mass_inside, object_share
from fedkern.models.mlp import MLP
from fedkern.models.mobilenet import MobileNetV2
from fedkern.models.own import Own, OwnNetwork
from fedkern.models.registry import MODELS, ModelEntry, available, build, initialise, register_model
from fedkern.models.resnet import BasicBlock, ResNet
from fedkern.models.staged import StagedNetwork, resolve_stage
from fedkern.models.towers import IMAGE_ENCODERS, TEXT_ENCODERS, PairNetwork, build_pair
from fedkern.models.unet import UNet
from fedkern.models.vgg import VGG
from fedkern.models.vit import ViT
from fedkern.models.vocabulary import Tokens, Vocabulary, learn_vocabulary

__all__ = [
    "CNN",
    "IMAGE_ENCODERS",
    "MLP",
    "MODELS",
    "TEXT_ENCODERS",
    "VGG",
    "BasicBlock",
    "EfficientNetB0",
    "Ensemble",
    "Generator",
    "MobileNetV2",
    "ModelEntry",
    "Own",
    "OwnNetwork",
    "PairNetwork",
    "ResNet",
    "StagedNetwork",
    "Tokens",
    "UNet",
    "ViT",
    "Vocabulary",
    "available",
    "build",
    "build_pair",
    "grad_cam",
    "gradcam_stage",
    "initialise",
    "learn_vocabulary",
    "mass_inside",
    "object_share",
    "register_model",
    "resolve_stage",
]
