"""`evaluations: [held_out_documents]`: what a run's final weights lose on each held-out document."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from pydantic import AfterValidator, Field

import ranks
from data.feed.batches import Assembler, Batch
from data.feed.held_out import all_documents, check_masking
from data.feed.lanes import RowKey, Rows
from data.feed.loader import open_streams, tokenizer_folder
from data.feed.masking import DEFAULT, MASKINGS, has_one_rate, is_causal
from data.feed.packing import Plan, Spans, cut
from data.keyed import torch_seed
from data.store.shards import Stream
from flexbert import FlexBertForMaskedLM
from flexbert.encoder import require_causal
from flexbert_core.durable import write_file
from flexbert_core.schema import Component
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import EVALUATIONS

FILE = "held_out_documents.npz"
_KEY = RowKey(-1, 1, 0)  # no lane has this number, and the held-out rows have block 0


@EVALUATIONS.register("held_out_documents")
class HeldOutDocuments:
    """Writes RUN/held_out_documents.npz after the last step. Documents and masks depend on this entry and the data
    alone, not on the run's seed, phases or masking: runs that name the same data and tokenizer are compared on the same
    hidden tokens."""

    class Config(Component):
        name: Literal["held_out_documents"] = "held_out_documents"
        documents: int = Field(default=200, ge=2, description="of each stream's validation split at most, its first")
        tokens: int = Field(default=4096, ge=16, description="of a document at most, its first")
        max_seq_len: int | None = Field(
            default=None, ge=8, description="slots of a piece of a document; default: of the first phase"
        )
        masking: Annotated[Any, *MASKINGS.slot(default=DEFAULT), AfterValidator(has_one_rate)] = Field(
            default={"name": "tokens", "rate": 0.15}, validate_default=True, description="which tokens are hidden"
        )
        seed: int = Field(default=0, ge=0, description="of the masks")

    def __init__(
        self, config: Config, *, run: RunConfig, plan: PhasePlan, streams: Sequence[Stream], folder: Path
    ) -> None:
        """streams: those of training. Raises ConfigError for a missing validation split, and for a masking that refuses
        the tokenizer."""
        self.config, self.file = config, folder / FILE
        if is_causal(config.masking):
            require_causal(run.model)
        self.last_step = plan.total_steps
        self.max_seq_len = config.max_seq_len or plan.phases[0].max_seq_len
        self.streams = dict(zip(run.data.streams, open_streams(run.data, "validation"), strict=True))
        self.tokenizer = partial(tokenizer_folder, run.data)
        check_masking(list(self.streams.values()), config.masking, self.tokenizer, f"evaluations: {config.name}")

    @torch.no_grad()
    def run(self, model: FlexBertForMaskedLM, step: int) -> Mapping[str, Any]:
        """After the last step {"loss": nats a hidden token}, before nothing. A collective over ranks.

        Of a run with a moving average the file is of the weights themselves: they are measured first.
        """
        if step != self.last_step or self._is_done(step):
            return {}
        device = next(model.parameters()).device
        names, sums, counts = [], [], []
        for name, stream in self.streams.items():
            documents = list(self.documents_of(stream))
            found = torch.zeros((len(documents), 2), dtype=torch.float64)
            # Every rank takes part in as many forwards, which a sharded model needs.
            for first in range(0, len(documents), ranks.world_size()):
                mine = first + ranks.rank()
                batch = documents[min(mine, len(documents) - 1)]()
                loss, _, masked = model.evaluate(
                    batch["input_ids"].to(device),
                    batch["cu_seqlens"].to(device),
                    batch["max_seqlen"],
                    batch["labels"].to(device),
                    is_causal(self.config.masking),
                )
                if mine < len(documents):
                    found[mine] = torch.tensor([float(loss), float(masked)], dtype=torch.float64)
            found = ranks.over_ranks(found)
            hidden = found[:, 1] > 0  # a document of a word may have nothing hidden
            names += [f"{name}/{number}" for number in torch.arange(len(documents))[hidden].tolist()]
            sums.append(found[hidden, 0].numpy())
            counts.append(found[hidden, 1].numpy().astype(np.int64))
        arrays = {"documents": np.array(names), "sums": np.concatenate(sums), "counts": np.concatenate(counts)}
        if ranks.rank() == 0:
            self._write(arrays, step)
        return {"loss": float(arrays["sums"].sum() / max(arrays["counts"].sum(), 1))}

    def documents_of(self, stream: Stream) -> list[Callable[[], Batch]]:
        """For each document what makes its batch: its pieces, with masks keyed by its number."""
        documents = all_documents(stream, self.config.documents)
        count = len(documents.length)
        stops = np.minimum(documents.length[:count], self.config.tokens)
        pieces = cut(Spans(np.arange(count), np.zeros(count, np.int64), stops), self.max_seq_len)
        pieces = pieces.take(np.lexsort((pieces.start, pieces.document)))
        plan = Plan(pieces, np.searchsorted(pieces.document, np.arange(count + 1)), self.max_seq_len)
        assembler = Assembler([stream], torch_seed(self.config.seed, "held-out documents"), self.tokenizer)

        def batch(number: int) -> Batch:
            rows = [Rows(documents, plan, _KEY, number, 1)]
            return assembler.batch(rows, self.max_seq_len, self.config.masking).unpack()

        return [partial(batch, number) for number in range(count)]

    def _is_done(self, step: int) -> bool:
        done = False
        try:
            with self.file.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                done = int(arrays["step"]) == step
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, BadZipFile, zlib.error):
            pass  # not there, or damaged: it is written anew
        return bool(ranks.from_rank_0(done))

    def _write(self, arrays: Mapping[str, Any], step: int) -> None:
        data = BytesIO()
        np.savez_compressed(data, step=step, **arrays)
        write_file(self.file, data.getvalue())
