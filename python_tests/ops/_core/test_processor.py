"""Processors are told apart by what /proc/cpuinfo says of them."""

from pathlib import Path

import pytest

from fedkern.ops._core import processor as module
from fedkern.ops._core.processor import Processor, processor

X86 = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R)\n\nmodel\t: 9\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (X86, ("GenuineIntel", 6, 143, "Intel(R) Xeon(R)")),
        (ARM, ("0x41", 8, 0xD0C)),
        ("nothing that is known\nmodel\t: many\n", ("", -1, -1)),
        (None, ("", -1, -1)),
    ],
)
def test_vendor_family_and_model(text, found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(module, "CPUINFO", path)
    assert processor()[: len(found)] == found
    assert isinstance(processor(), Processor)
