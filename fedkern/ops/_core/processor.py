"""This machine's processor, as the operating system describes it."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path
from typing import NamedTuple

from fedkern import files
from fedkern.errors import UserError

CPUINFO = Path("/proc/cpuinfo")


class Processor(NamedTuple):
    """Vendor, family and model: processors that have these in common are built alike.

    Attributes:
        vendor: ``"AuthenticAMD"``, ``"GenuineIntel"``, on ARM the implementer (``"0x41"``); "" if unknown.
        family: the x86 family, on ARM the architecture.
        model: the x86 model, on ARM the part.
        name: the maker's name; a virtual machine often gives no more than the brand.
    """

    vendor: str
    family: int
    model: int
    name: str

    def cache_file(self, folder: str, *words: str) -> Path | None:
        """Path in the user's cache of a file of measurements on this processor, existing or not.

        None without a home folder.

        Args:
            folder: folder of the cache for one kind of measurement.
            words: further parts of the file's name.
        """
        try:
            found = files.cache_folder(folder)
        except UserError:
            return None
        parts = (self.vendor or "unknown", str(self.family), str(self.model), *words)
        return found / f"{'-'.join(parts)}.json".replace("/", "_")


def cpuinfo(path: Path | None = None) -> dict[str, str]:
    """Entries of ``/proc/cpuinfo`` for the first processor; none where there is no such file."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (path or CPUINFO).read_text(errors="replace").partition("\n\n")[0].splitlines():
            name, colon, value = line.partition(":")
            if colon:
                found[name.strip()] = value.strip()
    return found


def processor() -> Processor:
    """The processor of this machine."""
    return _processor(CPUINFO)


@functools.cache
def _processor(path: Path) -> Processor:
    facts = cpuinfo(path)
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "vendor_id" in facts:
        return Processor(facts["vendor_id"], _number(facts.get("cpu family")), _number(facts.get("model")), name)
    architecture, part = _number(facts.get("CPU architecture")), _number(facts.get("CPU part"))
    return Processor(facts.get("CPU implementer", ""), architecture, part, name)


def _number(text: str | None) -> int:
    try:
        return int(text or "", 0)
    except ValueError:
        return -1
