"""Settings of the network: its kind, start, trained parts, running statistics and arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedkern.data import DATASETS
from fedkern.errors import UserError
from fedkern.files.filesystem import absolute, absolute_folder
from fedkern.methods.base import Method
from fedkern.models import MODELS
from fedkern.models.precision import PRECISIONS
from fedkern.models.towers import IMAGE_ENCODERS, TEXT_ENCODERS
from fedkern.settings.defaults import COMMON
from fedkern.settings.section import Section
from fedkern.typed_option import flag, option
from fedkern.usercode import named_code
from fedkern.usercode.named_code import FORMS


def _encoder(name: str) -> str:
    return name if name in (*IMAGE_ENCODERS, *TEXT_ENCODERS) else absolute_folder(name)


@dataclass(frozen=True)
class ModelSettings(Section):
    """Settings of the network."""

    model: str = option(COMMON["model"], lambda: f"network: {', '.join(MODELS)}, {FORMS}", path=named_code.absolute)
    width: int | None = option(
        None, "channels of the network's first stage, or size of a token of the built-in encoders", low=1, high=65536
    )
    init: str | None = option(
        None,
        "initial weights of the network: the folder of a finished run, or a state dict with the network's names and "
        "shapes in a .safetensors or .pt file",
        path=absolute,
    )
    init_partial: bool = option(False, "load only the tensors of --init that fit the network, and list the others")
    freeze: str | None = option(
        None, "parameters of the network that are neither trained nor sent, by name: backbone.*,head.bias"
    )
    personal: str | None = option(
        None,
        "averaging methods: parameters and buffers of the network that never leave their client, by name: "
        "head.*,norm1.*",
    )
    features: str | None = option(
        None, "submodule of your own network whose output is the features, for methods that compare features"
    )
    stages: str | None = option(
        None, "submodules of your own network after which feature maps can be mixed, in order: conv1,conv2"
    )
    accelerate: str = option(
        "auto", "compute your own network by fused layers: auto (where correct and faster) or off",
        choices=("auto", "off"),
    )  # fmt: skip
    image_encoder: str = option(
        COMMON["image_encoder"],
        "image-text data: " + ", ".join(IMAGE_ENCODERS) + ", or a transformers model's folder",
        path=_encoder,
    )
    text_encoder: str = option(
        COMMON["text_encoder"],
        "image-text data: " + ", ".join(TEXT_ENCODERS) + ", or a transformers model's folder",
        path=_encoder,
    )
    buffers: str = option(
        "average",
        "batch norm's running statistics: average, local (every client keeps its own), drop, or pool (image-text"
        " data: recomputed for the global network over all clients' samples)",
        choices=("average", "local", "drop", "pool"),
    )
    freeze_bn_after: int | None = option(
        None,
        "rounds after which batch norm normalises by the received running statistics and keeps them (FixBN)",
        low=0,
    )
    precision: str = option(
        "fp32", "number format of the computation: fp32, or bf16 by autocast with fp32 weights", choices=PRECISIONS
    )

    def check(self) -> None:
        super().check()
        if self.freeze_bn_after is not None and self.buffers == "drop":
            raise UserError(
                "--freeze-bn-after trains with received running statistics, of which --buffers drop leaves nobody any: "
                "leave one of the two out."
            )
        if self.buffers in ("local", "drop") and not self.method_instance.takes_buffers:
            raise UserError(
                f"--buffers {self.buffers} is not for {self.method} with these options, which keeps every client's "
                "running statistics: leave it out."
            )
        if self.freeze_bn_after is not None and (self.kind.one_shot or self.kind.takes_teachers):
            raise UserError(
                f"--freeze-bn-after is not for {self.method}, whose clients' networks are not trained round by round."
            )

        if self.personal is not None and not self.method_instance.takes_personal:
            raise UserError(
                "--personal is for methods whose clients train the whole of one network, which the server averages in "
                f"every round, and {self.method} with these options is none: leave it out."
            )
        if self.personal is not None and self.buffers == "pool":
            raise UserError(
                "--buffers pool computes the statistics of one global network, and with --personal every client has "
                "its own: take --buffers average, local or drop."
            )

    def find_unused(self) -> dict[str, str]:
        ways = super().find_unused()
        return ways | ({"init_partial": "without --init: give that too, or leave it out"} if self.init is None else {})

    @property
    def keeps_parts(self) -> bool:
        """True if every client keeps parts of the network to itself."""
        return self.personal is not None or self.kind.keeps_head

    @property
    def own_networks(self) -> bool:
        """True if the run is judged by a network of every client."""
        return self.keeps_parts or self.kind.own_vectors is not Method.own_vectors

    @property
    def statistics(self) -> bool:
        return self.buffers in ("average", "pool")


def check_networks(settings: Mapping[str, object], data: str) -> None:
    """Raise UserError if ``settings`` choose a kind of network that the data set does not use."""
    pairs = [name for name, info in DATASETS.items() if "pairs" in info.task.offers]
    if data in pairs and "model" in settings:
        raise UserError(
            f'--model {settings["model"]} has no effect on the data set "{data}", whose network is a pair of encoders: '
            "leave model out and choose them with --image-encoder and --text-encoder."
        )
    for name in ("image_encoder", "text_encoder"):
        if data not in pairs and name in settings:
            raise UserError(
                f"{flag(name)} {settings[name]} is for images with texts, and the data set "
                f'"{data}" has no texts: leave {name} out and choose the network with --model.'
            )
