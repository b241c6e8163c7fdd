"""Streams of known content for the loader's tests, written with mosaicml-streaming's own writer."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import xxhash
from streaming import MDSWriter

from data.preparation.writing import finish_shards
from data.store.manifest import CHUNKS, describe_shard, pack_chunks

TOKENIZER = b"not one that could be loaded"
SPECIAL = {"unk": 0, "cls": 1, "sep": 2, "pad": 3, "mask": 4}


def documents(seed: int, count: int, longest: int, vocab_size: int = 512) -> list[np.ndarray]:
    """Random documents of 1 to `longest` tokens, most of them short."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.uniform(0, np.log(longest), count)).astype(int), 1, longest)
    return [rng.integers(5, vocab_size, length) for length in lengths]


def write_tokenizer(folder: Path) -> str:
    """The path of what passes for the streams' tokenizer as long as none of its tokens is asked for."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_bytes(TOKENIZER)
    return str(folder / "tokenizer")


def write_stream(
    folder: Path,
    split: str,
    docs: list[np.ndarray],
    vocab_size: int = 512,
    shard_bytes: int = 4096,
    chunk: int = 1,
    tokenizer: str = hashlib.sha256(TOKENIZER).hexdigest(),
) -> Path:
    """Write one split of a stream with several shards; returns its path. tokenizer: its fingerprint, default:
    that of write_tokenizer."""
    path = folder / split
    dtype = "uint16" if vocab_size <= 65536 else "uint32"
    writer = MDSWriter(out=str(path), columns={"tokens": f"ndarray:{dtype}"}, size_limit=shard_bytes)
    for document in docs:
        writer.write({"tokens": document.astype(dtype)})
    finish_shards(writer)
    index = json.loads((path / "index.json").read_text())
    shards, all_chunks, first = [], [], 0
    for entry in index["shards"]:
        name, count = entry["raw_data"]["basename"], entry["samples"]
        data = (path / name).read_bytes()
        tokens = sum(len(document) for document in docs[first : first + count])
        header, chunks = describe_shard(data, np.dtype(dtype).itemsize, chunk)
        hashes = {"xxh3_64": xxhash.xxh3_64_hexdigest(data), "header_xxh3_64": header}
        shards.append({"file": name, "documents": count, "tokens": tokens, "bytes": len(data), **hashes})
        all_chunks.append(chunks)
        first += count
    chunk_file, chunk_digest = pack_chunks(all_chunks)
    (path / CHUNKS).write_bytes(chunk_file)
    tokens = sum(map(len, docs))
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *docs]), minlength=vocab_size).astype(np.uint64)
    np.save(path / "token_counts.npy", counts)
    powers = Counter(len(document).bit_length() - 1 for document in docs)
    manifest = {
        "schema_version": 2,
        "name": folder.name,
        "split": split,
        "dtype": dtype,
        "tokenizer_fingerprint": tokenizer,
        "vocab_size": vocab_size,
        **{f"{name}_token_id": value for name, value in SPECIAL.items()},
        "special_ids": list(SPECIAL.values()),
        "documents": len(docs),
        "tokens": tokens,
        "bytes": 4 * tokens,
        "empty_documents": 0,
        "duplicate_documents": 0,
        "length_histogram": {str(1 << bits): count for bits, count in sorted(powers.items())},
        "source": {"name": "synthetic"},
        "chunk_documents": chunk,
        "chunks_xxh3_64": chunk_digest,
        "shards": shards,
    }
    (path / "stream.json").write_text(json.dumps(manifest))
    return path
