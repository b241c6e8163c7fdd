"""The end of preparing: what the tasks of a stream report becomes index.json, token_counts.npy and stream.json."""

import json
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from data.preparation.choice import TaskPlan, filter_labels
from data.preparation.config import PrepareConfig
from data.preparation.documents import ODD, SPLITS, load_arrays, load_scan, mark, numbered
from data.preparation.output import WORK
from data.preparation.sources import LineError
from data.preparation.sources.text import shown
from data.preparation.writing import token_dtype
from data.store.manifest import CHUNKS, MANIFEST, StreamManifest, pack_chunks
from data.tokenizer import tokenizer_facts
from flexbert_core.durable import write_file
from flexbert_core.schema import ConfigError

# From this share on of tokens that a tokenizer does not know it is warned: of natural text in a language that it was
# made for it is some hundredths of a percent.
_UNKNOWN_SHARE = 0.01
_SHOWN_REASONS = 6


class Reading:
    """What reading a stream came upon: all of the stream, whatever split it is in."""

    def __init__(self, made_from: dict[str, Any], work: Path, ranks: Sequence[int]) -> None:
        """made_from: of the stream, in sources.json. ranks: its tasks."""
        found: list[dict[str, list[Any]]] = [
            json.loads(numbered(work / "scan", rank, ".skipped.json").read_text(encoding="utf-8")) for rank in ranks
        ]
        odd, documents = 0, 0
        for rank in ranks:
            filtered = load_scan(work, rank, "filtered")["filtered"]
            odd, documents = odd + int((filtered == ODD).sum()), documents + len(filtered)
        reasons = sorted({reason for each in found for reason in each})
        self.read = {"files": made_from["read"], "documents": documents - odd}
        self.skipped = {
            "files": made_from["skipped"],
            "documents": {reason: sum(each.get(reason, [0])[0] for each in found) for reason in reasons},
        }
        self._first: dict[str, Any] = {
            reason: next(each[reason][1] for each in found if reason in each) for reason in reasons
        }

    def __str__(self) -> str:
        files = sorted(self.skipped["files"].items(), key=lambda item: -item[1])
        parts = [f"{count:,} {reason}" for reason, count in files[:_SHOWN_REASONS]]
        if files[_SHOWN_REASONS:]:
            parts.append(f"{sum(count for _, count in files[_SHOWN_REASONS:]):,} for other reasons")
        for reason, count in self.skipped["documents"].items():
            first = self._first[reason]
            first = str(LineError(*first)) if isinstance(first, list) else first
            first = f" (the first: {shown(first)})" if first else ""
            parts.append(f"{count:,} {reason}{first}")
        read = f"read {self.read['documents']:,} documents from {self.read['files']:,} files"
        return f"{read}; skipped: {', '.join(parts) or 'nothing'}"


def summary(manifest: StreamManifest) -> list[str]:
    """What prepare says about a split, in one line, and in another what should not be overlooked."""
    name = f"{manifest.name}/{manifest.split}"
    dropped = {"duplicates": manifest.duplicate_documents, **manifest.filtered}
    more = {"over max_bytes": manifest.over_max_bytes, "empty": manifest.empty_documents}
    dropped |= {why: count for why, count in more.items() if count}
    lines = [
        f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({unknown_share(manifest)}), "
        f"{manifest.bytes / 1e6:.1f} MB; dropped: " + ", ".join(f"{count:,} {why}" for why, count in dropped.items())
    ]
    if manifest.unknown_tokens and manifest.unknown_tokens >= _UNKNOWN_SHARE * manifest.tokens:
        fix = "the tokenizer does not know this text: choose another, or train one (tokenizer: train)"
        lines.append(f"warning: {name}: {unknown_share(manifest)} (id {manifest.unk_token_id}): {fix}")
    return lines


def unknown_share(manifest: StreamManifest) -> str:
    """How much of a split the tokenizer does not know."""
    if manifest.unknown_tokens is None:
        return "not known how many of them unknown"
    return f"{100 * manifest.unknown_tokens / max(manifest.tokens, 1):.2f} % of them unknown"


