"""How fast training goes, and what share of the hardware's peak that is."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import State
from composer.loggers import Logger
from numpy.typing import NDArray

import ranks
from callbacks.clock import Clock, Window
from callbacks.gauge import Gauge
from callbacks.guards import StepGuard
from data.feed.masking import IGNORE


class Efficiency(Gauge):
    """Speed in tokens and in operations.

    | logged | unit | event, interval |
    |---|---|---|
    | tokens_per_second | real tokens / s since the last line, all ranks, less evaluation and saving | BATCH_END |
    | slots_per_second | the same with padding; it counts steps that are left out, too | same |
    | flops_per_second | of the model on these very sequences and masked tokens, all ranks | same |
    | mfu | model FLOPs utilisation: that over the peak of all devices (PaLM, arXiv 2204.02311, app. B); absent without
      a known peak | same |

    Sequences are packed and do not see each other, so attention's share counts what they see, not whole rows. Steps
    that are left out compute nothing, and have no operations. Slots over slots_per_second are the seconds of a line.
    """

    def __init__(
        self,
        clock: Clock,
        guard: StepGuard,
        flops: Callable[[int, NDArray[np.int64], NDArray[np.int64]], float],
        peak_flops: float | None,
    ) -> None:
        """flops: of forward and backward in a phase, by its number, over sequences of these lengths, with so many
        masked tokens in each. peak_flops: of one device, in FLOP/s."""
        super().__init__(clock)
        self.guard, self.flops, self.peak_flops = guard, flops, peak_flops
        self._sequences = defaultdict[int, list[NDArray[np.int64]]](list)  # of each phase: lengths and masked tokens

    def fit_start(self, state: State, logger: Logger) -> None:
        self._sequences.clear()

    def take_in(self, state: State) -> None:
        if not self.guard.computed:
            return
        bounds = state.batch["cu_seqlens"].long()
        masked = F.pad((state.batch["labels"] != IGNORE).cumsum(0), (1, 0)).index_select(0, bounds)
        self._sequences[state.batch["phase"]].append(torch.stack([bounds, masked]).diff().cpu().numpy())

    def read(self, state: State, window: Window) -> dict[str, Any]:
        flops = sum(self.flops(phase, *np.concatenate(steps, 1)) for phase, steps in self._sequences.items())
        rate = float(ranks.over_ranks(torch.tensor([flops], dtype=torch.float64))) / window.seconds
        self._sequences.clear()
        line = {
            "tokens_per_second": window.real_tokens / window.seconds,
            "slots_per_second": window.slots / window.seconds,
            "flops_per_second": rate,
        }
        if self.peak_flops is not None:
            line["mfu"] = rate / (self.peak_flops * ranks.world_size())
        return line
