"""Which of CUDA and Triton serves an operator's call on a GPU: one table, keyed on operator, device and size.

Where both are there, the CUDA core serves, unless :data:`CROSSOVER` names a size (bytes of the call's first tensor)
from which Triton does.  On the CPU there is nothing to choose: the CPU core serves, or the reference.

**No threshold here has been measured on a GPU yet.**  They are set from what is known without one:

* A launch costs the host about 3 to 5 µs through the compiled core (one call through pybind11 and ``<<<>>>``) and 10 to
  20 µs through Triton, whose launcher looks at every argument in Python to find its specialisation.  The GPU runs
  behind the host, so this shows as long as the kernel is shorter than the launch.  At an H200's 4.8 TB/s 20 µs are
  96 MB of traffic, which is where the two meet when their kernels are equally good: :data:`LAUNCH_HIDDEN` is that, for
  an operator which reads its first tensor once and writes as much.
* Below it CUDA is right for every operator.  Above it, where both only move memory (blend, boxes, the means, fuse, and
  contrastive beside its products), neither can win by more than the last tenth of the bandwidth, and CUDA stays, since
  it compiles nothing at first use.
* The row losses are different: with tens of thousands of classes their work per byte (exponentials, two passes over a
  row whose second one finds it in the L2) depends on how rows are cut into tiles, which Triton picks per shape and a
  compiled core has to fix.  There Triton takes the large sizes.
  Ensembles are not among them: Triton reads their teachers once more, for the sums of exponentials.

Whoever has a GPU replaces these by measurement: ``python -m pytest benchmarks --record --device cuda`` with
``FEDKERN_BACKEND`` set to each, which has files of its own then.
"""

from __future__ import annotations

# Bytes of the first tensor from which Triton's launch hides behind its kernel on the slowest supported device (sm_80,
# 2 TB/s) and the fastest (sm_100, 8 TB/s): 20 µs of traffic, half of it the first tensor.
LAUNCH_HIDDEN = {8: 20 << 20, 9: 48 << 20, 10: 80 << 20}

# Operators whose large sizes go to Triton; None: at no size.
CROSSOVER: dict[str, dict[int, int] | None] = {
    "blend": None,
    "boxes": None,
    "aggregate": None,
    "kl_div": LAUNCH_HIDDEN,
    "dual_kl": LAUNCH_HIDDEN,
    "entropy": LAUNCH_HIDDEN,
    "ensemble_kl": None,
    "js_div": None,
    "consensus": None,
    "contrastive": None,
    "fuse_concat": None,
    "fuse_mean": None,
    "optimise": None,
}


def threshold(operator: str, other: str, capability: tuple[int, int]) -> int | None:
    """Bytes of a call's first tensor from which ``other`` serves ``operator`` instead of the CUDA core, or None.

    Args:
        operator: as it is registered with :func:`fedkern.ops.backend.register`.
        other: the second backend that can serve; the table knows "triton".
        capability: the device's compute capability, (9, 0) for an H200.
    """
    sizes = CROSSOVER.get(operator)
    if sizes is None or other != "triton":
        return None
    # A device newer than the table: as the newest in it.
    return sizes[max((major for major in sizes if major <= capability[0]), default=min(sizes))]
