"""Memory of the training processes."""

from typing import Any

import psutil
import torch
from composer.core import State

import ranks
from callbacks.clock import Clock, Window
from callbacks.gauge import Gauge


class Memory(Gauge):
    """The largest of all ranks.

    | logged | unit | event, interval |
    |---|---|---|
    | host_memory_bytes | resident memory of the training process, without its loader workers | when read |
    | cuda_peak_bytes | most that tensors held at once since the last line; CUDA only | when read |
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._process = psutil.Process()

    def read(self, state: State, window: Window) -> dict[str, Any]:
        on_cuda = torch.cuda.is_available()
        values = [self._process.memory_info().rss, torch.cuda.max_memory_allocated() if on_cuda else 0]
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        host, cuda = ranks.over_ranks(torch.tensor(values), "MAX").tolist()
        return {"host_memory_bytes": host} | ({"cuda_peak_bytes": cuda} if on_cuda else {})
