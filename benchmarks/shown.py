"""Rows that docs/speed.md shows, at most sixty: every operator, at sizes that users have.

``pytest benchmarks --shown --record`` records them in a quarter of an hour.  ``pytest benchmarks --set-floors``
measures the quicker ones for the gate.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Shown:
    """Case of an operator.

    Attributes:
        operator, size: as the page has them.
        against: the plain PyTorch that the page compares with.
        threads: with how many it is measured; with one where two make no difference, or the time is long.
        held: the baseline of the gate's floor, where it is another: a copy of the operator's bytes where PyTorch's time
            depends on how much memory the process has at hand.
    """

    operator: str
    size: str
    against: str = "eager"
    threads: tuple[int, ...] = (1, 2)
    held: str = ""


ONE, COPY = (1,), "copy"
# By pytest node without its number of threads, in the page's order.
SHOWN = {
    "bench_distill.py::test_kl_div[(64, 10)": Shown("`kl_div` T=2", "64×10", threads=ONE),
    "bench_distill.py::test_kl_div[(4096, 1000)": Shown("", "4096×1000", held=COPY),
    "bench_overhead.py::test_call[kl_div": Shown("", "64×10, without gradient", "one eager operator", ONE),
    "bench_distill.py::test_dual_kl[(64, 10)": Shown("`dual_kl` T=2", "64×10", threads=ONE),
    "bench_distill.py::test_entropy[(4096, 100)": Shown("`entropy`", "4096×100", held=COPY),
    "bench_ensemble.py::test_ensemble_kl[probs-shape1-to student": Shown(
        "`ensemble_kl`, 20 teachers", "256×10", threads=ONE
    ),
    "bench_ensemble.py::test_ensemble_kl[probs-shape3-to student": Shown("", "256×100", held=COPY),
    "bench_ensemble.py::test_js_div[(20, 256, 100)-far": Shown("`js_div`, K=20", "256×100", held=COPY),
    "bench_ensemble.py::test_js_div[(20, 256, 100)-near": Shown("", "256×100, nearly equal", threads=ONE, held=COPY),
    "bench_ensemble.py::test_consensus[(20, 256, 100)": Shown("`consensus`, K=20", "256×100", held=COPY),
    "bench_contrast.py::test_contrastive[256": Shown("`contrastive`", "B=256, D=128"),
    "bench_contrast.py::test_contrastive_of_large_batches[4096-128": Shown("", "B=4096, D=128", threads=ONE),
    "bench_contrast.py::test_contrastive_of_large_batches[4096-512": Shown("", "B=4096, D=512", threads=ONE),
    "bench_conv.py::test_conv_norm[cnn/8, stage 2-32": Shown("`conv_norm`, pooling", "32 of 8→16, 16×16", threads=ONE),
    "bench_conv.py::test_conv_norm[cnn/32, stage 2-32": Shown("", "32 of 32→64, 16×16", threads=ONE),
    "bench_conv.py::test_conv_norm[resnet8, width 16-32": Shown(
        "`conv_norm`, residual", "32 of 16→16, 32×32", threads=ONE
    ),
    "bench_blend.py::test_blend[(64, 256, 14, 14)-contiguous-permutation": Shown(
        "`blend`, index", "[64,256,14,14]", held=COPY
    ),
    "bench_blend.py::test_blend[(64, 256, 14, 14)-contiguous-repeated": Shown("", "the same, rows repeated", held=COPY),
    "bench_boxes.py::test_boxes[erase-large": Shown("`erase_boxes`", "[64,3,224,224], two boxes", "mask", held=COPY),
    "bench_fuse.py::test_fuse_concat[both-10-contiguous": Shown(
        "`fuse_concat` with affine, ReLU", "10 of [64,64,32,32]", held=COPY
    ),
    "bench_fuse.py::test_fuse_mean[(64, 64, 16, 16)-contiguous": Shown("`fuse_mean`", "10 of [64,64,16,16]", held=COPY),
    "bench_robust.py::test_median[10-1000000": Shown("`median`", "M=10, P=1 million", "torch", held=COPY),
    "bench_robust.py::test_trimmed_mean[10-1000000": Shown("`trimmed_mean`", "M=10, P=1 million", "torch", held=COPY),
    "bench_robust.py::test_geometric_median[10-1000000": Shown(
        "`geometric_median`", "M=10, P=1 million", "torch", held=COPY
    ),
    "bench_robust.py::test_krum[10-1000000": Shown("`krum`", "M=10, P=1 million", "torch", ONE, held=COPY),
    "bench_robust.py::test_pairwise_distances[10-1000000": Shown(
        "`pairwise_distances`", "M=10, P=1 million", "pdist", ONE, held=COPY
    ),
    "bench_robust.py::test_clip_by_norm[10-1000000": Shown("`clip_by_norm`", "10 of 1 million", held=COPY),
    "bench_robust.py::test_clip_and_noise[1-11000000": Shown("`clip_and_noise`", "P=11 million", held=COPY),
    "bench_aggregate.py::test_weighted_mean[10-11000000": Shown("`weighted_mean(out=)`", "M=10, P=11 million", "add_"),
    "bench_aggregate.py::test_weighted_mean[50-1000000": Shown("", "M=50, P=1 million", "add_", ONE),
    "bench_aggregate.py::test_sixteen_bits[bf16": Shown("", "M=10, P=11 million, bfloat16", "add_"),
    "bench_aggregate.py::test_accumulator[exact-11000000": Shown(
        "`Accumulator(exact=True).add`", "P=11 million", "add_ to float64", ONE
    ),
    "bench_server_step.py::test_adam[10-11000000": Shown("`server_step` Adam", "M=10, P=11 million", held=COPY),
    "bench_optimise.py::test_sgd[200000": Shown("`sgd_step`", "P=200,000"),
    "bench_optimise.py::test_adamw[200000": Shown("`adamw_step`", "P=200,000"),
}


def nodes() -> Iterator[tuple[str, Shown, int]]:
    """Return every row: its pytest node relative to benchmarks/, its case, and its number of threads."""
    for start, case in SHOWN.items():
        for threads in case.threads:
            yield f"{start}-{threads}]", case, threads
