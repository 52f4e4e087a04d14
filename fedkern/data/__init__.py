"""Data sets, partitioners, background extraction and batch transforms."""

from fedkern.data.load import load
from fedkern.data.partition import PARTITIONERS, PartitionerInfo, parse_partition, partition, partition_like
from fedkern.data.registry import COMMON_OPTIONS, DATASETS, DataOption, DatasetInfo, lookup
from fedkern.data.statistics import PartitionStatistics
from fedkern.data.transforms import AUGMENTATIONS, augment, normalise
from fedkern.data.types import FederatedData, Split

__all__ = [
    "AUGMENTATIONS",
    "COMMON_OPTIONS",
    "DATASETS",
    "PARTITIONERS",
    "DataOption",
    "DatasetInfo",
    "FederatedData",
    "PartitionStatistics",
    "PartitionerInfo",
    "Split",
    "augment",
    "load",
    "lookup",
    "normalise",
    "parse_partition",
    "partition",
    "partition_like",
]
