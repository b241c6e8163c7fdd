"""Packing efficiency of the plan beside greedy best-fit over a buffer of five batches, on the same documents.

`python -m benchmarks.packing [DATASET]` prints one JSON line per row length. The peer is the reference method of
ModernBERT's sequence packer, re-implemented here from its description: a buffer of five batches of sequences, each
placed into the fullest row of the current batch that still takes it, a batch emitted when nothing in the buffer fits.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.loader import LoaderConfig, LoaderPhase, build_loader
from data.masking import MaskingConfig
from data.mixture import DataConfig, StreamConfig
from data.order import Lane
from data.packing import SPECIAL_TOKENS_PER_SEQUENCE, cut

ROWS_PER_BATCH = 8


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


def main(dataset: Path) -> None:
    names = sorted(path.name for path in dataset.iterdir() if (path / "train").is_dir())
    streams = {name: StreamConfig(path=str(dataset / name)) for name in names}
    data = DataConfig(tokenizer=str(dataset / "tokenizer"), streams=streams, lanes=2)
    for max_seq_len in (512, 1024, 2048, 8192):
        phase = LoaderPhase(steps=1, global_batch_size=2, max_seq_len=max_seq_len, masking=MaskingConfig())
        order = build_loader(LoaderConfig(seed=17, data=data, phases=[phase])).dataset.order
        spans = [order.spans(order.block(0, block)) for block in range(order.num_blocks)]
        pieces = [cut(block, max_seq_len) for block in spans]
        arrival = np.concatenate([block.stop - block.start + SPECIAL_TOKENS_PER_SEQUENCE for block in pieces])
        start, rows, tokens = time.perf_counter(), 0, 0
        for number in range(order.lanes):
            lane = Lane(order, number)
            while lane.cursor.epoch == 0:
                for row in lane.take(1, max_seq_len):
                    rows += 1
                    tokens += int((row.pieces.stop - row.pieces.start + SPECIAL_TOKENS_PER_SEQUENCE).sum())
        seconds = time.perf_counter() - start
        line = {
            "max_seq_len": max_seq_len,
            "documents": sum(len(block) for block in spans),
            "plan_efficiency": round(tokens / (rows * max_seq_len), 5),
            "greedy_efficiency": round(greedy_efficiency(arrival, max_seq_len), 5),
            "plan_tokens_per_second": round(tokens / seconds),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "datasets/demo"))
