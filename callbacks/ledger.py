"""The ledger of a run: what was seen of each stream, and from where any step can be replayed."""

import json
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

import ranks
from callbacks.guards import step_loss
from callbacks.step_log import StepLines, append_line, step_of
from data.feed.batches import SEEN
from flexbert_core.durable import sync


class Ledger(Callback):
    """Counts what the steps trained on, per stream, and writes a line to ledger.jsonl with every checkpoint. Steps that
    were not applied are not counted.

    A line: {"step", "tokens" (slots), "streams": {name: {one count for each of data.feed.batches.SEEN}}, "data": {name:
    fingerprint of its shards}, "lanes": cursors}. A rollback adds {"step": gone back to, "skip": [first, last] steps
    not trained on, "spike": what was seen}; it stays for ever, so that restarts and replays know.
    Numbers depend on neither world size nor restarts. `unique_documents` is exact as long as min_length and
    long_documents of a stream stay the same in all phases; else it is a lower bound.
    """

    def __init__(self, file: Path, stream_names: list[str]) -> None:
        self.file, self.stream_names = file, stream_names
        self._lines = StepLines(file)
        shape = (len(stream_names), len(SEEN))
        self._reduced = torch.zeros(shape, dtype=torch.int64)  # over ranks, up to the last reduction
        self._local = torch.zeros(shape, dtype=torch.int64)  # this rank's since then

    def batch_end(self, state: State, logger: Logger) -> None:
        if step_loss(state) is not None:
            self._local += torch.from_numpy(state.batch["seen"])

    def totals(self) -> dict[str, dict[str, int]]:
        """Counts of the run so far by stream, over all ranks. A collective."""
        self._reduced += ranks.over_ranks(self._local)
        self._local = torch.zeros_like(self._local)
        rows = zip(self.stream_names, self._reduced.tolist(), strict=True)
        return {name: dict(zip(SEEN, row, strict=True)) for name, row in rows}

    def real_tokens(self) -> dict[str, int]:
        """Tokens that are no padding, [CLS] and [SEP] among them, by stream. A collective."""
        return {name: counts["tokens"] + 2 * counts["sequences"] for name, counts in self.totals().items()}

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint. A collective."""
        return self.totals()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reduced = torch.tensor([[state[name][key] for key in SEEN] for name in self.stream_names])

    def write(self, step: int, tokens: int, lanes: list[Any], fingerprints: dict[str, str]) -> None:
        """Add the line of a checkpoint, when there is room for it: without it a replay begins at the line before. A
        collective."""
        line = {"step": step, "tokens": tokens, "streams": self.totals(), "data": fingerprints, "lanes": lanes}
        if ranks.rank() == 0:
            self._lines.append(line)

    def close(self, state: State, logger: Logger) -> None:
        self._lines.close()

    def write_skip(self, step: int, skip: range, spike: dict[str, Any]) -> None:
        """Add the line of a rollback to `step`, synced: what follows depends on it (rank 0). Raises OSError."""
        self._lines.write()
        append_line(self.file, {"step": step, "skip": first_and_last(skip), "spike": spike})
        sync(self.file)

    def skips(self) -> list[range]:
        """The steps that rollbacks have taken out of the run (1-based), read from the file."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        known = [json.loads(line) for line in lines if _is_skip(line)]
        return [range(line["skip"][0], line["skip"][1] + 1) for line in known]

    def trim(self, step: int) -> None:
        """Drop the lines of steps that a restart will repeat (rank 0)."""
        self._lines.trim(step, keep=_is_skip)


def knows_rollbacks(state: dict[str, Any], skipped: list[range]) -> bool:
    """Whether a checkpoint's state is of the history in which these steps were skipped: it is of before them, or was
    written by a run that had skipped them."""
    known = state["faults"]["skipped"]
    return all(state["step"] < steps.start or first_and_last(steps) in known for steps in skipped)


def first_and_last(steps: range) -> list[int]:
    """As JSON holds skipped steps."""
    return [steps.start, steps.stop - 1]


def _is_skip(line: str) -> bool:
    return '"skip": [' in line and step_of(line) < float("inf")


def nearest_line(file: Path, step: int) -> dict[str, Any] | None:
    """The last line at or before `step`, from which the loader can go on; None: begin at step 0."""
    lines = file.read_text().splitlines() if file.exists() else []
    known = [line for line in lines if step_of(line) <= step and not _is_skip(line)]
    return json.loads(known[-1]) if known else None
