"""The picture of client weights and losses."""

import numpy as np
import pytest
from PIL import Image

from fedkern.report.weights import weights_picture


def records(clients, rounds=3):
    rng = np.random.default_rng(0)
    for r in range(rounds):
        info = {str(k): {"weight": float(w), "own_loss": 2.0 - w} for k, w in enumerate(rng.dirichlet([2] * clients))}
        if r == 1:
            info.pop("0")  # took no part
        yield {"round": r + 1, "clients": info}


@pytest.mark.parametrize("clients", [3, 120])
def test_weights_and_losses_are_drawn(clients, tmp_path):
    path = tmp_path / "weights.png"
    assert weights_picture(list(records(clients)), path, title="t")
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    blue, orange = ((np.abs(pixels - np.array(rgb)).sum(1) < 30).sum() for rgb in ((0, 114, 178), (213, 94, 0)))
    assert orange > 100
    assert (blue > 100) == (clients == 3)


def test_other_methods_have_no_such_picture(tmp_path):
    path = tmp_path / "weights.png"
    assert not weights_picture([{"round": 1, "clients": {"0": {"loss": 1.0}}}, {"round": 2}], path, title="t")
    assert not path.exists()
