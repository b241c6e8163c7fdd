"""What the loader reaches: packing efficiency on real text, planning, tokens/s from shards on disk, resume.

`python -m benchmarks.loader [DATASET]` prints JSON lines. DATASET: a prepared dataset for the packing figures; default:
the prose of ../shared/data with this machine's Python sources, tokenised on the first call, or where that is absent the
builtin corpus (`make demo`'s). Throughput is measured on shards of documents of about 600 tokens, written on the first
call to datasets/bench-600: what is read is what a run reads, but for the lengths and ids, which are drawn.

The packing peer is the reference method of ModernBERT's sequence packer, re-implemented from its description: a buffer
of five batches of sequences, each placed into the fullest row of the current batch that still takes it, a batch emitted
when nothing in the buffer fits.
"""

import json
import os
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import parser_of
from data.feed.loader import LoaderConfig, LoaderPhase, MixtureDataset, build_loader
from data.feed.mixture import DataConfig, StreamConfig
from data.feed.packing import SPECIAL_TOKENS_PER_SEQUENCE, Spans, cut
from data.preparation.config import PrepareConfig
from data.preparation.dataset import prepare
from data.store.shards import open_stream
from flexbert_core.composing import load_node
from flexbert_core.schema import validate

ROWS_PER_BATCH = 8  # of the greedy packer
PROSE, BENCH, SIX_HUNDRED = Path("../shared/data/prose"), Path("datasets/bench"), Path("datasets/bench-600")
ROWS, LENGTH, WARM_UP, STEPS, REPEATS = 512, 1024, 20, 120, 5


def greedy_efficiency(lengths: NDArray[np.int64], max_seq_len: int) -> float:
    """Share of real tokens in the slots that the buffered greedy packer emits. lengths: of pieces, in arrival order."""
    queue = lengths.tolist()[::-1]
    buffer: list[int] = []
    used = slots = 0
    while queue or buffer:
        while queue and len(buffer) < 5 * ROWS_PER_BATCH:
            buffer.append(queue.pop())
        space = [max_seq_len] * ROWS_PER_BATCH
        placed = True
        while placed:
            placed = False
            for number, length in enumerate(buffer):
                fits = [left for left in space if left >= length]
                if fits:
                    space[space.index(min(fits))] -= length
                    del buffer[number]
                    if queue:
                        buffer.append(queue.pop())
                    placed = True
                    break
        used += ROWS_PER_BATCH * max_seq_len - sum(space)
        slots += ROWS_PER_BATCH * max_seq_len
    return used / slots


def real_text() -> Path:
    """The dataset of the packing figures, prepared if need be."""
    if not PROSE.is_dir():
        config = validate(PrepareConfig, load_node("configs/data/demo.yaml"), "configs/data/demo.yaml")
    else:
        prose = {"source": {"name": "jsonl", "paths": [f"{PROSE}/*.jsonl.xz"]}}
        code = {"source": {"name": "code", "paths": [str(Path(os.__file__).parent)]}, "max_bytes": 60_000_000}
        node = {
            "output": str(BENCH),
            "tokenizer": {"name": "load", "path": "../shared/data/tokenizers/gpt-neox-olmo/tokenizer.json"},
            "validation_fraction": 0,
            "streams": {"prose": prose, "code": code},
        }
        config = validate(PrepareConfig, node, "benchmarks.loader")
    prepare(config)
    return Path(config.output)


def six_hundred() -> Path:
    """Two streams of documents of 600 tokens in the mean (lognormal), 130 M tokens."""
    if not (SIX_HUNDRED / "b").is_dir():
        from tests.helpers.synthetic import write_stream, write_tokenizer

        for number, name in enumerate("ab"):
            rng = np.random.Generator(np.random.Philox(number))
            lengths = np.clip(rng.lognormal(np.log(600) - 0.5, 1.0, 110_000), 16, 100_000).astype(int)
            documents = [rng.integers(5, 50_000, length) for length in lengths]
            write_stream(SIX_HUNDRED / name, "train", documents, 50_368, shard_bytes=64_000_000, chunk=2)
        write_tokenizer(SIX_HUNDRED)
    return SIX_HUNDRED


def configuration(dataset: Path, rows: int, max_seq_len: int, lanes: int | None, workers: int) -> LoaderConfig:
    names = sorted(path.name for path in dataset.iterdir() if (path / "train").is_dir())
    streams = {name: StreamConfig(path=str(dataset / name)) for name in names}
    data = DataConfig(tokenizer=str(dataset / "tokenizer"), streams=streams, lanes=lanes, num_workers=workers)
    phase = LoaderPhase(steps=10**6, global_batch_size=rows, max_seq_len=max_seq_len)
    return LoaderConfig(seed=17, data=data, phases=[phase])


