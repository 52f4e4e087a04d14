"""The network of Fed-LPFM's published table: frozen features, asked once, under the only layer that travels."""

from pathlib import Path

import pytest
import torch

from benchmarks.studies import fedlpfm
from fedkern.models.teachers import efficientnet_lite
from fedkern.usercode import named_code
from python_tests.models.teachers.test_efficientnet_lite import wheel


def test_features_are_asked_once_and_the_head_alone_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path / "wheel", monkeypatch)
    monkeypatch.setattr(fedlpfm, "SHA256", efficientnet_lite.SHA256)
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "cache"))
    fedlpfm._extractor.cache_clear()
    network = fedlpfm.FrozenFeatures(10)
    assert {name for name, _ in network.named_parameters()} == {"head.weight", "head.bias"}
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = network(images)
    store, extractor = fedlpfm._extractor()
    direct = network.head(extractor.network(images))
    assert torch.equal(logits, direct)
    logits.sum().backward()
    assert network.head.weight.grad is not None
    monkeypatch.setattr(extractor, "network", lambda images: pytest.fail("an image is asked about twice"))
    assert torch.equal(network(images.flip(0)), direct.flip(0))
    assert store.path("logits", extractor.identity).is_file()
    fedlpfm._extractor.cache_clear()


def test_the_file_is_named_as_users_name_theirs() -> None:
    path = Path(fedlpfm.__file__)
    named = named_code.parse(f"{path}:FrozenFeatures")
    assert named is not None
    assert named_code.load(named, "the network")[0].__name__ == "FrozenFeatures"
