"""Inference cost of the networks in docs/fedlpfm.md: the one that travels and the frozen teacher.

    python -m benchmarks.studies.inference_cost

Writes ``benchmarks/studies/results/inference_cost.json``.
"""

import json

import torch

from benchmarks.page import RESULTS
from benchmarks.recorded import recorded_versions
from fedkern.models import build
from fedkern.models.cost import measure_cost
from fedkern.models.teachers.efficientnet_lite import NAME, SIDE, EfficientNetLite0


def main() -> None:
    networks = {
        "cnn, width 16": (build("cnn", classes=10, channels=3, image_size=32, seed=0, width=16), 32),
        NAME: (EfficientNetLite0(), SIDE),
    }
    figures = {}
    for name, (network, side) in networks.items():
        costs = measure_cost(network, torch.zeros(2, 3, side, side))
        figures[name] = {"side": side, "parameters": costs.parameters, "flops": costs.inference_flops}
    text = json.dumps({"networks": figures, "versions": recorded_versions()}, indent=1)
    (RESULTS / "inference_cost.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
