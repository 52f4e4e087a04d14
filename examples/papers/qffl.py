"""q-FFL as its paper plays it: clients are drawn in proportion to their samples, and weigh the same.

    python -m fedkern.run qffl-by-size --plugin examples/papers/qffl.py --data examples/papers/synthetic.py:synthetic \\
        --model examples/papers/synthetic.py:Linear --momentum 0 --lr 0.1 --method-option q=1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedkern import option, register
from fedkern.methods import QFFL, Federation, Round


@register("qffl-by-size")
class BySize(QFFL):
    """q-FFL whose clients are drawn in proportion to their samples and weigh the same (arXiv 1905.10497)."""

    requires = frozenset({"loss"})
    averages = True

    @dataclass(frozen=True)
    class Options(QFFL.Options):
        weighting: str = option("uniform", "weight of a client", choices=("uniform",))
        drawn: int = option(10, "clients of a round, drawn without replacement", low=1)

    def rounds(self, federation: Federation) -> Iterator[Round]:
        rng, samples = federation.rng("by-size"), np.array(federation.samples)
        for _ in range(federation.rounds):
            clients = rng.choice(federation.clients, self.options.drawn, replace=False, p=samples / samples.sum())
            yield Round(participants=tuple(sorted(clients.tolist())))