def packing(dataset: Path, max_seq_len: int) -> dict[str, object]:
    """One pass over the dataset in blocks of the default size, one lane; the peer gets its documents shuffled."""
    plan = MixtureDataset(configuration(dataset, 1, max_seq_len, 1, 0), 0, 1)
    lengths = np.concatenate(
        [stream.lengths(shard) for stream in plan.streams for shard in range(len(stream.manifest.shards))]
    )
    whole = Spans(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths)
    pieces = cut(whole, max_seq_len)
    total = int((pieces.stop - pieces.start + SPECIAL_TOKENS_PER_SEQUENCE).sum())
    rows = tokens = 0
    for _, _, taken, lanes in plan.plan():
        rows += 1
        tokens += sum(int((p.stop - p.start + SPECIAL_TOKENS_PER_SEQUENCE).sum()) for p in (r.pieces for r in taken))
        if lanes[0].cursor.at[0].number or tokens >= total:
            break
    arrival = np.random.Generator(np.random.Philox(17)).permutation(len(whole))
    shuffled = cut(whole.take(arrival), max_seq_len)
    peer = greedy_efficiency(shuffled.stop - shuffled.start + SPECIAL_TOKENS_PER_SEQUENCE, max_seq_len)
    return {
        "measure": "packing",
        "max_seq_len": max_seq_len,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "plan_efficiency": round(tokens / (rows * max_seq_len), 5),
        "greedy_efficiency": round(peer, 5),
    }


def planning(dataset: Path, max_seq_len: int) -> dict[str, object]:
    """Lengths to rows, one core: median of several runs over 8 lanes with blocks of the default size."""
    rates = []
    rows = ROWS * LENGTH // max_seq_len
    for _ in range(REPEATS):
        plan = MixtureDataset(configuration(dataset, rows, max_seq_len, 8, 0), 0, 1).plan()
        next(plan)
        start = time.perf_counter()
        for _ in islice(plan, 4 * STEPS):
            pass
        rates.append(4 * STEPS * ROWS * LENGTH / (time.perf_counter() - start))
    return {"measure": "planning", "max_seq_len": max_seq_len, "tokens_per_second": round(statistics.median(rates))}


def throughput(dataset: Path, workers: int) -> dict[str, object]:
    """Real tokens/s that arrive, masked, in the training process; median of several runs."""
    rates = []
    for _ in range(REPEATS):
        batches = iter(build_loader(configuration(dataset, ROWS, LENGTH, None, workers)))
        for _ in range(WARM_UP):
            next(batches)
        start = time.perf_counter()
        tokens = sum(len(batch["input_ids"]) for batch in islice(batches, STEPS))
        rates.append(tokens / (time.perf_counter() - start))
    return {
        "measure": "loader",
        "workers": workers,
        "cores": len(os.sched_getaffinity(0)),
        "tokens_per_second": round(statistics.median(rates)),
        "slowest": round(min(rates)),
    }


def resume(dataset: Path) -> dict[str, object]:
    """From a state to the first batch behind it, with an open loader and with one that is opened for it."""
    loader = build_loader(configuration(dataset, ROWS, LENGTH, None, 2))
    for _ in islice(loader, 300):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    start = time.perf_counter()
    again = build_loader(configuration(dataset, ROWS, LENGTH, None, 2))
    opened = time.perf_counter()
    again.load_state_dict(state)
    next(iter(again))
    return {
        "measure": "resume",
        "after_steps": state["step"],
        "open_seconds": round(opened - start, 3),
        "resume_seconds": round(time.perf_counter() - opened, 3),
    }


def measurements(dataset: Path) -> Iterator[dict[str, object]]:
    for max_seq_len in (512, 1024, 2048, 8192):
        yield packing(dataset, max_seq_len)
    drawn = six_hundred()
    stream = open_stream(drawn / "a" / "train").manifest
    yield {"measure": "documents", "mean_tokens": round(stream.tokens / stream.documents)}
    for max_seq_len in (1024, 8192):
        yield planning(drawn, max_seq_len)
    for workers in (1, 2):
        yield throughput(drawn, workers)
    yield resume(drawn)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("dataset", type=Path, nargs="?", metavar="DATASET", help="default: made of real text")
    for line in measurements(parser.parse_args().dataset or real_text()):
        print(json.dumps(line), flush=True)
