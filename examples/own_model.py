"""A network of your own: any nn.Module, registered by a name.

python examples/own_model.py
python -m fedkern.run fedavg --model examples/own_model.py:Patches
"""

import tempfile

import torch
from torch import Tensor, nn

import fedkern


@fedkern.register_model("patches")
class Patches(nn.Module):
    """A feature map of patches of 4x4 pixels, and a linear classifier."""

    def __init__(self, classes: int, channels: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 4, stride=4)
        self.classifier = nn.Linear(width * (image_size // 4) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.patch(images)).flatten(1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fedkern.simulate("fedavg", data="digits", model="patches", rounds=3, out=folder, pictures=False)
        print(f"accuracy after {run.config.rounds} rounds: {run.metrics['accuracy']:.1%}")
