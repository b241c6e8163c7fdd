"""The loader at two trillion tokens, on one core: start-up, first batch, resume at 1.9T, planning throughput, memory.

`python -m benchmarks.scale [FOLDER]` prints JSON lines. It writes a manifest of 62,000 shards and two billion documents
(lengths lognormal, mean about 1000 tokens) and a sparse file for each shard: sizes are real, offsets are computed and
written, with the hash that the manifest says, when a shard is first opened, and tokens read as zeros (so that their
hashes, which cannot be known without writing 4 TB, are the one thing left unchecked). All else is the code of a run.
"""

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numba
import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.progress import track

from benchmarks.arguments import parser_of
from data.feed.lanes import LaneCursor
from data.feed.loader import LoaderConfig, LoaderPhase, MixtureDataset
from data.feed.mixture import DataConfig, StreamConfig
from data.feed.order import Place
from data.store.local import LocalFiles
from data.store.manifest import CHUNKS, MANIFEST, ShardInfo, pack_chunks
from data.store.shards import Stream

SHARDS, DOCUMENTS = 62_000, 32_258  # documents per shard
CHUNK = 2048
LANES, ROWS, LENGTH = 64, 4608, 1024  # ModernBERT's batch
DEPTH = 1_900_000_000_000
STEPS = 600  # planned
_HEADER_END = 4 * (DOCUMENTS + 2)


@numba.njit(cache=True)
def shard_offsets(shard: int, table: NDArray[np.int64], chunk: int) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Offsets of a shard whose document lengths are drawn by a hash from `table`, and the tokens of its chunks."""
    offsets = np.empty(DOCUMENTS + 1, np.uint32)
    tokens = np.zeros((DOCUMENTS + chunk - 1) // chunk, np.uint64)
    place = np.int64(_HEADER_END)
    offsets[0] = place
    for document in range(DOCUMENTS):
        value = np.uint64(shard * DOCUMENTS + document) * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        length = table[(value >> np.uint64(40)) & np.uint64(0xFFFF)]
        place += 2 * length + (6 if length < 256 else 7 if length < 65536 else 9)
        offsets[document + 1] = place
        tokens[document // chunk] += np.uint64(length)
    return offsets, tokens


def length_table() -> NDArray[np.int64]:
    """65,536 document lengths, lognormal (median 500): drawn alike, they give a mean of about 1000 tokens."""
    draws = np.random.Generator(np.random.Philox(7)).lognormal(np.log(500), 1.18, 65536)
    return np.clip(draws, 16, 30_000).astype(np.int64)


def header(shard: int, table: NDArray[np.int64]) -> tuple[bytes, NDArray[np.uint64]]:
    """Count and offsets of a shard as in its file, and its chunks' tokens."""
    offsets, tokens = shard_offsets(shard, table, CHUNK)
    return np.uint32(DOCUMENTS).tobytes() + offsets.tobytes(), tokens


