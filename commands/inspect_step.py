"""Any step of a run again: which documents its global batch held, decoded, with masks shown."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from callbacks.ledger import nearest_line
from callbacks.step_log import read_lines
from data.feed.batches import Assembler, join_pieces
from data.feed.lanes import Rows
from data.feed.loader import MixtureDataset, tokenizer_folder
from data.feed.masking import IGNORE, MaskingConfig, is_causal
from data.store.shards import Stream
from data.tokenizer import corpus_tokenizer
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from training.folder import RunFolder


def inspect_step(path: Path, step: int, rows: int, as_json: bool, console: Console) -> None:
    """Print the global batch of a run's step (1-based, as in metrics.jsonl). Reads, never writes; the run may be live.

    rows: printed at most; 0: all. as_json: one JSON line for each piece instead of panels. Of a step that a rollback
    took out of the run, both say so.
    Raises ConfigError when `path` is no run or has no such step, RunError for a damaged shard.
    """
    folder = RunFolder(path)
    config = folder.recorded_config()
    plan = PhasePlan(config)
    if not 1 <= step <= plan.total_steps:
        raise ConfigError(f"--step: {step}: {path} has steps 1 to {plan.total_steps}")
    dataset = MixtureDataset(plan.loader_config(config), 0, 1)
    line = nearest_line(folder.ledger, step - 1)
    if line is not None:
        for name, stream in zip(config.data.streams, dataset.streams, strict=True):
            if line["data"][name] != stream.fingerprint:
                raise ConfigError(f"data.streams.{name}: its shards are not those that {path} was trained on")
        dataset.load_state_dict({key: line[key] for key in ("step", "lanes")})
    elif (later := next((each for each in read_lines(folder.ledger) if "lanes" in each), None)) is not None:
        dataset.keep_rule(later["lanes"])
    spike = _skipped_for(folder.ledger, step)
    left_out = any(step in steps for steps in config.trainer.skipped)
    _, loader_phase, taken, _ = next(islice(dataset.plan(), step - 1 - dataset.step, None))
    phase = plan.at(step - 1)
    last = max((line["step"] for line in read_lines(folder.metrics)), default=0)
    shown = rows or sum(part.count for part in taken)
    if not as_json:
        console.print(
            f"{path}, step {step} ({phase.name}; tokens {plan.tokens_before(step - 1):,} to "
            f"{plan.tokens_before(step):,}): {loader_phase.global_batch_size} rows of {phase.max_seq_len}"
            + (f", the first {shown} below (--rows 0: all)" if shown < loader_phase.global_batch_size else "")
            + (f"\nthis step was skipped (loss spike in step {spike})" if spike is not None else "")
            + ("\nthis step is left out (trainer.skip_steps)" if left_out else "")
            + (f"\nnot trained yet: the last step that is known is {last}" if step > last else "")
            + (
                "\neach token is told from those before it"
                if phase.is_causal
                else "\n⟦the⟧ is masked, ⟦the→cat⟧ replaced, ⟦the=⟧ kept but to be predicted"
            ),
            soft_wrap=True,
        )
    Printer(config, dataset.streams, console, as_json, spike, left_out).show(
        taken, shown, phase.max_seq_len, dataset.steps.masking(step - 1)
    )


def _skipped_for(ledger: Path, step: int) -> int | None:
    """The step whose loss jumped, when a rollback has taken this one out of the run; the latest."""
    skips = [line for line in read_lines(ledger) if "skip" in line and line["skip"][0] <= step <= line["skip"][1]]
    return skips[-1]["spike"]["step"] if skips else None


class Printer:
    """Prints rows piece by piece."""

    def __init__(
        self,
        config: RunConfig,
        streams: Sequence[Stream],
        console: Console,
        as_json: bool,
        spike: int | None,
        left_out: bool,
    ) -> None:
        """spike: the step for whose loss this one was skipped. left_out: whether the run file skips it."""
        self.spike, self.left_out = spike, left_out
        self.names, self.streams, self.console, self.as_json = list(config.data.streams), streams, console, as_json
        self.assembler = Assembler(streams, config.seed, partial(tokenizer_folder, config.data))
        self.tokenizer = corpus_tokenizer(tokenizer_folder(config.data))
        self.mask = streams[0].manifest.mask_token_id

    def show(self, taken: list[Rows], limit: int, max_seq_len: int, masking: MaskingConfig) -> None:
        """The first `limit` rows of a step."""
        row = 0
        for part in taken:
            for index in range(min(part.count, limit - row)):
                self._row(row, part.take(index, 1), max_seq_len, masking)
                row += 1

    def _row(self, row: int, rows: Rows, max_seq_len: int, masking: MaskingConfig) -> None:
        batch = self.assembler.batch([rows], max_seq_len, masking).unpack()
        rate = {"rate": round(float(batch["row_rates"][0]), 6)} if "row_rates" in batch else {}
        documents, pieces = join_pieces([rows])
        bounds = batch["cu_seqlens"].tolist()
        for number, (begin, end) in enumerate(pairwise(bounds)):
            stream, shard = int(documents.stream[number]), int(documents.shard[number])
            facts = {
                "row": row,
                "stream": self.names[stream],
                "shard": self.streams[stream].manifest.shards[shard].file,
                "document": int(documents.index[number]),
                "start": int(pieces.start[number]),
                "stop": int(pieces.stop[number]),
                "length": int(documents.length[number]),
                "pass": int(documents.number[number]),
                **rate,
            }
            ids, labels = (batch[key][begin + 1 : end - 1].tolist() for key in ("input_ids", "labels"))
            hidden = [IGNORE] * len(ids) if is_causal(masking) else labels
            if self.as_json:
                line = {
                    **facts,
                    "skipped_for_spike_in_step": self.spike,
                    "left_out": self.left_out,
                    "input_ids": ids,
                    "labels": labels,
                    "text": self._text(ids, hidden).plain,
                }
                sys.stdout.write(json.dumps(line) + "\n")
            else:
                self.console.print(Panel(self._text(ids, hidden), title=Text(_title(facts)), title_align="left"))

    def _text(self, ids: list[int], labels: list[int]) -> Text:
        """Decoded text; runs of tokens that are not to be predicted are decoded together."""
        text, plain = Text(), list[int]()
        for token, label in zip(ids, labels, strict=True):
            if label == IGNORE:
                plain.append(token)
                continue
            text.append(self._decode(plain))
            plain = []
            change = "" if token == self.mask else "=" if token == label else f"→{self._decode([token])}"
            text.append(f"⟦{self._decode([label])}{change}⟧", "bold cyan")
        text.append(self._decode(plain))
        return text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _title(facts: dict[str, Any]) -> str:
    whole = facts["stop"] - facts["start"] == facts["length"]
    piece = "whole" if whole else f"tokens {facts['start']} to {facts['stop']} of {facts['length']}"
    again = f", pass {facts['pass'] + 1}" if facts["pass"] else ""
    rate = f", rate {facts['rate']:.3f}" if "rate" in facts else ""
    return (
        f"row {facts['row']}: {facts['stream']}, {facts['shard']}, document {facts['document']}, {piece}{again}{rate}"
    )
