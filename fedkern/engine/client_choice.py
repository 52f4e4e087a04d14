"""Choice of a round's clients (``--choose``), by data size, by reported losses or by a user's function.

Every choice is a function of the candidates' sizes, int64 [K], and of their last training losses, fp64 [K] (NaN for a
client that has reported none), of the number of clients to choose, and of a generator. It returns positions in [0, K).
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fedkern.errors import UserError
from fedkern.messages.states import State
from fedkern.settings.config import RunConfig
from fedkern.streams import stream
from fedkern.usercode import named_code

Choice = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]


def by_size(sizes: np.ndarray, losses: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw without replacement, every time in proportion to the sizes of those left."""
    return rng.choice(len(sizes), size=count, replace=False, p=sizes / sizes.sum())


def by_loss(sizes: np.ndarray, losses: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Take the highest losses, first candidates without a loss, and draw among equals."""
    order = rng.permutation(len(losses))
    ranks = np.argsort(-np.nan_to_num(losses, nan=np.inf)[order], kind="stable")
    return order[ranks[:count]]


def power_of_choice(
    candidates: int, sizes: np.ndarray, losses: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw candidates by size, and take those with the highest losses (π_rpow-d of Cho et al., arXiv 2010.01243)."""
    drawn = by_size(sizes, losses, candidates, rng)
    chosen: np.ndarray = drawn[by_loss(sizes[drawn], losses[drawn], count, rng)]
    return chosen


class ClientChoice:
    """Choice of clients in a run.

    Attributes:
        losses: last training loss that every client reported, fp64 [K], NaN before its first.
    """

    def __init__(self, config: RunConfig, samples: Sequence[int]) -> None:
        self._config, self._count = config, config.sampled_clients
        self._sizes = np.array(samples)
        self.losses = torch.full((len(self._sizes),), math.nan, dtype=torch.float64)
        name, _, candidates = config.choose.partition(":")
        self._own = named_code.parse(config.choose)
        self._choose: Choice = by_size if name == "size" else by_loss
        if self._own is not None:
            self._function: Any = named_code.load(self._own, "the choice of clients")[0]
        elif candidates:
            if not self._count <= int(candidates) <= len(self._sizes):
                raise UserError(
                    f"--choose {config.choose} must draw at least the {self._count} clients of a round and at most all "
                    f"{len(self._sizes)}: take another number of candidates, or another --sample-fraction."
                )
            self._choose = partial(power_of_choice, int(candidates))

    def draw(self, round: int) -> list[int]:
        """Return the clients of a round, of which there are more, in ascending order."""
        rng, losses = stream(self._config.seed, "choice", round=round), self.losses.numpy()
        if self._own is None:
            return sorted(self._choose(self._sizes, losses, self._count, rng).tolist())
        name = f"--choose {self._config.choose}"
        with named_code.host_code(self._own.file), named_code.explain_errors(name, self._function):
            chosen = [*map(operator.index, self._function(round, self._sizes.copy(), losses.copy(), self._count, rng))]
        clients = {*chosen} & {*range(len(self._sizes))}
        if not len(clients) == len(chosen) == self._count:
            raise UserError(
                f"{name} must return {self._count} different clients from 0 to {len(self._sizes) - 1}, not {chosen}."
            )
        return sorted(clients)

    def note_losses(self, reports: Mapping[str, State]) -> None:
        """Note the losses among the reports of a round's clients, by their ids as texts."""
        for k, report in reports.items():
            if math.isfinite(loss := report.get("loss", math.nan)):
                self.losses[int(k)] = loss
        if self.losses.isnan().all() and self._own is None and self._choose is not by_size:
            raise UserError(
                f"--choose {self._config.choose} needs training losses, and {self._config.method}'s clients report "
                'none: have client.report["loss"] hold one, or take --choose size.'
            )
