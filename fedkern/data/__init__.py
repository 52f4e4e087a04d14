"""Data sets, partitioners, background extraction and batch transforms."""

from fedkern.data.data_option import COMMON_OPTIONS, DETECTION_OPTIONS, READING
from fedkern.data.dataset_registry import DATASETS, lookup, register_data
from fedkern.data.images.background import extract_background
from fedkern.data.images.detections import BoxesFile, Detections
from fedkern.data.images.transforms import AUGMENTATIONS, augment, augment_pairs, normalise
from fedkern.data.load import load
from fedkern.data.sharing.partition import PARTITIONERS, parse_partition, partition, partition_like
from fedkern.data.sources.listing import Listing, Reading, to_source
from fedkern.data.split import Split
from fedkern.data.types import FederatedData, Pool, Source, memory_pool
from fedkern.tasks.partition_statistics import PartitionStatistics
from fedkern.tasks.segmentation import IGNORE
from fedkern.typed_option import Option

__all__ = [
    "AUGMENTATIONS", "COMMON_OPTIONS", "DATASETS", "DETECTION_OPTIONS", "IGNORE", "PARTITIONERS", "READING",
    "BoxesFile", "Detections", "FederatedData", "Listing", "Option", "PartitionStatistics", "Pool", "Reading", "Source",
    "Split", "augment", "augment_pairs", "extract_background", "load", "lookup", "memory_pool", "normalise",
    "parse_partition", "partition", "partition_like", "register_data", "to_source",
]  # fmt: skip
