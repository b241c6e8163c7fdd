"""From a planned order to batches: the global batch of step k is a function of the config and k.

A global batch takes the same number of rows from each lane, lane-major; rank r of W takes the r-th contiguous slice.
DataLoader worker w of K reads the tokens of steps w, w + K, ...; it plans the others (lengths only) to keep its lanes
moving. So neither world size, workers nor restarts change what a step trains on.
"""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.keyed import keyed_generator
from data.masking import IGNORE, Masker, MaskingConfig, RowKey
from data.order import Lane, LaneCursor, MixtureOrder, Row
from data.packing import pack
from data.shards import Stream, open_stream
from data.tokenizer import fingerprint
from schema import ConfigError, RunError, Schema

MAX_LANES = 64

Batch = dict[str, Any]
"""input_ids, labels (total_tokens,) int64; cu_seqlens (documents + 1,) int32; max_seqlen int; sequences: documents of
each row, list of ints; slots: rows x max_seq_len, int; masked: number of labels not ignored, int; stream_tokens: real
tokens by stream, list of ints. Training batches also carry cursors: {lane: LaneCursor as a list} after the batch."""


class StreamConfig(Schema):
    """One stream of the mixture."""

    path: str = Field(description="folder with train/ and validation/, as `prepare` writes it")
    repeat: float | None = Field(default=None, gt=0, description="times an epoch shows the stream; default 1")
    weight: float | None = Field(
        default=None,
        gt=0,
        description="share of the epoch's tokens, relative to the other streams' weights; the epoch keeps its size",
    )


class DataConfig(Schema):
    """The token mixture and how it is read."""

    tokenizer: str = Field(description="folder that AutoTokenizer loads; its ids must be the shards' ids")
    streams: dict[str, StreamConfig] = Field(min_length=1, description="streams by name")
    lanes: int | None = Field(
        default=None, ge=1, description="canonical lanes; default: largest power of two <= 64 that divides every batch"
    )
    part_documents: int = Field(
        default=2048, ge=1, description="documents per part at most; fewer when the data is small"
    )
    block_documents: int = Field(
        default=16384, ge=1, description="documents per block, about: what is shuffled and packed together"
    )
    num_workers: int = Field(default=1, ge=0, description="loader processes per rank; 0 reads in the training process")
    prefetch_batches: int = Field(default=4, ge=1, description="batches each worker keeps ahead")

    @model_validator(mode="after")
    def _check_one_rule(self) -> "DataConfig":
        weighted = [name for name, stream in self.streams.items() if stream.weight is not None]
        if any(stream.repeat is not None for stream in self.streams.values()) and weighted:
            raise ValueError("streams: give every stream a weight, or none: weight and repeat do not mix")
        if weighted and len(weighted) < len(self.streams):
            missing = sorted(set(self.streams) - set(weighted))
            raise ValueError(f"streams: {', '.join(missing)} has no weight: give every stream one, or none")
        return self

    def repeats(self, streams: Sequence[Stream]) -> list[float]:
        """How often an epoch shows each stream."""
        tokens = np.array([stream.manifest.tokens for stream in streams], float)
        configs = list(self.streams.values())
        if configs[0].weight is None:
            return [config.repeat or 1.0 for config in configs]
        weights = np.array([config.weight for config in configs], float)
        return list(weights / weights.sum() * tokens.sum() / np.maximum(tokens, 1))


class LoaderPhase(Schema):
    """What the loader must know of one phase."""

    steps: int = Field(ge=0)
    global_batch_size: int = Field(ge=1, description="rows per step over all ranks")
    max_seq_len: int = Field(ge=3, description="slots per row: [CLS], [SEP] and at least one token")
    masking: MaskingConfig


class LoaderConfig(Schema):
    """All that decides which tokens a step trains on."""

    seed: int
    data: DataConfig
    phases: list[LoaderPhase] = Field(min_length=1)

    @property
    def lanes(self) -> int:
        """Canonical lanes: data.lanes, or the largest power of two up to 64 that divides every batch size."""
        return self.data.lanes or canonical_lanes([phase.global_batch_size for phase in self.phases])


def canonical_lanes(batch_sizes: Sequence[int]) -> int:
    """The largest power of two up to 64 that divides every batch size."""
    divisor = int(np.gcd.reduce(np.array(batch_sizes, np.int64)))
    return min(MAX_LANES, divisor & -divisor)