def check_tokens(config: PrepareConfig, output: Path, plans: Sequence[TaskPlan]) -> None:
    """Raises ConfigError when all documents of a split give no tokens: blank, or nothing that the tokenizer knows."""
    for name in config.streams:
        ranks = [rank for rank, plan in enumerate(plans) if plan.stream == name]
        reports = [json.loads(numbered(output / WORK / "done", rank, ".json").read_text("utf-8")) for rank in ranks]
        documents = {split: sum(report[split]["documents"] for report in reports) for split in config.splits(name)}
        without = [split for split, count in documents.items() if count == 0]
        if not without:
            continue
        empty = sum(report[split]["empty_documents"] for report in reports for split in without)
        if len(without) == len(documents):
            fault = f"holds no document that gives a token ({empty:,} do not): choose another source or tokenizer"
        elif without == ["train"]:
            fault = f"none of the {empty:,} documents in train gives a token: lower validation_fraction"
        else:
            share = config.validation_share(name)
            fault = (
                f"none of the {empty:,} documents in validation gives a token: raise validation_fraction "
                f"(now {share}), or set it to 0 for no validation split"
            )
        raise ConfigError(f"{config._file}: streams.{name}: {fault}; then delete {output}, or choose another output")


def write_manifest(
    config: PrepareConfig,
    output: Path,
    plans: Sequence[TaskPlan],
    name: str,
    split: str,
    reading: Reading,
) -> StreamManifest:
    """Write index.json, token_counts.npy, chunks.npy and, last, stream.json of one split of one stream."""
    folder, work = output / name / split, output / WORK
    facts = tokenizer_facts(output / "tokenizer")
    ranks = [rank for rank, plan in enumerate(plans) if plan.stream == name]
    reports = [json.loads(numbered(work / "done", rank, ".json").read_text(encoding="utf-8"))[split] for rank in ranks]
    shards = [shard for report in reports for shard in report["shards"]]
    counts = np.zeros(facts.vocab_size, np.uint64)
    chunks = []
    for rank in ranks:
        arrays = load_arrays(numbered(work / "done", rank, ".npz"), mark(work, "tokenise", rank))
        counts += arrays[split]
        chunks.append(arrays[f"{split}_chunks"])
    chunk_file, chunk_digest = pack_chunks(chunks)
    histogram = np.zeros(64, np.int64)
    for report in reports:
        histogram[: len(report["length_histogram"])] += report["length_histogram"]
    manifest = StreamManifest(
        schema_version=2,
        name=name,
        split=split,
        dtype=token_dtype(facts.vocab_size),  # pyright: ignore[reportArgumentType]
        tokenizer_fingerprint=facts.fingerprint,
        **facts.model_dump(exclude={"fingerprint"}),
        documents=sum(report["documents"] for report in reports),
        tokens=sum(report["tokens"] for report in reports),
        bytes=sum(report["bytes"] for report in reports),
        empty_documents=sum(report["empty_documents"] for report in reports),
        duplicate_documents=sum(plans[rank].duplicates[SPLITS.index(split)] for rank in ranks),
        filtered={
            label: sum(plans[rank].filtered[label][SPLITS.index(split)] for rank in ranks)
            for label in filter_labels(config, name)
        },
        over_max_bytes=sum(plans[rank].over_max_bytes[SPLITS.index(split)] for rank in ranks),
        unknown_tokens=0 if facts.unk_token_id is None else int(counts[facts.unk_token_id]),
        read=reading.read,
        skipped=reading.skipped,
        length_histogram={str(2**power): int(count) for power, count in enumerate(histogram) if count},
        source=config.streams[name].source.model_dump(mode="json"),
        chunk_documents=json.loads((work / "plan" / f"{name}.json").read_text(encoding="utf-8"))[split],
        chunks_xxh3_64=chunk_digest,
        shards=[
            {  # pyright: ignore[reportArgumentType]
                "file": shard["raw_data"]["basename"],
                "documents": shard["samples"],
                "tokens": shard.pop("tokens"),
                "bytes": shard["raw_data"]["bytes"],
                "xxh3_64": shard["raw_data"]["hashes"]["xxh3_64"],
                "header_xxh3_64": shard.pop("header_xxh3_64"),
            }
            for shard in shards
        ],
    )
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)
    write_file(folder / "index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
    array = BytesIO()
    np.save(array, counts)
    write_file(folder / "token_counts.npy", array.getvalue())
    write_file(folder / CHUNKS, chunk_file)
    write_file(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest
