"""Near-duplicates by MinHash (Broder 1997) with banding, through datatrove's blocks.

Each document's set of word n-grams gives buckets x hashes_per_bucket minima of hash functions; two documents that share
all hashes of a bucket are taken for near-duplicates, which for sets of Jaccard similarity s happens with probability
1 - (1 - s^hashes_per_bucket)^buckets: at the defaults 5 % at s = 0.5, 56 % at 0.7, 92 % at 0.8, 99.9 % at 0.9.
Near-duplicates of near-duplicates are one cluster; the first document of a cluster stays.

Departures from datatrove 0.9.0: words come from a regular expression instead of spaCy (100 MB of extras), the first
document stays instead of an arbitrary one, and the hashes of a long document are computed piece by piece.
"""

import contextlib
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import regex
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.word_tokenizers import WordTokenizer
from numpy.typing import NDArray
from pydantic import Field

from data.preparation.filters.base import FILTERS, Run, StreamFilter
from flexbert_core.durable import sync, sync_folder
from flexbert_core.schema import Component

# Scripts written without blanks count by character.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_SHINGLES_AT_ONCE = 4096
# datatrove sorts the signatures of a bucket in one process, at some 200,000 a second.
_SIGNATURES_PER_TASK = 2_000_000


@FILTERS.register("minhash")
class MinHash(StreamFilter):
    """Drop documents whose words are nearly those of an earlier document of the stream.

    Letter case, punctuation, digits and accents are not looked at; documents of fewer than n_grams words are all kept.
    """

    class Config(Component):
        name: Literal["minhash"] = "minhash"
        n_grams: int = Field(5, ge=1, le=32)
        """Words in a row that are compared as one."""
        buckets: int = Field(14, ge=1, le=256)
        """More: finds less similar pairs."""
        hashes_per_bucket: int = Field(8, ge=1, le=64)
        """More: finds only more similar pairs."""

    config: Config

    def drop(
        self, documents: Sequence[PipelineStep], counts: Sequence[int], sizes: Sequence[int], folder: Path, run: Run
    ) -> Iterator[NDArray[np.int64]]:
        config = MinhashConfig(
            n_grams=self.config.n_grams,
            num_buckets=self.config.buckets,
            hashes_per_bucket=self.config.hashes_per_bucket,
        )
        signatures, pairs, clusters = (str(folder / name) for name in ("signatures", "pairs", "clusters"))
        run("signatures", [*documents, _Signatures(signatures, config, Words())], sizes)
        # Tasks of a bucket divide the range of hashes by what the first file holds.
        first = folder / "signatures" / "bucket_000" / f"{0:05d}.minhash.sig"
        lines = first.stat().st_size // (8 * config.hashes_per_bucket + 4)
        per_bucket = max(1, min(-(-sum(counts) // _SIGNATURES_PER_TASK), lines))
        tasks = config.num_buckets * per_bucket
        run("pairs", [_Buckets(signatures, pairs, config=config)], [28 * sum(counts) // tasks] * tasks)
        run("clusters", [_Clusters(pairs, clusters, config=config, save_cluster_id=True)], [0])
        return _later_members(folder / "clusters", len(counts))


def _later_members(folder: Path, tasks: int) -> Iterator[NDArray[np.int64]]:
    """Per task, its documents that are not the first of their cluster. Clusters are numbered by first appearance."""
    highest = -1
    for task in range(tasks):
        file = folder / f"{task:06d}.clusters"
        members = np.fromfile(file, "<u4").reshape(-1, 2) if file.exists() else np.zeros((0, 2), "<u4")
        numbers = members[:, 1].astype(np.int64)
        before = np.maximum.accumulate(np.concatenate([[highest], numbers]))
        yield members[numbers <= before[:-1], 0].astype(np.int64)
        highest = int(before[-1])


class Words(WordTokenizer):
    """Maximal runs of anything but blanks, or single characters of scripts that have no blanks."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


class _Signatures(MinhashDedupSignature):
    def __init__(self, folder: str, config: MinhashConfig, words: WordTokenizer) -> None:
        super().__init__(folder, config, language=words)  # pyright: ignore[reportArgumentType] (takes a tokenizer too)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        super().run(data, rank, world_size)
        for file in Path(self.output_folder.path).glob(f"bucket_*/{rank:05d}.minhash.sig"):
            sync(file)  # the task is marked as done after this: a failing power must not leave the mark alone

    def get_signature(self, shingles: NDArray[np.uint64]) -> list[list[int]]:
        """datatrove's makes a (shingles, hashes) table: for a book several GB."""
        parts = [
            np.concatenate(super(_Signatures, self).get_signature(shingles[start : start + _SHINGLES_AT_ONCE]))
            for start in range(0, len(shingles), _SHINGLES_AT_ONCE)
        ]
        smallest = np.min(np.stack(parts).astype(np.uint64), axis=0)
        return [bucket.tolist() for bucket in np.split(smallest, self.config.num_buckets)]


class _Buckets(MinhashDedupBuckets):
    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        # It opens one file of every task.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        super().run(data, rank, world_size)
        bucket, part = divmod(rank, world_size // self.config.num_buckets)
        sync(Path(self.output_folder.path) / f"{bucket:05d}_{part:02d}.dups")


class _Clusters(MinhashDedupCluster):
    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        super().run(data, rank, world_size)
        folder = Path(self.output_folder.path)
        if folder.exists():  # there are near-duplicates
            sync_folder(folder)
