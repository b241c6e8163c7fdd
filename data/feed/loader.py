"""From a planned order to batches: the global batch of step k is a function of the config and k.

A global batch takes the same number of rows from each lane, lane-major; rank r of W takes the r-th contiguous slice.
DataLoader worker w of K reads the tokens of groups of steps w, w + K, ...; it plans the others (lengths only) to keep
its lanes moving. So neither world size, workers nor restarts change what a step trains on. Workers hand over plain
bytes through a pipe: there is no shared memory that could be left behind.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.feed.batches import Assembler, Batch, PackedBatch
from data.feed.lanes import Lane, LaneCursor, LongDocuments, Mixture, Rows
from data.feed.masking import DEFAULT, MASKINGS
from data.feed.mixture import DataConfig, MixtureOrder, StreamShare, check_one_rule
from data.feed.steps import Steps
from data.feed.workers import Fork, Guarded, prepare_worker, with_plain_deaths
from data.store.shards import Stream, open_stream
from data.store.transfer import is_url
from data.tokenizer import fingerprint
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, Schema
from ranks import of_all_ranks

log = logging.getLogger(__name__)

MAX_LANES = 64
ORDER = ("part_documents", "block_documents", "shuffle_shards", "packing")  # of DataConfig: what a cursor depends on

_GROUP_SLOTS = 2**16  # small batches go from worker to training process together, up to so many slots


class LoaderPhase(Schema):
    """What the loader must know of one phase, or of a part of it with the same batch size."""

    number: int | None = Field(
        default=None, ge=0, description="of the run file's phase; default: its place in the list"
    )
    steps: int = Field(ge=0)
    global_batch_size: int = Field(ge=1, description="rows per step over all ranks")
    max_seq_len: int = Field(ge=3, description="slots per row: [CLS], [SEP] and at least one token")
    masking: Annotated[Any, *MASKINGS.slot(default=DEFAULT)] = Field(
        default=DEFAULT, description="which tokens the model restores"
    )
    streams: dict[str, StreamShare] | None = Field(
        default=None, min_length=1, description="the mixture, min_length by default as in data; default: data's"
    )
    long_documents: LongDocuments | None = Field(default=None, description="default: that of data")

    @model_validator(mode="after")
    def _check_one_rule(self) -> "LoaderPhase":
        check_one_rule(self.streams or {})
        return self


class LoaderConfig(Schema):
    """All that decides which tokens a step trains on."""

    seed: int
    data: DataConfig
    phases: list[LoaderPhase] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_streams(self) -> "LoaderConfig":
        for index, phase in enumerate(self.phases):
            for name in phase.streams or {}:
                if name not in self.data.streams:
                    hint = did_you_mean(name, self.data.streams)
                    raise ValueError(f"{_place(index, phase)}.streams.{name}: no stream of data.streams, {hint}")
        return self

    @property
    def lanes(self) -> int:
        """Canonical lanes: data.lanes, or the largest power of two up to 64 that divides every batch size."""
        return self.data.lanes or canonical_lanes([phase.global_batch_size for phase in self.phases])


def canonical_lanes(batch_sizes: Sequence[int]) -> int:
    """The largest power of two up to 64 that divides every batch size."""
    divisor = math.gcd(*batch_sizes)
    return min(MAX_LANES, divisor & -divisor)


def open_streams(config: DataConfig, split: str) -> list[Stream]:
    """Open one split of every stream. Raises ConfigError for a missing stream, a folder that holds another split, or
    streams of different tokenizers, RunError for a shard that is missing or has another size than its manifest says."""
    streams = []
    for name, stream in config.streams.items():
        try:
            streams.append(open_stream(f"{stream.path.rstrip('/')}/{split}", config))
        except ConfigError as error:
            raise ConfigError(f"data.streams.{name}.path: {error}") from None
    known = dict[str, str]()
    for name, stream in zip(config.streams, streams, strict=True):
        if stream.manifest.split != split:
            raise ConfigError(
                f"data.streams.{name}.path: {stream.path}: stream.json says split {stream.manifest.split!r}, not "
                f"{split!r}: put back the folder that prepare wrote there"
            )
        stream.check_files()
        twin = known.setdefault(stream.fingerprint, name)
        if twin != name and stream.manifest.documents:
            log.warning("data.streams.%s: holds the very documents of stream %s: they are seen for both", name, twin)
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
    from data.store.remote import fetch_tokenizer

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
    """The batches of one rank, from a step and its lanes' cursors on, to the end of the last phase.

    It yields PackedBatch; its `unpack` gives the tensors of a Batch. In a DataLoader of one's own (batch_size=None, any
    number of workers) they come in the order of the steps. It has no state_dict, for workers run ahead of what was
    handed over: load_state_dict takes {"step": steps done, "lanes": cursors}, where the last batch's `cursors` are
    those of this rank's lanes. `build_loader` does all this.
    """

    def __init__(
        self, config: LoaderConfig, rank: int, world_size: int, streams: Sequence[Stream] | None = None
    ) -> None:
        """streams: open ones, in the config's order; default: those of the config's paths. Raises ConfigError when the
        batch sizes, lanes, rank and world size do not fit each other, or the tokenizer is not that of the streams."""
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: {rank}: there are {world_size} ranks, from 0 to {world_size - 1}")
        for index, phase in enumerate(config.phases):
            key, rows = f"{_place(index, phase)}.global_batch_size", phase.global_batch_size
            if rows % config.lanes:
                raise ConfigError(f"{key}: {rows} is no multiple of data.lanes {config.lanes}")
            if rows % world_size:
                hint = "give multiples, also in a batch_size_warmup (from, step)"
                raise ConfigError(f"{key}: {rows} is no multiple of {world_size} ranks: {hint}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self.streams = open_streams(config.data, "train") if streams is None else streams
        if streams is None:
            check_tokenizer(config.data, self.streams)
        self.order = MixtureOrder(self.streams, config.data, config.seed, config.lanes)
        self.mixtures = self._mixtures()
        self.steps = Steps(config.phases)
        self.step = 0
        self.cursors = {lane: LaneCursor() for lane in range(config.lanes)}

    def _mixtures(self, repeats_all: bool = False) -> list[Mixture]:
        """Of all phases; repeats_all: see MixtureOrder.mixture."""
        return [self._mixture(index, phase, repeats_all) for index, phase in enumerate(self.config.phases)]

    def _mixture(self, index: int, phase: LoaderPhase, repeats_all: bool) -> Mixture:
        data = self.config.data
        shares: Mapping[str, StreamShare] = data.streams
        if phase.streams is not None:
            shares = {
                name: share.model_copy(update={"min_length": data.streams[name].min_length})
                if share.min_length is None
                else share
                for name, share in phase.streams.items()
            }
        long_documents = phase.long_documents or data.long_documents
        try:
            return self.order.mixture(shares, long_documents, phase.max_seq_len, repeats_all)
        except ConfigError as error:
            where = "data" if phase.streams is None else _place(index, phase)
            raise ConfigError(f"{where}.{error}") from None

    def facts(self) -> dict[str, Any]:
        """What a cursor means nothing without, as JSON values by key of the config."""
        data = self.config.data
        streams = {name: stream.fingerprint for name, stream in zip(data.streams, self.streams, strict=True)}
        order = {f"data.{key}": getattr(data, key) for key in ORDER}
        if data.packing:  # as in states of before there was a choice
            del order["data.packing"]
        return {"seed": self.config.seed, "data.streams": [list(pair) for pair in streams.items()], **order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin at a step: {"step", "lanes": cursors as lists}, and "facts", which must be the same here. Raises
        ConfigError naming what is not."""
        _check_state(state, self.config.lanes, self.total_steps, self.facts())
        cursors = {lane: LaneCursor.from_list(cursor) for lane, cursor in enumerate(state["lanes"])}
        if any(cursor.at and len(cursor.at) != len(self.streams) for cursor in cursors.values()):
            raise ConfigError(f"data.streams: {len(self.streams)} here, not as many as where the state was taken")
        self.step, self.cursors = int(state["step"]), cursors
        self.keep_rule(state["lanes"])

    def keep_rule(self, lanes: Sequence[list[Any]]) -> None:
        """Go by the rule by which these cursors were made: until it counted what is shown, `repeat` counted all tokens
        of a stream, and a run that was begun by that rule goes on by it."""
        found = {LaneCursor.from_list(cursor).mixture for cursor in lanes}
        self.mixtures, before = self._mixtures(), self._mixtures(repeats_all=True)
        if found & ({*before} - {*self.mixtures}):
            log.warning(
                "data.streams: this run goes on as it was begun, with `repeat` counted in all tokens of a stream; runs "
                "begun now count those that min_length and long_documents show"
            )
            self.mixtures = before

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return self.steps.total

    def _phase(self, step: int) -> tuple[LoaderPhase, Mixture]:
        index = self.steps.index(step)
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
                made = partial(Lane, self.order.lines, self.config.seed, packing=self.config.data.packing)
                lanes = {lane: made(lane, self.cursors[lane]) for lane in own_rows}
                for lane in lanes.values():
                    lane.prefetch(mixture)
            for lane, own in own_rows.items():
                taken = lanes[lane].take(phase.global_batch_size // self.config.lanes, phase.max_seq_len, mixture)
                rows += _slice(taken, own)
            yield step, phase, rows, lanes

    def check_maskings(self) -> None:
        """Raises ConfigError for one that refuses its arguments, of whatever phase."""
        self._assembler()

    def _assembler(self) -> Assembler:
        """Raises ConfigError for a masking that refuses its arguments."""
        assembler = Assembler(self.streams, self.config.seed, partial(tokenizer_folder, self.config.data))
        for index, phase in enumerate(self.config.phases):
            assembler.build_masking(phase.masking, f"{_place(index, phase)}.masking")
        return assembler

    def __iter__(self) -> Iterator[PackedBatch]:
        return self.batches(1)

    def batches(self, group: int) -> Iterator[PackedBatch]:
        """In a DataLoader's worker w of K: those of groups of steps w, w + K, ...; elsewhere all."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        assembler, first = self._assembler(), self.step
        for step, phase, rows, lanes in self.plan():
            if (step - first) // group % workers == worker:
                masking = self.steps.masking(step)
                batch = assembler.batch(rows, phase.max_seq_len, masking)
                batch.rate = masking.rate
                batch.cursors = {lane: lanes[lane].cursor.to_list() for lane in lanes}
                batch.phase = self.steps.number(step)
                batch.first_row = self.rank * phase.global_batch_size // self.world_size
                yield batch


def _check_state(state: dict[str, Any], lanes: int, total_steps: int, facts: dict[str, Any]) -> None:
    """Raises ConfigError when this is no state of an order with these facts. States without facts are older ones, or
    come from another run that is known to have them."""
    for key in ("step", "lanes"):
        if key not in state:
            raise ConfigError(f"{key}: missing in the loader's state: give what state_dict gave")
    unknown = sorted(state.keys() - {"step", "lanes", "facts"})
    if unknown:
        raise ConfigError(f"{unknown[0]}: no key of a loader's state: give what state_dict gave")
    if len(state["lanes"]) != lanes:
        raise ConfigError(
            f"data.lanes: the checkpoint was written with {len(state['lanes'])} lanes, the config gives {lanes}: set "
            f"data.lanes: {len(state['lanes'])}"
        )
    if not 0 <= state["step"] <= total_steps:
        raise ConfigError(f"step: {state['step']} in the loader's state, the phases have 0 to {total_steps}")
    # Of what is as it always was before, states say nothing.
    facts, there = ({"data.packing": True, **each} for each in (facts, state.get("facts", facts)))
    for key in sorted(facts.keys() | there.keys()):
        if facts.get(key) != there.get(key):
            raise ConfigError(
                f"{key}: {facts.get(key)} here, {there.get(key)} where the loader's state was taken: make them equal"
            )


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
        slots = max(phase.global_batch_size * phase.max_seq_len for phase in config.phases) // world_size
        self.group = max(1, min(config.data.prefetch_batches, _GROUP_SLOTS // slots))  # steps that a worker hands over

    @property
    def batch_size(self) -> int:
        """Rows of this rank's largest batch."""
        dataset = self.dataset
        return max(phase.global_batch_size for phase in dataset.config.phases) // dataset.world_size

    def __iter__(self) -> Iterator[Batch]:
        data = self.dataset.config.data
        workers = data.num_workers
        group = self.group if workers else 1
        batches = DataLoader(
            Guarded(partial(self.dataset.batches, group), group),
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
        gathered = of_all_ranks(moved) if self.dataset.world_size > 1 else [moved]
        cursors = {lane: cursor for part in gathered for lane, cursor in part.items()}
        lanes = [cursors.get(lane, LaneCursor().to_list()) for lane in range(self.dataset.config.lanes)]
        return {"step": self.dataset.step, "lanes": lanes, "facts": self.dataset.facts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch at which state_dict was taken. Raises ConfigError for a state of another order."""
        self.dataset.load_state_dict(state)


def build_loader(config: LoaderConfig, rank: int = 0, world_size: int = 1) -> Loader:
    """The training loader of one rank: iterate it for batches, save and restore it with state_dict."""
    return Loader(config, rank, world_size)
