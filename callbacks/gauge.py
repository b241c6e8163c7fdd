"""What a line of metrics.jsonl is made of: gauges, each of which measures one thing between two lines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Callback
from composer.utils import dist
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The steps since the last line. tokens: slots of the run so far. slots, real_tokens, seconds: of these steps, all
    ranks; seconds without evaluation and saving."""

    step: int
    tokens: int
    slots: int
    real_tokens: int
    seconds: float


class Gauge(Callback):
    """Measures through Composer's events; the same on all ranks when read, where it does not say otherwise.

    `state_dict` and `load_state_dict` (JSON values, collectives) carry what a checkpoint inside a window must keep.
    """

    def read(self, window: Window) -> dict[str, Any]:
        """Values for the line, and begin anew. Nothing to say: an empty dict. A collective."""
        raise NotImplementedError


class Reading(Gauge):
    """A gauge without memory."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read = read

    def read(self, window: Window) -> dict[str, Any]:
        return self._read()


def over_ranks(values: Tensor, operation: str = "SUM") -> Tensor:
    """Reduce a tensor over all ranks; returns it on the CPU. A collective."""
    if dist.get_world_size() > 1:
        values = values.to("cuda" if torch.cuda.is_available() else "cpu", copy=True)
        dist.all_reduce(values, operation)
    return values.cpu()
