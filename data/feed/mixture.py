"""The token mixture: which stream gives how much, from the config's weights, repeats or tokens to tokens per block."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial

from pydantic import Field, model_validator

from data.feed.lanes import LongDocuments, Mixture
from data.feed.order import StreamLine
from data.store.cache import CacheConfig
from data.store.shards import Stream
from flexbert_core.schema import MAY_CHANGE, ConfigError, Count, Schema, UserPath

log = logging.getLogger(__name__)


_PARTS_PER_BLOCK = 4  # at least, per stream, where it has the documents: a block draws from several places of a stream
RULES = ("weight", "repeat", "tokens")


class StreamShare(Schema):
    """How much of a stream the mixture holds: by weight, by repeat or by tokens (the same for all of its streams)."""

    weight: float | None = Field(default=None, gt=0, description="share of the tokens, relative to the other weights")
    repeat: float | None = Field(
        default=None,
        gt=0,
        description="how often what min_length and long_documents show of the stream is seen, while that of one of "
        "repeat 1 is seen once; default 1",
    )
    tokens: Count | None = Field(
        default=None, gt=0, description="tokens of the stream in the phase; together they make up its budget"
    )
    min_length: int | None = Field(
        default=None,
        ge=0,
        description="documents of fewer tokens are passed over; default: as in the phase before, else none are",
    )


class StreamConfig(StreamShare):
    """One stream."""

    path: UserPath = Field(
        description="folder or URL with train/ and validation/, as `prepare` writes it",
        json_schema_extra=MAY_CHANGE,  # a checkpoint holds the fingerprints of the shards that it was trained on
    )


class DataConfig(CacheConfig):
    """The streams, their mixture, and how they are read."""

    tokenizer: UserPath = Field(
        description="folder (or its URL) that AutoTokenizer loads; its ids must be the shards' ids",
        json_schema_extra=MAY_CHANGE,  # its fingerprint is part of the streams'
    )
    streams: dict[str, StreamConfig] = Field(min_length=1, description="streams by name")
    long_documents: LongDocuments = Field(
        default="split", description="over a row's length: split into pieces, truncate to the first, or drop"
    )
    packing: bool = Field(
        default=True,
        description="fill rows with several documents; false: one piece of a document in each, the other slots empty, "
        "though budgets count them (for comparison: such rows hold fewer tokens, and their number varies)",
    )
    lanes: int | None = Field(
        default=None, ge=1, description="canonical lanes; default: largest power of two <= 64 that divides every batch"
    )
    part_documents: int = Field(
        default=2048,
        ge=1,
        description="consecutive documents kept together in the order; fewer when the data is small, but whole chunks "
        "of a stream (chunk_documents in its stream.json)",
    )
    block_documents: int = Field(
        default=16384, ge=1, description="documents per block, about: what is shuffled and packed together"
    )
    shuffle_shards: int | None = Field(
        default=None,
        ge=1,
        description="shards of a stream that a lane mixes at a time; each is then opened once per pass, by one lane or "
        "two (for remote streams); default: all",
    )
    num_workers: int = Field(
        default=1,
        ge=0,
        description="loader processes per rank; 0 reads in the training process",
        json_schema_extra=MAY_CHANGE,
    )
    prefetch_batches: int = Field(
        default=4,
        ge=1,
        description="batches each worker keeps ahead; small ones it hands over together, up to so many",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _check_one_rule(self) -> "DataConfig":
        check_one_rule(self.streams)
        return self


def check_one_rule(shares: Mapping[str, StreamShare]) -> None:
    """Raises ValueError unless all streams say weight, or all tokens, or each repeat or nothing."""
    for rule in RULES:
        without = sorted(name for name, share in shares.items() if getattr(share, rule) is None)
        others = [other for other in RULES if other != rule and any(getattr(s, other) for s in shares.values())]
        if len(without) < len(shares) and others:
            raise ValueError(
                f"streams: give every stream the same of {', '.join(RULES)}: {rule} and {others[0]} differ"
            )
        if rule != "repeat" and 0 < len(without) < len(shares):
            raise ValueError(f"streams: {', '.join(without)} has no {rule}: give every stream one, or none")


def rule_of(shares: Mapping[str, StreamShare]) -> str:
    """Which of weight, repeat, tokens the mixture goes by."""
    return next((rule for rule in RULES if any(getattr(share, rule) for share in shares.values())), "repeat")


def stream_weights(shares: Mapping[str, StreamShare], tokens: Mapping[str, int]) -> dict[str, float]:
    """Share of the mixture's tokens of every stream in `tokens` (name: tokens it holds); 0 where it is not named."""
    rule = rule_of(shares)
    weights = dict.fromkeys(tokens, 0.0)
    for name, share in shares.items():
        value = getattr(share, rule)
        weights[name] = (value or 1.0) * tokens[name] if rule == "repeat" else float(value)
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


