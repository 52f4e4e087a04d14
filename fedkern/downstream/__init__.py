"""Downstream tasks of a finished image-text run: retrieval, zero-shot classification, probes, segmentation."""

from fedkern.downstream.finished import Finished
from fedkern.downstream.tasks import decode, probe, retrieve, zero_shot

__all__ = ["Finished", "decode", "probe", "retrieve", "zero_shot"]
