"""Utilisation and memory of a GPU while something runs: the driver's figures, through NVML."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean

SAMPLE_SECONDS = 0.1


@dataclass
class Use:
    """Measurements of a GPU.

    Attributes:
        utilisation: per cent of the time in which a kernel ran, one value per sample, of all programs on this GPU.
        taken: the most bytes that were taken beyond those at the beginning.
    """

    utilisation: list[float] = field(default_factory=list)
    taken: int = 0

    @property
    def mean(self) -> float:
        """Return the mean utilisation, in per cent."""
        return mean(self.utilisation) if self.utilisation else 0.0


@contextlib.contextmanager
def watch(index: int = 0, interval: float = SAMPLE_SECONDS) -> Iterator[Use]:
    """Sample a GPU ten times a second during the block, and once at its end.

    Args:
        index: the GPU's number, as the driver counts.

    Raises:
        pynvml.NVMLError: there is no driver, or it reports nothing of this GPU.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        gpu, use, over = pynvml.nvmlDeviceGetHandleByIndex(index), Use(), threading.Event()
        before = pynvml.nvmlDeviceGetMemoryInfo(gpu).used

        def look() -> None:
            use.utilisation.append(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
            use.taken = max(use.taken, pynvml.nvmlDeviceGetMemoryInfo(gpu).used - before)

        def go_on() -> None:
            while not over.wait(interval):
                look()

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        try:
            yield use
        finally:
            over.set()
            thread.join()
            look()
    finally:
        pynvml.nvmlShutdown()
