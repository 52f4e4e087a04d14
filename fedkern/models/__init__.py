"""Networks with named stages, U-Nets, their registry, ensembles, generators of images, and Grad-CAM."""

from fedkern.models.gradcam import grad_cam, mass_inside, object_share
from fedkern.models.network_registry import MODELS, ModelEntry, available, build, build_any, initialise, register_model
from fedkern.models.networks.cnn import CNN
from fedkern.models.networks.conv_norm_layers import ConvNorm
from fedkern.models.networks.generator import Generator
from fedkern.models.networks.network_ensemble import Ensemble
from fedkern.models.networks.staged import StagedNetwork, resolve_stage
from fedkern.models.networks.unet import UNet
from fedkern.models.pretrained.vocabulary import Tokens, Vocabulary, learn_vocabulary
from fedkern.models.towers import IMAGE_ENCODERS, TEXT_ENCODERS, PairNetwork, build_pair
from fedkern.models.users.user_models import Own, OwnNetwork

__all__ = [
    "CNN", "IMAGE_ENCODERS", "MODELS", "TEXT_ENCODERS", "ConvNorm", "Ensemble", "Generator", "ModelEntry", "Own",
    "OwnNetwork", "PairNetwork", "StagedNetwork", "Tokens", "UNet", "Vocabulary", "available", "build", "build_any",
    "build_pair", "grad_cam", "initialise", "learn_vocabulary", "mass_inside", "object_share", "register_model",
    "resolve_stage",
]  # fmt: skip
