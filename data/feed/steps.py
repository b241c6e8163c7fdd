"""Which phase a step belongs to, and how far that has come."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

from data.feed.masking import MaskingConfig


class PhaseSteps(Protocol):
    """What is read of the loader's phases. masking: a MaskingConfig."""

    number: int | None
    steps: int
    global_batch_size: int
    max_seq_len: int
    masking: Any


class Steps:
    """The steps of the loader's phases, which are parts of the run file's: those of one number follow one another."""

    def __init__(self, phases: Sequence[PhaseSteps]) -> None:
        self.phases = phases
        self._ends = list(accumulate(phase.steps for phase in phases))
        self._numbers = [index if phase.number is None else phase.number for index, phase in enumerate(phases)]
        self._before, self._totals = list[int](), dict[int, int]()  # tokens (slots) of the run file's phases
        for number, phase in zip(self._numbers, phases, strict=True):
            self._before.append(self._totals.get(number, 0))
            tokens = phase.steps * phase.global_batch_size * phase.max_seq_len
            self._totals[number] = self._before[-1] + tokens

    @property
    def total(self) -> int:
        """Of all phases."""
        return self._ends[-1]

    def index(self, step: int) -> int:
        """Place in `phases`."""
        return bisect_right(self._ends, step)

    def number(self, step: int) -> int:
        """Of the run file's phase."""
        return self._numbers[self.index(step)]

    def masking(self, step: int) -> MaskingConfig:
        """With the rate that the phase has come to."""
        index = self.index(step)
        phase = self.phases[index]
        steps = step - (self._ends[index] - phase.steps)
        done = self._before[index] + steps * phase.global_batch_size * phase.max_seq_len
        return phase.masking.at(done / max(self._totals[self._numbers[index]], 1))