def open_streams(config: DataConfig, split: str) -> list[Stream]:
    """Open one split of every stream. Raises ConfigError for a missing stream or streams of different tokenizers,
    RunError for a shard that is missing or has another size than its manifest says."""
    streams = []
    for name, stream in config.streams.items():
        try:
            streams.append(open_stream(f"{stream.path}/{split}"))
        except ConfigError as error:
            raise ConfigError(f"data.streams.{name}.path: {error}") from None
    for name, stream in zip(config.streams, streams, strict=True):
        stream.check_files()
        if stream.manifest.tokenizer_fingerprint != streams[0].manifest.tokenizer_fingerprint:
            first = next(iter(config.streams))
            raise ConfigError(
                f"data.streams.{name}: made with another tokenizer than stream {first}: prepare both with one"
            )
    return streams


def check_tokenizer(config: DataConfig, streams: Sequence[Stream]) -> None:
    """Raises ConfigError when data.tokenizer is no tokenizer folder, or not the one that made the streams."""
    folder = Path(config.tokenizer)
    file = folder / "tokenizer.json"
    if not file.is_file():
        state = "no such folder" if not folder.is_dir() else "holds no tokenizer.json"
        raise ConfigError(f"data.tokenizer: {folder}: {state}: give the `tokenizer` folder that prepare wrote")
    found, expected = fingerprint(folder), streams[0].manifest.tokenizer_fingerprint
    if found != expected:
        raise ConfigError(
            f"data.tokenizer: {folder}: its fingerprint {found[:12]} is not the {expected[:12]} of the streams: "
            "give the `tokenizer` folder that was prepared with them"
        )


class _Assembler:
    """Rows to batches: reads tokens, adds [CLS] and [SEP], masks."""

    def __init__(self, streams: list[Stream], seed: int) -> None:
        self.streams = streams
        manifest = streams[0].manifest
        self.cls, self.sep = manifest.cls_token_id, manifest.sep_token_id
        self.masker = Masker(seed, manifest.mask_token_id, manifest.special_ids, manifest.vocab_size)

    def batch(self, rows: list[Row], max_seq_len: int, masking: MaskingConfig) -> Batch:
        """Lay the rows end to end. No rows give an empty batch."""
        lengths: list[int] = []
        sequences: list[int] = []
        stream_tokens = [0] * len(self.streams)
        row_ids, row_labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for row in rows:
            ids = []
            for document, start, stop in zip(row.pieces.document, row.pieces.start, row.pieces.stop, strict=True):
                stream = int(row.documents.stream[document])
                shard, index = int(row.documents.shard[document]), int(row.documents.index[document])
                tokens = self.streams[stream].document(shard, index, int(start), int(stop))
                ids += [[self.cls], tokens, [self.sep]]
                lengths.append(len(tokens) + 2)
                stream_tokens[stream] += len(tokens) + 2
            sequences.append(len(row.pieces))
            masked, labels = self.masker.mask(np.concatenate(ids).astype(np.int64), row.key, masking)
            row_ids.append(masked)
            row_labels.append(labels)
        labels = np.concatenate(row_labels)
        return {
            "input_ids": torch.from_numpy(np.concatenate(row_ids)),
            "labels": torch.from_numpy(labels),
            "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
            "max_seqlen": max(lengths, default=0),
            "sequences": sequences,
            "slots": len(rows) * max_seq_len,
            "masked": int((labels != IGNORE).sum()),
            "stream_tokens": stream_tokens,
        }


