"""Uses of finished runs: predictions, files for other programs, and tasks of image-text networks."""

from fedkern.downstream.run_evaluation import Finished
from fedkern.downstream.tasks import decode, probe, retrieve, zero_shot

__all__ = ["Finished", "decode", "probe", "retrieve", "zero_shot"]
