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
    """Patches of 4x4 pixels, each with a weight for every feature."""

    def __init__(self, classes: int, channels: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 4, stride=4)
        self.place = nn.Parameter(torch.ones(width, (image_size // 4) ** 2))
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.patch(images)).flatten(2)
        return self.classifier((maps * self.place).mean(2))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fedkern.simulate("fedavg", data="digits", model="patches", rounds=3, out=folder, pictures=False)
        print(f"accuracy after {run.config.rounds} rounds: {run.metrics['accuracy']:.1%}")