def write_dataset(folder: Path) -> None:
    """The manifest, chunks.npy and 62,000 sparse files."""
    table, shards, chunks = length_table(), [], []
    folder.mkdir(parents=True)
    for shard in track(range(SHARDS), "writing the 2T index", transient=True):
        head, tokens = header(shard, table)
        chunks.append(np.stack([tokens, np.zeros_like(tokens)], 1))
        size = int(np.frombuffer(head[-4:], np.uint32)[0])
        name = f"part-{shard // 1000:05d}/shard.{shard % 1000:05d}.mds"
        digest = xxhash.xxh3_64_hexdigest(head)
        shards.append(
            {
                "file": name,
                "documents": DOCUMENTS,
                "tokens": int(tokens.sum()),
                "bytes": size,
                "xxh3_64": digest,
                "header_xxh3_64": digest,
            }
        )
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(size)
    content, chunk_digest = pack_chunks(chunks)
    (folder / CHUNKS).write_bytes(content)
    manifest = {
        "schema_version": 2,
        "name": "simulated",
        "split": "train",
        "dtype": "uint16",
        "tokenizer_fingerprint": "simulated",
        "vocab_size": 50368,
        **{f"{name}_token_id": number for number, name in enumerate(("unk", "cls", "sep", "pad", "mask"), 1)},
        "special_ids": [1, 2, 3, 4, 5],
        "documents": SHARDS * DOCUMENTS,
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": 0,
        "empty_documents": 0,
        "duplicate_documents": 0,
        "length_histogram": {"16": SHARDS * DOCUMENTS},
        "source": {"name": "simulated"},
        "chunk_documents": CHUNK,
        "chunks_xxh3_64": chunk_digest,
        "shards": shards,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


class SparseFiles(LocalFiles):
    """Writes a shard's offsets into its sparse file before it is first opened."""

    def open(self, info: ShardInfo) -> int:
        file = self.path / info.file
        with file.open("r+b") as out:
            if out.read(4) == bytes(4):
                part, name = info.file.split("/")
                out.seek(0)
                out.write(header(int(part[5:]) * 1000 + int(name.split(".")[1]), length_table())[0])
        return super().open(info)


class SimulatedStream(Stream):
    """A stream of zeros whose chunks have no known hashes."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.files = SparseFiles(Path(path))

    def _check_chunk(self, shard: int, chunk: int, opened: object) -> None:
        self._checked.add(chunk)


def config(folder: Path) -> LoaderConfig:
    data = DataConfig(tokenizer="none", streams={"simulated": StreamConfig(path=str(folder))}, lanes=LANES)
    phase = LoaderPhase(steps=10**6, global_batch_size=ROWS, max_seq_len=LENGTH)
    return LoaderConfig(seed=17, data=data, phases=[phase])


def resident() -> float:
    """Memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def first_batch(dataset: MixtureDataset) -> int:
    """Real tokens of the next global batch."""
    return len(next(iter(dataset)).ids)


def open_dataset(folder: Path) -> MixtureDataset:
    """What a run does before its first batch."""
    stream = SimulatedStream(folder)
    stream.check_files()
    return MixtureDataset(config(folder), 0, 1, [stream])


def state_at(dataset: MixtureDataset, tokens: int) -> dict[str, object]:
    """The state that a run has after about so many tokens: every lane at the start of a block."""
    line, mixture = dataset.order.lines[0], dataset.mixtures[0]
    block = int(tokens / LANES / mixture.tokens[0])
    lanes = []
    for lane in range(LANES):
        place = Place(0, line.tokens * lane // LANES + int(block * mixture.tokens[0]))
        lanes.append(LaneCursor(block, mixture, (place,), (), None, (0,)).to_list())
    return {"step": tokens // (ROWS * LENGTH), "lanes": lanes}


def materialise(folder: Path) -> None:
    """Go once through all that is measured, so that the offsets it needs are written, and numba's code is compiled."""
    dataset = open_dataset(folder)
    first_batch(dataset)
    dataset.load_state_dict(state_at(dataset, DEPTH))
    first_batch(dataset)
    for _ in islice(dataset.plan(), STEPS + 1):
        pass


def measurements(folder: Path) -> Iterator[dict[str, object]]:
    imports = resident()
    start = time.perf_counter()
    dataset = open_dataset(folder)
    seconds = time.perf_counter() - start
    manifest = dataset.streams[0].manifest
    yield {
        "measure": "start-up",
        "seconds": round(seconds, 2),
        "index_megabytes": round(resident() - imports),
        "shards": len(manifest.shards),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "lanes": LANES,
    }
    start = time.perf_counter()
    tokens = first_batch(dataset)
    yield {"measure": "first batch", "seconds": round(time.perf_counter() - start, 2), "tokens": tokens}
    state = json.loads(json.dumps(state_at(dataset, DEPTH)))
    start = time.perf_counter()
    dataset.load_state_dict(state)
    tokens = first_batch(dataset)
    yield {
        "measure": "resume",
        "at_tokens": DEPTH,
        "seconds": round(time.perf_counter() - start, 2),
        "tokens": tokens,
        "state_bytes": len(json.dumps(state)),
    }
    plan = dataset.plan()
    next(plan)
    start = time.perf_counter()
    for _ in islice(plan, STEPS):
        pass
    seconds = time.perf_counter() - start
    yield {"measure": "planning", "tokens_per_second": round(STEPS * ROWS * LENGTH / seconds), "steps": STEPS}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    yield {"measure": "memory", "peak_megabytes": round(peak), "of_which_imports_megabytes": round(imports)}


def main(folder: Path) -> None:
    if not (folder / MANIFEST).exists():
        write_dataset(folder)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # In a process of its own: what it needs besides (compilation, offsets being written) is no part of the figures.
    child = multiprocessing.get_context("spawn").Process(target=materialise, args=(folder,))
    child.start()
    child.join()
    for line in measurements(folder):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("datasets/simulated-2t"), metavar="FOLDER")
    main(parser.parse_args().folder)
