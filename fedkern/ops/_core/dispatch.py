"""Choice between CUDA and Triton for a call on a GPU: one size by operator and GPU.

Where both are available, the CUDA core serves, unless a threshold (bytes of the call's first tensor) says from which
size Triton serves.  On the CPU there is nothing to choose: the CPU core serves, or the reference.

Thresholds that were measured are in crossovers.json, see crossovers.py.  The entry of this GPU's name counts, else the
latest of a GPU of the same major compute capability.  Where no entry names the operator, :data:`CROSSOVER` holds.

The file has an H200's, which all of compute capability 9 take.  Those in :data:`CROSSOVER` are estimates for the rest:

* Launch: it costs the host a few µs through the compiled core and many times that through Triton, whose launcher looks
  at every argument in Python to find its specialisation.  The GPU runs behind the host, so the launch shows only as
  long as the kernel is shorter than the launch.  At 4.8 TB/s, 20 µs are 96 MB of traffic.  :data:`LAUNCH_HIDDEN` is
  this size, for an operator that reads its first tensor once and writes as much.
* Below this size CUDA is right for every operator.
* Operators that only move memory (blend, boxes, the means, fuse, and contrastive beside its products): above this size
  neither backend can win by more than the last tenth of the bandwidth.  CUDA stays, since it compiles nothing at first
  use.
* Row losses: with tens of thousands of classes their work per byte (exponentials, two passes over a row, the second
  from the L2 cache) depends on how rows are cut into tiles.  Triton picks tiles per shape, a compiled core has to fix
  them.  So Triton takes the large sizes.
* Ensembles: CUDA at every size, since Triton reads the teachers once more, for the sums of exponentials.

Measurements take the estimates' place by the stages ``kernels`` and ``thresholds`` of ``benchmarks/gpu/all.sh``.
"""

from __future__ import annotations

from fedkern.ops._core import crossovers

# By major compute capability: bytes of the first tensor from which Triton's launch hides behind its kernel. They are
# half of the traffic of 20 µs. The slowest supported device (sm_80) has 2 TB/s, the fastest (sm_100) 8 TB/s.
LAUNCH_HIDDEN = {8: 20 << 20, 9: 48 << 20, 10: 80 << 20}

# Operators whose large sizes go to Triton, with the size by major compute capability; None: never to Triton.
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


def threshold(operator: str, capability: tuple[int, int], gpu: str) -> int | None:
    """Bytes of a call's first tensor from which Triton serves ``operator`` instead of the CUDA core, or None."""
    entry = crossovers.serving(gpu, capability)
    if entry is not None and operator in entry.thresholds:
        return entry.thresholds[operator]
    return estimate(operator, capability)


def estimate(operator: str, capability: tuple[int, int]) -> int | None:
    """The threshold of :data:`CROSSOVER`."""
    sizes = CROSSOVER.get(operator)
    if sizes is None:
        return None
    # A device newer than the table counts as the newest one in it.
    return sizes[max((major for major in sizes if major <= capability[0]), default=min(sizes))]