class MixtureOrder:
    """The lines of all streams, and what the blocks of a mixture hold."""

    def __init__(self, streams: Sequence[Stream], config: DataConfig, seed: int, lanes: int) -> None:
        """Raises ConfigError when there are fewer documents than lanes."""
        self.names, self.streams = list(config.streams), list(streams)
        documents = sum(stream.manifest.documents for stream in streams)
        if documents < lanes:
            found = f"{documents} documents cannot fill {lanes} lanes"
            raise ConfigError(f"data: {found}: add data, or set data.lanes lower")
        self.tokens = {name: stream.manifest.tokens for name, stream in zip(self.names, streams, strict=True)}
        self.blocks_per_lane = max(1, round(documents / config.block_documents / lanes))
        blocks = lanes * self.blocks_per_lane
        self.block_tokens = sum(self.tokens.values()) / blocks
        self.lines = [
            StreamLine(
                stream,
                number,
                seed,
                lanes,
                min(config.part_documents, max(1, stream.manifest.documents // (_PARTS_PER_BLOCK * blocks))),
                config.shuffle_shards,
            )
            for number, stream in enumerate(streams)
        ]
        self._counted: dict[tuple[int, int, str, int | None], int] = {}
        for name, stream in zip(self.names, streams, strict=True):
            chunk = stream.manifest.chunk_documents
            if config.part_documents < chunk:
                log.warning(
                    "data.part_documents: %d is less than a chunk of stream %s: %d documents stay together there",
                    config.part_documents,
                    name,
                    chunk,
                )

    def mixture(
        self,
        shares: Mapping[str, StreamShare],
        long_documents: LongDocuments,
        max_seq_len: int,
        repeats_all: bool = False,
    ) -> Mixture:
        """What a phase's blocks hold. Raises ConfigError when min_length or long_documents hides all of a stream.

        repeats_all: `repeat` counts all tokens of a stream instead of those that the phase shows, as it once did.
        Without it, and where they differ, the head of every shard is read.
        """
        lengths = tuple(shares[name].min_length or 0 if name in shares else 0 for name in self.names)
        for name, length in zip(self.names, lengths, strict=True):
            if length > self._longest(name):
                raise ConfigError(
                    f"streams.{name}.min_length: {length}: the stream has no document of more than "
                    f"{self._longest(name)} tokens: lower it"
                )
        # Of one stream alone, or of given weights, the shares do not depend on what is shown.
        counts = rule_of(shares) == "repeat" and len(shares) > 1 and not repeats_all
        mixture = Mixture.of(tuple(float(name in shares) for name in self.names), lengths, long_documents, max_seq_len)
        weights = stream_weights(shares, self.tokens | (self.shown_tokens(mixture) if counts else {}))
        return mixture._replace(tokens=tuple(weights[name] * self.block_tokens for name in self.names))

    def shown_tokens(self, mixture: Mixture) -> dict[str, int]:
        """How many tokens one pass over each stream of the mixture shows. Raises ConfigError when there are none."""
        shown = {}
        for number, name in enumerate(self.names):
            if mixture.tokens[number]:
                shown[name] = self._shown(number, mixture)
                if self.tokens[name] and not shown[name]:
                    raise ConfigError(
                        f"streams.{name}: no document is left by min_length and long_documents: choose others, or "
                        "longer rows"
                    )
        return shown

    def _shown(self, number: int, mixture: Mixture) -> int:
        name, length = self.names[number], mixture.min_length[number]
        shortest = min((int(edge) for edge in self.streams[number].manifest.length_histogram), default=0)
        if length <= shortest and (mixture.room is None or self._longest(name) <= mixture.room):
            return self.tokens[name]
        key = (number, length, mixture.long_documents, mixture.room)
        if key not in self._counted:
            self._counted[key] = self.streams[number].count(partial(mixture.shown, number))
        return self._counted[key]

    def _longest(self, name: str) -> int:
        """Tokens that no document of the stream exceeds; from the manifest's histogram, so up to twice the longest."""
        edges = [int(edge) for edge in self.streams[self.names.index(name)].manifest.length_histogram]
        return 2 * max(edges) - 1 if edges else self.tokens[name]