class MixtureDataset(IterableDataset):
    """The batches of one rank, from a step and its lanes' cursors on, to the end of the last phase."""

    def __init__(self, config: LoaderConfig, rank: int, world_size: int) -> None:
        """Raises ConfigError when the batch sizes, lanes and world size do not fit each other."""
        for number, phase in enumerate(config.phases):
            key, rows = f"phases[{number}].global_batch_size", phase.global_batch_size
            if rows % config.lanes:
                raise ConfigError(f"{key}: {rows} is no multiple of data.lanes {config.lanes}")
            if rows % world_size:
                raise ConfigError(f"{key}: {rows} is no multiple of {world_size} ranks")
        self.config, self.rank, self.world_size = config, rank, world_size
        self.streams = open_streams(config.data, "train")
        self.order = MixtureOrder(
            self.streams,
            config.data.repeats(self.streams),
            config.seed,
            config.lanes,
            config.data.part_documents,
            config.data.block_documents,
        )
        self.step = 0
        self.cursors = {lane: LaneCursor() for lane in range(config.lanes)}

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.config.phases)

    def _phase(self, step: int) -> LoaderPhase:
        for phase in self.config.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)

    def _rank_rows(self, phase: LoaderPhase) -> dict[int, range]:
        """For each lane this rank reads: which of the lane's rows in a batch are its own. The lanes are the same in
        every phase: rank r of W reads lanes floor(r L / W) to ceil((r + 1) L / W) whatever the batch size."""
        per_lane, per_rank = phase.global_batch_size // self.config.lanes, phase.global_batch_size // self.world_size
        begin, end = self.rank * per_rank, (self.rank + 1) * per_rank
        lanes = range(begin // per_lane, -(-end // per_lane))
        return {lane: range(max(begin - lane * per_lane, 0), min(end - lane * per_lane, per_lane)) for lane in lanes}

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        assembler = _Assembler(self.streams, self.config.seed)
        first = self.step
        lanes: dict[int, Lane] = {}
        for step in range(first, self.total_steps):
            phase = self._phase(step)
            rows: list[Row] = []
            mine = (step - first) % workers == worker
            for lane, own in self._rank_rows(phase).items():
                if lane not in lanes:
                    lanes[lane] = Lane(self.order, lane, self.cursors[lane])
                taken = lanes[lane].take(phase.global_batch_size // self.config.lanes, phase.max_seq_len)
                if mine:
                    rows += [taken[index] for index in own]
            if mine:
                batch = assembler.batch(rows, phase.max_seq_len, phase.masking)
                batch["cursors"] = {lane: lanes[lane].cursor.to_list() for lane in lanes}
                yield batch


class _GuardedDataset(IterableDataset):
    """Hands an error of ours to the training process as a value: a DataLoader would wrap its message in a traceback."""

    def __init__(self, dataset: MixtureDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Batch | Exception]:
        try:
            yield from self.dataset
        except (RunError, ConfigError) as error:
            yield error


class Loader:
    """Iterates this rank's batches; its state is the cursor behind the batch last handed out."""

    def __init__(self, config: LoaderConfig, rank: int, world_size: int) -> None:
        self.dataset = MixtureDataset(config, rank, world_size)

    def __iter__(self) -> Iterator[Batch]:
        data = self.dataset.config.data
        workers = data.num_workers
        batches = DataLoader(
            _GuardedDataset(self.dataset),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=data.prefetch_batches if workers else None,
            # The base seed that DataLoader draws for its workers must not touch the global generator.
            generator=torch.Generator(),
            worker_init_fn=_prepare_worker,
        )
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            self.dataset.cursors.update(
                {lane: LaneCursor.from_list(cursor) for lane, cursor in batch.pop("cursors").items()}
            )
            self.dataset.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Step and every lane's cursor, as JSON values. With several ranks: a collective, call it on all of them."""
        moved = {lane: cursor.to_list() for lane, cursor in self.dataset.cursors.items() if cursor != LaneCursor()}
        gathered: list[Any] = [moved]
        if self.dataset.world_size > 1:
            gathered = [None] * self.dataset.world_size
            torch.distributed.all_gather_object(gathered, moved)
        cursors = {lane: cursor for part in gathered for lane, cursor in part.items()}
        lanes = [cursors.get(lane, LaneCursor().to_list()) for lane in range(self.dataset.config.lanes)]
        return {"step": self.dataset.step, "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch at which state_dict was taken. Raises ConfigError for another number of lanes."""
        if len(state["lanes"]) != self.dataset.config.lanes:
            raise ConfigError(
                f"data.lanes: the checkpoint was written with {len(state['lanes'])} lanes, the config gives "
                f"{self.dataset.config.lanes}: set data.lanes: {len(state['lanes'])}"
            )
        self.dataset.step = int(state["step"])
        self.dataset.cursors = {lane: LaneCursor.from_list(cursor) for lane, cursor in enumerate(state["lanes"])}


def _prepare_worker(_worker: int) -> None:
    """One thread, and none of the trainer's signal handlers: the training process ends its workers itself."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def build_loader(config: LoaderConfig, rank: int = 0, world_size: int = 1) -> Loader:
    """The training loader of one rank: iterate it for batches, save and restore it with state_dict."""
    return Loader(config, rank, world_size)


def validation_batches(
    stream: Stream,
    max_seq_len: int,
    rows_per_batch: int,
    max_rows: int | None,
    seed: int,
    masking: MaskingConfig,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """A held-out stream, packed once, the same rows and masks at every evaluation of a run.

    Every rank gets the same number of batches (the last may be empty), which collectives in a sharded model need.
    """
    order = MixtureOrder([stream], [1.0], seed, 1, 1 << 62, 1 << 62)
    documents = order.block(0, 0)
    plan = pack(order.spans(documents), max_seq_len, keyed_generator(seed, "validation rows"))
    assembler = _Assembler([stream], seed)
    count = plan.num_rows if max_rows is None else min(max_rows, plan.num_rows)
    for first in range(0, count, rows_per_batch * world_size):
        rows = []
        for row in range(first + rank * rows_per_batch, min(first + (rank + 1) * rows_per_batch, count)):
            rows.append(Row(documents, plan.row(row), max_seq_len, RowKey(0, 0, _VALIDATION, row)))
        yield assembler.batch(rows, max_seq_len, masking)


_VALIDATION = 1  # carry of validation rows: no plan of a training block has it but by a chance of 2 ** -64
