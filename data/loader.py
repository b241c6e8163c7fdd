"""From a planned order to batches: the global batch of step k is a function of the config and k.

A global batch takes the same number of rows from each lane, lane-major; rank r of W takes the r-th contiguous slice.
DataLoader worker w of K reads the tokens of groups of steps w, w + K, ...; it plans the others (lengths only) to keep
its lanes moving. So neither world size, workers nor restarts change what a step trains on. Workers hand over plain
bytes through a pipe: there is no shared memory that could be left behind.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from pydantic import Field
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.batches import Assembler, Batch, PackedBatch
from data.keyed import keyed_generator
from data.lanes import Lane, LaneCursor, LongDocuments, Mixture, RowKey, Rows
from data.masking import MaskingConfig
from data.mixture import DataConfig, MixtureOrder, StreamShare
from data.order import DocumentList
from data.packing import Spans, pack
from data.shards import Stream, open_stream
from data.tokenizer import fingerprint
from data.transfer import is_url
from data.workers import Fork, Guarded, prepare_worker, with_plain_deaths
from schema import ConfigError, Schema

MAX_LANES = 64

_GROUP_SLOTS = 2**16  # small batches go from worker to training process together, up to so many slots


class LoaderPhase(Schema):
    """What the loader must know of one phase, or of a part of it with the same batch size."""

    number: int | None = Field(
        default=None, ge=0, description="of the run file's phase; default: its place in the list"
    )
    steps: int = Field(ge=0)
    global_batch_size: int = Field(ge=1, description="rows per step over all ranks")
    max_seq_len: int = Field(ge=3, description="slots per row: [CLS], [SEP] and at least one token")
    masking: MaskingConfig
    streams: dict[str, StreamShare] | None = Field(default=None, description="the mixture; default: that of data")
    long_documents: LongDocuments | None = Field(default=None, description="default: that of data")


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
    divisor = math.gcd(*batch_sizes)
    return min(MAX_LANES, divisor & -divisor)


def open_streams(config: DataConfig, split: str) -> list[Stream]:
    """Open one split of every stream. Raises ConfigError for a missing stream or streams of different tokenizers,
    RunError for a shard that is missing or has another size than its manifest says."""
    streams = []
    for name, stream in config.streams.items():
        try:
            streams.append(open_stream(f"{stream.path.rstrip('/')}/{split}", config))
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


def tokenizer_folder(config: DataConfig) -> Path:
    """data.tokenizer on local disk. Raises ConfigError or RunError when it is a URL that cannot be read."""
    if not is_url(config.tokenizer):
        return Path(config.tokenizer)
    from data.remote import fetch_tokenizer

    try:
        return fetch_tokenizer(config.tokenizer, config)
    except ConfigError as error:
        raise ConfigError(f"data.tokenizer: {error}") from None


def check_tokenizer(config: DataConfig, streams: Sequence[Stream]) -> None:
    """Raises ConfigError when data.tokenizer is no tokenizer folder, or not the one that made the streams."""
    folder = tokenizer_folder(config)
    file = folder / "tokenizer.json"
    if not file.is_file():
        state = "no such folder" if not folder.is_dir() else "holds no tokenizer.json"
        raise ConfigError(f"data.tokenizer: {folder}: {state}: give the `tokenizer` folder that prepare wrote")
    found, expected = fingerprint(folder), streams[0].manifest.tokenizer_fingerprint
    if found != expected:
        raise ConfigError(
            f"data.tokenizer: {config.tokenizer}: its fingerprint {found[:12]} is not the streams' {expected[:12]}: "
            "give the `tokenizer` folder that was prepared with them"
        )


class MixtureDataset(IterableDataset):
    """The batches of one rank, from a step and its lanes' cursors on, to the end of the last phase."""

    def __init__(
        self, config: LoaderConfig, rank: int, world_size: int, streams: Sequence[Stream] | None = None
    ) -> None:
        """streams: open ones, in the config's order; default: those of the config's paths. Raises ConfigError when the
        batch sizes, lanes and world size do not fit each other."""
        for index, phase in enumerate(config.phases):
            key, rows = f"{_place(index, phase)}.global_batch_size", phase.global_batch_size
            if rows % config.lanes:
                raise ConfigError(f"{key}: {rows} is no multiple of data.lanes {config.lanes}")
            if rows % world_size:
                hint = "give multiples, also in a batch_size_warmup (from, step)"
                raise ConfigError(f"{key}: {rows} is no multiple of {world_size} ranks: {hint}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self.streams = open_streams(config.data, "train") if streams is None else streams
        self.order = MixtureOrder(self.streams, config.data, config.seed, config.lanes)
        self.mixtures = [self._mixture(index, phase) for index, phase in enumerate(config.phases)]
        self._ends = list(accumulate(phase.steps for phase in config.phases))
        slots = max(phase.global_batch_size * phase.max_seq_len for phase in config.phases) // world_size
        self.group = max(1, min(config.data.prefetch_batches, _GROUP_SLOTS // slots))  # steps that a worker hands over
        self.step = 0
        self.cursors = {lane: LaneCursor() for lane in range(config.lanes)}

    def _mixture(self, index: int, phase: LoaderPhase) -> Mixture:
        data = self.config.data
        shares: Mapping[str, StreamShare] = data.streams if phase.streams is None else phase.streams
        try:
            return self.order.mixture(shares, phase.long_documents or data.long_documents, phase.max_seq_len)
        except ConfigError as error:
            where = "data" if phase.streams is None else _place(index, phase)
            raise ConfigError(f"{where}.{error}") from None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin at a step: {"step", "lanes": cursors as lists}. Raises ConfigError for another number of lanes."""
        if len(state["lanes"]) != self.config.lanes:
            raise ConfigError(
                f"data.lanes: the checkpoint was written with {len(state['lanes'])} lanes, the config gives "
                f"{self.config.lanes}: set data.lanes: {len(state['lanes'])}"
            )
        self.step = int(state["step"])
        self.cursors = {lane: LaneCursor.from_list(cursor) for lane, cursor in enumerate(state["lanes"])}

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return self._ends[-1]

    def _phase(self, step: int) -> tuple[LoaderPhase, Mixture]:
        index = bisect_right(self._ends, step)
        return self.config.phases[index], self.mixtures[index]

    def _rank_rows(self, phase: LoaderPhase) -> dict[int, range]:
        """For each lane this rank reads: which of the lane's rows in a batch are its own. The lanes are the same in
        every phase: rank r of W reads lanes floor(r L / W) to ceil((r + 1) L / W) whatever the batch size."""
        per_lane, per_rank = phase.global_batch_size // self.config.lanes, phase.global_batch_size // self.world_size
        begin, end = self.rank * per_rank, (self.rank + 1) * per_rank
        lanes = range(begin // per_lane, -(-end // per_lane))
        return {lane: range(max(begin - lane * per_lane, 0), min(end - lane * per_lane, per_lane)) for lane in lanes}

    @property
    def own_lanes(self) -> Set[int]:
        """The lanes this rank reads."""
        return self._rank_rows(self.config.phases[0]).keys()

    def plan(self) -> Iterator[tuple[int, LoaderPhase, list[Rows], dict[int, Lane]]]:
        """This rank's rows of every step from self.step on, and its lanes behind them; reads no tokens."""
        lanes: dict[int, Lane] = {}
        for step in range(self.step, self.total_steps):
            phase, mixture = self._phase(step)
            rows: list[Rows] = []
            own_rows = self._rank_rows(phase)
            if not lanes:
                lanes = {lane: Lane(self.order.lines, self.config.seed, lane, self.cursors[lane]) for lane in own_rows}
                for lane in lanes.values():
                    lane.prefetch(mixture)
            for lane, own in own_rows.items():
                taken = lanes[lane].take(phase.global_batch_size // self.config.lanes, phase.max_seq_len, mixture)
                rows += _slice(taken, own)
            yield step, phase, rows, lanes

    def __iter__(self) -> Iterator[PackedBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        assembler = Assembler(self.streams, self.config.seed)
        first = self.step
        for step, phase, rows, lanes in self.plan():
            if (step - first) // self.group % workers == worker:
                batch = assembler.batch(rows, phase.max_seq_len, phase.masking)
                batch.cursors = {lane: lanes[lane].cursor.to_list() for lane in lanes}
                batch.first_row = self.rank * phase.global_batch_size // self.world_size
                yield batch


def _place(index: int, phase: LoaderPhase) -> str:
    """The phase's key in the run file."""
    return f"phases[{index if phase.number is None else phase.number}]"


def _slice(rows: list[Rows], own: range) -> list[Rows]:
    """Rows own.start to own.stop of those that the parts hold together."""
    parts, before = [], 0
    for part in rows:
        first, stop = max(own.start - before, 0), min(own.stop - before, part.count)
        if first < stop:
            parts.append(part.take(first, stop - first))
        before += part.count
    return parts


class Loader:
    """Iterates this rank's batches; its state is the cursor behind the batch last handed out."""

    def __init__(self, config: LoaderConfig, rank: int, world_size: int) -> None:
        self.dataset = MixtureDataset(config, rank, world_size)

    @property
    def batch_size(self) -> int:
        """Rows of this rank's largest batch."""
        dataset = self.dataset
        return max(phase.global_batch_size for phase in dataset.config.phases) // dataset.world_size

    def __iter__(self) -> Iterator[Batch]:
        data = self.dataset.config.data
        workers = data.num_workers
        group = self.dataset.group if workers else 1
        batches = DataLoader(
            Guarded(self.dataset, group),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=data.prefetch_batches // group if workers else None,
            # The base seed that DataLoader draws for its workers must not touch the global generator.
            generator=torch.Generator(),
            worker_init_fn=prepare_worker,
            multiprocessing_context=Fork() if workers else None,
        )
        for packed in with_plain_deaths(iter(batches)):
            if isinstance(packed, Exception):
                raise packed
            batch = packed.unpack()
            # Kept here and not in the batch: they say where to go on behind it.
            self.dataset.cursors.update(
                {lane: LaneCursor.from_list(cursor) for lane, cursor in batch.pop("cursors").items()}
            )
            self.dataset.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Step and every lane's cursor, as JSON values. With several ranks: a collective, call it on all of them."""
        # Of its own lanes: those that other ranks read stand, on this one, where they stood when it was resumed.
        own = self.dataset.own_lanes
        moved = {lane: cursor.to_list() for lane, cursor in self.dataset.cursors.items() if lane in own}
        gathered: list[Any] = [moved]
        if self.dataset.world_size > 1:
            gathered = [None] * self.dataset.world_size
            torch.distributed.all_gather_object(gathered, moved)
        cursors = {lane: cursor for part in gathered for lane, cursor in part.items()}
        lanes = [cursors.get(lane, LaneCursor().to_list()) for lane in range(self.dataset.config.lanes)]
        return {"step": self.dataset.step, "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch at which state_dict was taken. Raises ConfigError for another number of lanes."""
        self.dataset.load_state_dict(state)


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
    documents = _all_documents(stream)
    spans = Spans(np.arange(len(documents.length)), np.zeros(len(documents.length), np.int64), documents.length)
    plan = pack(spans, max_seq_len, keyed_generator(seed, "validation rows"))
    assembler = Assembler([stream], seed)
    count = plan.num_rows if max_rows is None else min(max_rows, plan.num_rows)
    for begin in range(0, count, rows_per_batch * world_size):
        first = min(begin + rank * rows_per_batch, count)
        rows = [Rows(documents, plan, _VALIDATION, first, min(rows_per_batch, count - first))]
        yield assembler.batch(rows, max_seq_len, masking).unpack()


def _all_documents(stream: Stream) -> DocumentList:
    lists = []
    for shard, info in enumerate(stream.manifest.shards):
        nothing, (length, end) = np.zeros(info.documents, np.int64), stream.documents(shard, 0, info.documents)
        lists.append(DocumentList(nothing, nothing + shard, np.arange(info.documents), length, end, nothing))
    return DocumentList.join(lists)


_VALIDATION = RowKey(-1, 0, 0)  # no lane has this number
