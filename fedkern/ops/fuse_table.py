"""Which way FusedBlocks computes: the cheapest by a table of what every kind of layer measured.

``python benchmarks/tune_fuse.py --write`` measures the rows anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

LOWERINGS = ("grouped", "separate", "direct")

# Channels that oneDNN takes at once; others it fills up or takes one by one, so that such rows stand far from these.
VECTOR = 16
VECTOR_WEIGHT = 1.0

# Images have no more channels than this.
IMAGE = 4

# Rows of other branches stand nearer than those of other widths and sizes: their number matters little.
BRANCHES_WEIGHT = 0.25


class Row(NamedTuple):
    """Measured costs of one kind of layer, with a batch of 64 on one thread.

    Costs are nanoseconds per 1000 multiplications, of pools per 1000 values read.

    Attributes:
        kind: ``"spatial"`` (3x3 convolutions, folded), ``"stem"`` (those that read one image of few channels for all
            branches), ``"pointwise"`` (1x1 ones that read all branches' channels, as adaptors do), ``"halve"`` (maxima
            of 2x2), ``"pool"`` (other pools, by 3x3 maxima of stride 2) or ``"recorded"`` (convolution and batch norm,
            forward and backward in training mode).
        branches: M.
        width: channels of one branch.
        size: height and width of the result, of a pool's input.
        channels_last: layout of the blocks' input, which matters to the pointwise ones alone.
        grouped, separate, direct: the costs; None where there is no such way.
    """

    kind: str
    branches: int
    width: int
    size: int
    channels_last: bool
    grouped: float
    separate: float
    direct: float | None


class Work(NamedTuple):
    """One layer of a block.

    Attributes:
        kind: that of the :class:`Row` that tells its cost.
        width: channels of one branch, of a 3x3 convolution the geometric mean of those read and written.
        whole: whether the channels are whole vectors, of :data:`VECTOR`.
        size: as in :class:`Row`, the geometric mean of height and width.
        amount: multiplications (of a pool: values read) per sample and branch.
    """

    kind: str
    width: float
    whole: bool
    size: float
    amount: float


ROWS: tuple[Row, ...] = (
    Row("halve", 5, 16, 4, False, 229.22, 543.3, 448.18),
    Row("halve", 5, 16, 8, False, 201.5, 411.53, 261.56),
    Row("halve", 5, 16, 16, False, 437.94, 401.18, 257.6),
    Row("halve", 5, 16, 32, False, 400.47, 534.73, 270.78),
    Row("halve", 5, 64, 4, False, 138.82, 225.04, 358.9),
    Row("halve", 5, 64, 8, False, 211.66, 213.31, 257.63),
    Row("halve", 5, 64, 16, False, 305.87, 333.1, 278.25),
    Row("halve", 5, 64, 32, False, 1220.64, 402.3, 706.03),
    Row("pointwise", 5, 14, 4, False, 32.18, 70.05, 67.05),
    Row("pointwise", 5, 14, 4, True, 26.18, 46.87, 53.62),
    Row("pointwise", 5, 14, 8, False, 18.32, 30.07, 22.43),
    Row("pointwise", 5, 14, 8, True, 12.94, 24.5, 27.46),
    Row("pointwise", 5, 14, 16, False, 32.69, 46.73, 23.85),
    Row("pointwise", 5, 14, 16, True, 14.62, 28.19, 27.4),
    Row("pointwise", 5, 14, 32, False, 54.77, 73.25, 19.93),
    Row("pointwise", 5, 14, 32, True, 17.15, 37.54, 41.95),
    Row("pointwise", 5, 20, 4, False, 17.74, 34.74, 35.31),
    Row("pointwise", 5, 20, 4, True, 15.46, 31.78, 38.61),
    Row("pointwise", 5, 20, 8, False, 13.84, 23.83, 18.09),
    Row("pointwise", 5, 20, 8, True, 10.64, 21.25, 20.9),
    Row("pointwise", 5, 20, 16, False, 22.84, 41.99, 15.87),
    Row("pointwise", 5, 20, 16, True, 12.76, 27.66, 21.89),
    Row("pointwise", 5, 20, 32, False, 47.45, 63.24, 17.07),
    Row("pointwise", 5, 20, 32, True, 13.04, 36.55, 27.57),
    Row("pointwise", 5, 29, 2, False, 27.93, 51.46, 98.75),
    Row("pointwise", 5, 29, 2, True, 22.16, 46.82, 100.64),
    Row("pointwise", 5, 29, 4, False, 14.66, 21.49, 29.71),
    Row("pointwise", 5, 29, 4, True, 11.77, 19.12, 32.08),
    Row("pointwise", 5, 29, 8, False, 14.83, 18.25, 18.52),
    Row("pointwise", 5, 29, 8, True, 11.15, 15.06, 20.38),
    Row("pointwise", 5, 29, 16, False, 19.8, 27.91, 13.57),
    Row("pointwise", 5, 29, 16, True, 12.04, 20.19, 20.73),
    Row("pointwise", 5, 29, 32, False, 40.26, 56.66, 14.55),
    Row("pointwise", 5, 29, 32, True, 14.11, 26.5, 41.7),
    Row("pointwise", 5, 32, 2, False, 20.68, 36.52, 93.24),
    Row("pointwise", 5, 32, 2, True, 18.57, 34.34, 96.52),
    Row("pointwise", 5, 32, 4, False, 13.66, 18.57, 28.94),
    Row("pointwise", 5, 32, 4, True, 10.4, 15.72, 30.49),
    Row("pointwise", 5, 32, 8, False, 11.72, 14.3, 14.42),
    Row("pointwise", 5, 32, 8, True, 9.38, 11.76, 17.66),
    Row("pointwise", 5, 32, 16, False, 16.92, 22.41, 12.95),
    Row("pointwise", 5, 32, 16, True, 10.24, 15.1, 17.12),
    Row("pointwise", 5, 32, 32, False, 37.17, 43.1, 14.07),
    Row("pointwise", 5, 32, 32, True, 13.49, 19.62, 30.2),
    Row("pointwise", 5, 40, 2, False, 19.15, 34.09, 93.72),
    Row("pointwise", 5, 40, 2, True, 16.82, 30.86, 95.83),
    Row("pointwise", 5, 40, 4, False, 14.27, 18.64, 27.44),
    Row("pointwise", 5, 40, 4, True, 10.73, 16.2, 28.79),
    Row("pointwise", 5, 40, 8, False, 13.06, 17.1, 15.14),
    Row("pointwise", 5, 40, 8, True, 10.05, 14.99, 17.25),
    Row("pointwise", 5, 40, 16, False, 16.57, 25.97, 14.75),
    Row("pointwise", 5, 40, 16, True, 10.49, 17.57, 16.82),
    Row("pointwise", 5, 40, 32, False, 31.14, 36.52, 13.48),
    Row("pointwise", 5, 40, 32, True, 13.72, 19.21, 29.99),
    Row("pointwise", 5, 64, 2, False, 15.05, 19.07, 82.36),
    Row("pointwise", 5, 64, 2, True, 13.37, 24.34, 89.53),
    Row("pointwise", 5, 64, 4, False, 11.14, 13.8, 23.34),
    Row("pointwise", 5, 64, 4, True, 9.16, 11.71, 24.91),
    Row("pointwise", 5, 64, 8, False, 12.54, 14.59, 12.33),
    Row("pointwise", 5, 64, 8, True, 9.64, 11.48, 13.94),
    Row("pointwise", 5, 64, 16, False, 12.1, 15.59, 10.95),
    Row("pointwise", 5, 64, 16, True, 9.05, 12.42, 13.32),
    Row("pointwise", 5, 128, 2, False, 16.84, 17.34, 76.84),
    Row("pointwise", 5, 128, 2, True, 15.18, 18.06, 76.95),
    Row("pointwise", 5, 128, 4, False, 11.11, 11.84, 21.01),
    Row("pointwise", 5, 128, 4, True, 10.08, 11.04, 21.96),
    Row("pointwise", 5, 128, 8, False, 10.05, 11.33, 10.86),
    Row("pointwise", 5, 128, 8, True, 8.72, 10.47, 12.05),
    Row("pointwise", 10, 14, 2, False, 25.6, 77.93, 97.47),
    Row("pointwise", 10, 14, 2, True, 20.35, 75.07, 101.67),
    Row("pointwise", 10, 14, 4, False, 15.75, 30.22, 29.9),
    Row("pointwise", 10, 14, 4, True, 11.74, 27.5, 33.02),
    Row("pointwise", 10, 14, 8, False, 11.64, 20.91, 15.1),
    Row("pointwise", 10, 14, 8, True, 9.11, 17.61, 17.76),
    Row("pointwise", 10, 14, 16, False, 29.15, 37.68, 13.3),
    Row("pointwise", 10, 14, 16, True, 10.43, 20.81, 17.42),
    Row("pointwise", 10, 14, 32, False, 40.52, 62.65, 14.17),
    Row("pointwise", 10, 14, 32, True, 15.59, 42.52, 33.92),
    Row("pointwise", 10, 20, 2, False, 18.37, 54.41, 85.92),
    Row("pointwise", 10, 20, 2, True, 16.35, 52.64, 87.76),
    Row("pointwise", 10, 20, 4, False, 12.72, 25.54, 25.31),
    Row("pointwise", 10, 20, 4, True, 10.34, 22.64, 27.51),
    Row("pointwise", 10, 20, 8, False, 12.24, 20.95, 13.1),
    Row("pointwise", 10, 20, 8, True, 9.23, 18.17, 14.92),
    Row("pointwise", 10, 20, 16, False, 28.08, 30.71, 11.68),
    Row("pointwise", 10, 20, 16, True, 9.85, 21.72, 14.99),
    Row("pointwise", 10, 20, 32, False, 29.5, 48.38, 12.34),
    Row("pointwise", 10, 20, 32, True, 11.73, 29.69, 24.79),
    Row("pointwise", 10, 29, 2, False, 18.05, 32.92, 82.69),
    Row("pointwise", 10, 29, 2, True, 14.29, 31.46, 83.57),
    Row("pointwise", 10, 29, 4, False, 11.45, 16.22, 23.76),
    Row("pointwise", 10, 29, 4, True, 9.74, 14.88, 24.76),
    Row("pointwise", 10, 29, 8, False, 12.79, 17.4, 13.13),
    Row("pointwise", 10, 29, 8, True, 9.83, 13.95, 14.78),
    Row("pointwise", 10, 29, 16, False, 17.43, 18.97, 10.93),
    Row("pointwise", 10, 29, 16, True, 9.64, 16.1, 14.27),
    Row("pointwise", 10, 32, 2, False, 14.89, 22.97, 81.1),
    Row("pointwise", 10, 32, 2, True, 11.49, 21.54, 83.55),
    Row("pointwise", 10, 32, 4, False, 11.19, 13.74, 22.91),
    Row("pointwise", 10, 32, 4, True, 8.97, 12.39, 24.49),
    Row("pointwise", 10, 32, 8, False, 11.02, 12.37, 11.99),
    Row("pointwise", 10, 32, 8, True, 8.91, 10.95, 13.23),
    Row("pointwise", 10, 32, 16, False, 17.5, 15.92, 10.66),
    Row("pointwise", 10, 32, 16, True, 8.72, 11.93, 12.78),
    Row("pointwise", 10, 40, 2, False, 15.22, 23.65, 79.53),
    Row("pointwise", 10, 40, 2, True, 12.1, 23.02, 81.09),
    Row("pointwise", 10, 40, 4, False, 10.38, 14.37, 21.88),
    Row("pointwise", 10, 40, 4, True, 8.82, 13.77, 23.57),
    Row("pointwise", 10, 40, 8, False, 11.09, 15.35, 12.14),
    Row("pointwise", 10, 40, 8, True, 8.9, 13.26, 13.63),
    Row("pointwise", 10, 40, 16, False, 14.47, 17.9, 10.68),
    Row("pointwise", 10, 40, 16, True, 8.49, 14.98, 12.27),
    Row("pointwise", 10, 64, 2, False, 14.98, 16.04, 72.66),
    Row("pointwise", 10, 64, 2, True, 13.31, 15.12, 74.96),
    Row("pointwise", 10, 64, 4, False, 11.74, 13.77, 26.21),
    Row("pointwise", 10, 64, 4, True, 9.25, 10.94, 21.07),
    Row("pointwise", 10, 64, 8, False, 9.91, 10.9, 10.4),
    Row("pointwise", 10, 64, 8, True, 8.67, 10.39, 11.46),
    Row("pointwise", 10, 128, 2, False, 12.67, 13.08, 70.9),
    Row("pointwise", 10, 128, 2, True, 12.45, 12.74, 72.11),
    Row("pointwise", 10, 128, 4, False, 9.24, 9.74, 18.87),
    Row("pointwise", 10, 128, 4, True, 8.77, 9.38, 19.38),
    Row("pool", 5, 16, 4, False, 280.94, 633.52, 4809.55),
    Row("pool", 5, 16, 8, False, 367.37, 563.28, 6129.63),
    Row("pool", 5, 16, 16, False, 601.6, 688.85, 6171.59),
    Row("pool", 5, 16, 32, False, 537.71, 885.19, 6006.3),
    Row("pool", 5, 64, 4, False, 207.13, 284.73, 4955.85),
    Row("pool", 5, 64, 8, False, 476.34, 354.14, 6124.09),
    Row("pool", 5, 64, 16, False, 484.8, 382.25, 6108.81),
    Row("pool", 5, 64, 32, False, 1376.95, 470.09, 6718.26),
    Row("recorded", 5, 16, 4, False, 56.74, 127.8, None),
    Row("recorded", 5, 16, 8, False, 46.28, 64.74, None),
    Row("recorded", 5, 16, 16, False, 57.69, 55.22, None),
    Row("recorded", 5, 20, 2, False, 123.06, 251.73, None),
    Row("recorded", 5, 20, 4, False, 67.86, 109.22, None),
    Row("recorded", 5, 20, 8, False, 54.35, 67.82, None),
    Row("recorded", 5, 20, 16, False, 75.11, 64.82, None),
    Row("recorded", 5, 64, 2, False, 43.92, 62.58, None),
    Row("recorded", 5, 64, 4, False, 27.25, 30.28, None),
    Row("recorded", 5, 64, 8, False, 27.6, 27.52, None),
    Row("recorded", 5, 64, 16, False, 31.5, 27.33, None),
    Row("recorded", 5, 128, 2, False, 51.95, 46.64, None),
    Row("recorded", 5, 128, 4, False, 26.59, 25.14, None),
    Row("recorded", 5, 128, 8, False, 26.25, 23.62, None),
    Row("recorded", 10, 16, 2, False, 91.29, 328.33, None),
    Row("recorded", 10, 16, 4, False, 54.38, 147.47, None),
    Row("recorded", 10, 16, 8, False, 47.41, 71.48, None),
    Row("recorded", 10, 16, 16, False, 73.9, 57.44, None),
    Row("recorded", 10, 20, 2, False, 116.39, 291.68, None),
    Row("recorded", 10, 20, 4, False, 77.93, 125.23, None),
    Row("recorded", 10, 20, 8, False, 67.45, 72.17, None),
    Row("recorded", 10, 20, 16, False, 77.18, 60.11, None),
    Row("recorded", 10, 64, 2, False, 53.77, 68.34, None),
    Row("recorded", 10, 64, 4, False, 34.42, 34.21, None),
    Row("recorded", 10, 64, 8, False, 32.06, 27.88, None),
    Row("recorded", 10, 128, 2, False, 55.43, 52.94, None),
    Row("recorded", 10, 128, 4, False, 30.59, 27.45, None),
    Row("spatial", 5, 14, 4, False, 22.82, 40.72, 39.48),
    Row("spatial", 5, 14, 8, False, 14.47, 23.26, 23.45),
    Row("spatial", 5, 14, 16, False, 14.44, 22.1, 14.12),
    Row("spatial", 5, 14, 32, False, 25.67, 21.63, 11.67),
    Row("spatial", 5, 16, 4, False, 16.65, 32.73, 36.18),
    Row("spatial", 5, 16, 8, False, 10.61, 16.77, 21.77),
    Row("spatial", 5, 16, 16, False, 12.81, 15.36, 13.65),
    Row("spatial", 5, 16, 32, False, 21.86, 14.51, 11.86),
    Row("spatial", 5, 20, 2, False, 38.35, 61.99, 102.1),
    Row("spatial", 5, 20, 4, False, 25.14, 35.7, 35.01),
    Row("spatial", 5, 20, 8, False, 19.46, 22.64, 21.52),
    Row("spatial", 5, 20, 16, False, 18.16, 19.07, 12.51),
    Row("spatial", 5, 20, 32, False, 22.31, 22.91, 12.28),
    Row("spatial", 5, 29, 2, False, 25.71, 39.51, 93.99),
    Row("spatial", 5, 29, 4, False, 18.22, 22.21, 29.33),
    Row("spatial", 5, 29, 8, False, 15.22, 14.04, 20.12),
    Row("spatial", 5, 29, 16, False, 12.85, 12.07, 11.65),
    Row("spatial", 5, 29, 32, False, 12.8, 13.3, 10.45),
    Row("spatial", 5, 32, 2, False, 18.36, 25.49, 89.83),
    Row("spatial", 5, 32, 4, False, 11.58, 13.91, 26.71),
    Row("spatial", 5, 32, 8, False, 13.73, 11.65, 18.34),
    Row("spatial", 5, 32, 16, False, 13.47, 10.77, 11.45),
    Row("spatial", 5, 32, 32, False, 12.68, 11.55, 10.28),
    Row("spatial", 5, 40, 2, False, 21.82, 29.12, 90.01),
    Row("spatial", 5, 40, 4, False, 17.18, 18.04, 26.04),
    Row("spatial", 5, 40, 8, False, 13.81, 14.84, 20.61),
    Row("spatial", 5, 40, 16, False, 12.34, 12.48, 11.96),
    Row("spatial", 5, 64, 2, False, 15.79, 17.11, 79.25),
    Row("spatial", 5, 64, 4, False, 9.37, 8.64, 21.86),
    Row("spatial", 5, 64, 8, False, 9.21, 8.07, 15.18),
    Row("spatial", 5, 64, 16, False, 10.46, 9.05, 9.86),
    Row("spatial", 5, 128, 2, False, 15.95, 11.36, 74.22),
    Row("spatial", 5, 128, 4, False, 8.81, 7.12, 19.68),
    Row("spatial", 5, 128, 8, False, 8.06, 7.88, 14.68),
    Row("spatial", 10, 14, 2, False, 32.29, 88.45, 108.85),
    Row("spatial", 10, 14, 4, False, 18.75, 38.72, 36.4),
    Row("spatial", 10, 14, 8, False, 14.42, 22.35, 21.97),
    Row("spatial", 10, 14, 16, False, 22.63, 22.49, 12.95),
    Row("spatial", 10, 14, 32, False, 25.13, 20.67, 12.31),
    Row("spatial", 10, 16, 2, False, 23.15, 74.69, 102.86),
    Row("spatial", 10, 16, 4, False, 14.44, 32.22, 33.66),
    Row("spatial", 10, 16, 8, False, 9.9, 16.64, 20.48),
    Row("spatial", 10, 16, 16, False, 17.69, 16.98, 12.53),
    Row("spatial", 10, 16, 32, False, 21.22, 17.77, 11.43),
    Row("spatial", 10, 20, 2, False, 32.97, 62.17, 97.73),
    Row("spatial", 10, 20, 4, False, 22.39, 31.35, 30.63),
    Row("spatial", 10, 20, 8, False, 19.37, 19.81, 19.33),
    Row("spatial", 10, 20, 16, False, 20.16, 21.68, 11.48),
    Row("spatial", 10, 20, 32, False, 18.92, 22.33, 10.74),
    Row("spatial", 10, 29, 2, False, 20.93, 33.64, 89.88),
    Row("spatial", 10, 29, 4, False, 15.56, 21.04, 27.32),
    Row("spatial", 10, 29, 8, False, 13.63, 12.78, 17.61),
    Row("spatial", 10, 29, 16, False, 15.3, 11.6, 10.91),
    Row("spatial", 10, 32, 2, False, 19.94, 27.51, 90.11),
    Row("spatial", 10, 32, 4, False, 11.93, 14.19, 26.19),
    Row("spatial", 10, 32, 8, False, 13.2, 10.97, 17.41),
    Row("spatial", 10, 32, 16, False, 15.71, 11.28, 11.22),
    Row("spatial", 10, 40, 2, False, 21.4, 28.48, 86.63),
    Row("spatial", 10, 40, 4, False, 15.74, 17.67, 24.86),
    Row("spatial", 10, 40, 8, False, 13.49, 12.34, 17.0),
    Row("spatial", 10, 40, 16, False, 13.17, 12.1, 10.82),
    Row("spatial", 10, 64, 2, False, 16.56, 16.29, 77.26),
    Row("spatial", 10, 64, 4, False, 10.06, 8.19, 21.47),
    Row("spatial", 10, 64, 8, False, 8.81, 8.0, 14.77),
    Row("spatial", 10, 128, 2, False, 15.68, 11.01, 73.48),
    Row("spatial", 10, 128, 4, False, 8.5, 6.67, 19.41),
    Row("stem", 5, 14, 8, False, 34.81, 51.47, 37.27),
    Row("stem", 5, 14, 16, False, 24.64, 28.49, 20.32),
    Row("stem", 5, 14, 32, False, 76.33, 25.73, 22.13),
    Row("stem", 5, 16, 8, False, 49.89, 46.02, 47.97),
    Row("stem", 5, 16, 16, False, 35.81, 25.43, 23.35),
    Row("stem", 5, 16, 32, False, 83.48, 29.34, 26.31),
    Row("stem", 5, 20, 8, False, 29.08, 44.39, 37.95),
    Row("stem", 5, 20, 16, False, 28.31, 28.18, 19.18),
    Row("stem", 5, 20, 32, False, 86.96, 37.3, 25.58),
    Row("stem", 5, 29, 8, False, 29.74, 31.01, 34.38),
    Row("stem", 5, 29, 16, False, 21.88, 21.72, 20.47),
    Row("stem", 5, 29, 32, False, 44.31, 17.43, 27.74),
    Row("stem", 5, 32, 8, False, 29.55, 25.27, 34.55),
    Row("stem", 5, 32, 16, False, 24.05, 16.31, 20.06),
    Row("stem", 5, 32, 32, False, 38.33, 14.01, 26.36),
    Row("stem", 5, 40, 8, False, 24.3, 32.34, 35.28),
    Row("stem", 5, 40, 16, False, 23.99, 18.34, 20.16),
    Row("stem", 5, 40, 32, False, 38.75, 20.87, 26.32),
    Row("stem", 5, 64, 8, False, 26.72, 16.35, 33.62),
    Row("stem", 5, 64, 16, False, 23.07, 18.3, 19.79),
    Row("stem", 5, 64, 32, False, 37.03, 14.57, 24.68),
    Row("stem", 5, 128, 8, False, 21.26, 16.5, 32.57),
    Row("stem", 5, 128, 16, False, 42.74, 18.59, 27.22),
    Row("stem", 5, 128, 32, False, 34.43, 70.3, 22.82),
    Row("stem", 10, 14, 8, False, 25.65, 51.82, 36.68),
    Row("stem", 10, 14, 16, False, 14.81, 28.5, 18.47),
    Row("stem", 10, 14, 32, False, 36.25, 27.2, 25.3),
    Row("stem", 10, 16, 8, False, 36.62, 46.02, 39.52),
    Row("stem", 10, 16, 16, False, 15.19, 24.72, 18.18),
    Row("stem", 10, 16, 32, False, 37.17, 19.26, 25.89),
    Row("stem", 10, 20, 8, False, 25.67, 44.9, 34.83),
    Row("stem", 10, 20, 16, False, 18.0, 28.51, 18.96),
    Row("stem", 10, 20, 32, False, 38.0, 24.97, 25.5),
    Row("stem", 10, 29, 8, False, 25.02, 30.95, 34.31),
    Row("stem", 10, 29, 16, False, 21.3, 21.58, 18.61),
    Row("stem", 10, 29, 32, False, 40.18, 17.48, 25.48),
    Row("stem", 10, 32, 8, False, 22.1, 25.59, 35.73),
    Row("stem", 10, 32, 16, False, 20.94, 16.21, 19.34),
    Row("stem", 10, 32, 32, False, 37.14, 17.33, 25.03),
    Row("stem", 10, 40, 8, False, 28.37, 33.07, 35.47),
    Row("stem", 10, 40, 16, False, 23.46, 19.22, 19.39),
    Row("stem", 10, 40, 32, False, 36.69, 19.65, 24.62),
    Row("stem", 10, 64, 8, False, 28.05, 16.94, 35.71),
    Row("stem", 10, 64, 16, False, 44.21, 13.32, 27.74),
    Row("stem", 10, 64, 32, False, 36.09, 14.03, 23.47),
    Row("stem", 10, 128, 8, False, 26.81, 17.33, 35.15),
    Row("stem", 10, 128, 16, False, 39.92, 18.56, 25.81),
    Row("stem", 10, 128, 32, False, 27.56, 70.2, 21.9),
)


def choose(works: Sequence[Work], branches: int, channels_last: bool, device: str, direct: bool) -> str:
    """The lowering of M branches that costs least: the sum over the layers, each at the cost of the nearest row.

    Other devices than the CPU take grouped convolutions, which their libraries do in one launch.

    Args:
        works: a block's layers.
        branches: M.
        channels_last: layout of the blocks' input.
        device: a torch device's type.
        direct: whether ``"direct"`` can serve.
    """
    if device != "cpu" or not works:
        return "grouped"
    totals = [0.0, 0.0, 0.0]
    for work in works:
        width, size = max(work.width, 1.0), max(work.size, 1.0)
        row = nearest(work.kind, max(branches, 1), width, work.whole, size, channels_last)
        for way, cost in enumerate((row.grouped, row.separate, row.direct)):
            totals[way] += math.inf if cost is None else cost * work.amount
    if not direct:
        totals[2] = math.inf
    return LOWERINGS[totals.index(min(totals))]


@functools.lru_cache(maxsize=4096)
def nearest(kind: str, branches: int, width: float, whole: bool, size: float, channels_last: bool) -> Row:
    """The row of this kind that lies nearest."""

    def distance(row: Row) -> float:
        apart = BRANCHES_WEIGHT * abs(math.log(row.branches / branches))
        apart += VECTOR_WEIGHT * ((row.width % VECTOR == 0) != whole)
        return apart + abs(math.log(row.width / width)) + abs(math.log(row.size / size))

    layouts = (channels_last,) if kind == "pointwise" else (False,)
    return min((row for row in ROWS if row.kind == kind and row.channels_last in layouts), key=distance)
