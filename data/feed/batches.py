"""Rows to batches: tokens are read and masked, and what was seen is counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.feed.lanes import RowKey, Rows
from data.feed.masking import IGNORE, MASKINGS, Masking, MaskingConfig, Targets, Vocabulary
from data.feed.order import DocumentList
from data.feed.packing import SPECIAL_TOKENS_PER_SEQUENCE, Spans
from data.feed.philox import RowNames
from data.keyed import philox_key
from data.store.shards import Stream
from flexbert_core.schema import ConfigError, RunError

Batch = dict[str, Any]
"""input_ids, labels (total_tokens,) int64; cu_seqlens (documents + 1,) int32; max_seqlen int; sequences: documents of
each row, list of ints; row_bounds: (rows + 1,) int32, starts of the rows, then total_tokens; first_row: place of the
first row in the global batch, int (0 outside training); phase: number of the run file's, int (0 outside training);
masking_rate: of the step, float (0 outside training); slots: rows x max_seq_len, int; tokens: total_tokens, int;
masked: number of labels not ignored, int; masked_streams: (masked,) int16, the stream of each; seen: (streams,
len(SEEN)) int64 numpy array. Where the masking draws a rate for each row also row_rates: (rows,) float32, and
selectable: how many tokens of each row it could have selected, list of ints. Training batches also carry cursors:
{lane: LaneCursor as a list} after the batch."""

_MASKINGS_KEPT = 32

SEEN = ("tokens", "sequences", "documents", "unique_documents", "repeated_tokens")
"""What is counted of each stream. tokens: of the text. sequences: pieces, each with a [CLS] and a [SEP] of its own.
documents: whose beginning is shown; unique_documents: those of them in the stream's first pass. repeated_tokens: shown
in later passes."""


def count_seen(documents: DocumentList, pieces: Spans, streams: int) -> NDArray[np.int64]:
    """(streams, len(SEEN)) int64, of the pieces of a batch and the document of each."""
    size, begins, again = pieces.stop - pieces.start, pieces.start == 0, documents.number > 0
    values = (size, np.ones_like(size), begins, begins & ~again, np.where(again, size, 0))
    return np.stack([np.bincount(documents.stream, value, streams) for value in values], 1).astype(np.int64)


@dataclass
class PackedBatch:
    """A batch as a worker hands it over: small, and plain arrays."""

    ids: NDArray[np.unsignedinteger]
    targets: Targets
    lengths: NDArray[np.int32]
    streams: NDArray[np.int16]
    sequences: list[int]
    row_ends: NDArray[np.int64]
    first_row: int
    slots: int
    seen: NDArray[np.int64]
    cursors: dict[int, list[Any]]
    phase: int = 0
    rate: float = 0.0

    def unpack(self) -> Batch:
        """The tensors and counts of a Batch."""
        labels = np.full(len(self.ids), IGNORE, np.int64)
        labels[self.targets.position] = self.targets.token
        cu_seqlens = np.zeros(len(self.lengths) + 1, np.int32)
        np.cumsum(self.lengths, out=cu_seqlens[1:])
        drawn = self.targets.drawn
        rates = (
            {}
            if drawn is None
            else {
                "row_rates": torch.from_numpy(drawn.rate.astype(np.float32)),
                "selectable": drawn.selectable.tolist(),
            }
        )
        return {
            **rates,
            "input_ids": torch.from_numpy(self.ids.astype(np.int64)),
            "labels": torch.from_numpy(labels),
            "cu_seqlens": torch.from_numpy(cu_seqlens),
            "max_seqlen": int(self.lengths.max(initial=0)),
            "sequences": self.sequences,
            "row_bounds": torch.from_numpy(np.concatenate(([0], self.row_ends)).astype(np.int32)),
            "first_row": self.first_row,
            "phase": self.phase,
            "masking_rate": self.rate,
            "slots": self.slots,
            "masked": len(self.targets.position),
            "tokens": len(self.ids),
            "masked_streams": torch.from_numpy(np.repeat(self.streams, self.lengths)[self.targets.position]),
            "seen": self.seen,
            "cursors": self.cursors,
        }


def join_pieces(rows: Sequence[Rows]) -> tuple[DocumentList, Spans]:
    """The pieces of rows laid end to end, and the document of each: both of one length."""
    pieces = [part.pieces for part in rows]
    documents = DocumentList.join([part.documents.take(p.document) for part, p in zip(rows, pieces, strict=True)])
    start, stop = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(p, edge) for p in pieces)]) for edge in ("start", "stop")
    )
    return documents, Spans(np.arange(len(start)), start, stop)


class Assembler:
    """Rows to batches: reads tokens, adds [CLS] and [SEP], masks."""

    def __init__(self, streams: Sequence[Stream], seed: int, tokenizer: Callable[[], Path]) -> None:
        """tokenizer: gives its folder on local disk, to a masking that asks."""
        self.streams, self.seed = streams, seed
        manifest = streams[0].manifest
        self.cls, self.sep, self.dtype = manifest.cls_token_id, manifest.sep_token_id, streams[0].dtype
        special = np.zeros(manifest.vocab_size, bool)
        special[manifest.special_ids] = True
        self.vocabulary = Vocabulary(manifest.mask_token_id, special, np.flatnonzero(~special), tokenizer)
        self._maskings = dict[str, Masking]()

    def batch(self, rows: Sequence[Rows], max_seq_len: int, masking: MaskingConfig) -> PackedBatch:
        """Lay the rows end to end. No rows give an empty batch. Raises RunError for a damaged shard, and for targets
        that are none."""
        documents, pieces = join_pieces(rows)
        lengths = pieces.stop - pieces.start + SPECIAL_TOKENS_PER_SEQUENCE
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, self.dtype)
        ids[ends - lengths], ids[ends - 1] = self.cls, self.sep
        self._read(documents, pieces, ids, ends - lengths + 1)
        sequences = np.concatenate([np.zeros(0, np.int64), *(part.sequences for part in rows)])
        names = RowNames(
            np.repeat(
                np.array([self._key(part.key) for part in rows], np.uint64),
                np.array([part.count for part in rows], int),
            ),
            np.concatenate([np.zeros(0), *(np.arange(p.first, p.first + p.count) for p in rows)]).astype(np.uint32),
            ends,
        )
        row_ends = ends[np.cumsum(sequences) - 1]
        targets = self._masking(masking).mask(ids, row_ends, names)
        _check(targets, len(ids), len(row_ends), len(self.vocabulary.special), masking.name)
        return PackedBatch(
            ids=ids,
            targets=targets,
            lengths=lengths.astype(np.int32),
            streams=documents.stream.astype(np.int16),
            sequences=sequences.tolist(),
            row_ends=row_ends,
            first_row=0,
            slots=len(sequences) * max_seq_len,
            seen=count_seen(documents, pieces, len(self.streams)),
            cursors={},
        )

    def _key(self, key: RowKey) -> int:
        return int(philox_key(self.seed, "mask", key.lane, key.block, key.carry)[0])

    def build_masking(self, config: MaskingConfig, place: str) -> None:
        """Before it is used: raises ConfigError, starting with `place`, for one that refuses its arguments."""
        try:
            self._masking(config)
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from None

    def _masking(self, config: MaskingConfig) -> Masking:
        """Built once for each config: phases have their own, and every step of a rate that moves."""
        key = config.model_dump_json()
        if key not in self._maskings:
            if len(self._maskings) == _MASKINGS_KEPT:
                self._maskings.clear()
            self._maskings[key] = MASKINGS.build(config, vocabulary=self.vocabulary)
        return self._maskings[key]

    def _read(
        self, documents: DocumentList, pieces: Spans, ids: NDArray[np.unsignedinteger], places: NDArray[np.int64]
    ) -> None:
        """Read each piece to its place in `ids`."""
        size = self.dtype.itemsize
        out = ids.data.cast("B")
        first_byte = documents.end - (documents.length - pieces.start) * size
        begin, end = places * size, (places + pieces.stop - pieces.start) * size
        columns = (documents.stream, documents.shard, documents.index, first_byte, begin, end)
        for stream, shard, index, byte, at, to in zip(*(column.tolist() for column in columns), strict=True):
            self.streams[stream].read_into(shard, index, byte, out[at:to])


def _check(targets: Any, tokens: int, rows: int, vocab_size: int, name: str) -> None:
    """Raises RunError where a masking gives what is no set of positions in order, with a token for each: labels would
    be wrong without a word."""
    if not isinstance(targets, Targets):
        raise RunError(f"masking {name!r}: gives a {type(targets).__name__}: give data.feed.masking.Targets")
    position, token = targets.position, targets.token
    for what, values in (("position", position), ("token", token)):
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or values.ndim != 1:
            raise RunError(f"masking {name!r}: {what} is no array of whole numbers, (masked,)")
    if len(position) != len(token):
        raise RunError(f"masking {name!r}: gives {len(token)} tokens for {len(position)} positions")
    if len(position) and not (position[0] >= 0 and position[-1] < tokens and (position[1:] > position[:-1]).all()):
        raise RunError(f"masking {name!r}: its positions must ascend, each once, from 0 to under {tokens}")
    if len(token) and not (token.min() >= 0 and token.max() < vocab_size):
        raise RunError(f"masking {name!r}: a token is not of the vocabulary, 0 to under {vocab_size}")
    drawn = targets.drawn
    if drawn is not None and not (
        drawn.rate.shape == drawn.selectable.shape == (rows,) and ((drawn.rate > 0) & (drawn.rate <= 1)).all()
    ):
        raise RunError(f"masking {name!r}: gives no rate over 0 and up to 1 for each of {rows} rows")
