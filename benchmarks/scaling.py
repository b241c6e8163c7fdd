"""On paper: what communication costs a run on 8, 64 and 512 GPUs, by DDP, FSDP2 and HSDP. Nothing here was measured.

`python -m benchmarks.scaling [--config FILE] [--gpus 8,64,512] [--network GBIT] [--device h100-sxm] [KEY=VALUE ...]`
prints a JSON line for each way and number of GPUs, of the run file's first phase; its global batch is shared by all.

A step is simulated block by block, on two queues that run side by side as CUDA streams do: what the device computes
(seconds of commands.prediction), and what it sends. DDP reduces buckets of 25 MB as the last microbatch's backward
fills them. FSDP2 gathers each block before its forward and again before its backward, one ahead, in every microbatch,
and reduces behind the last one's backward. HSDP does so inside a node, and then sums each part over the nodes.

    step_ms        of all of it
    bubbles        share of the step in which the device computes nothing
    efficiency     tokens/s over GPUs x that of one GPU that sends nothing, at the same microbatch

Not in it: NVLS, kernels that are slower while NCCL runs beside them, ranks that wait for the slowest, the loader.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arguments import count, override, parser_of
from commands.prediction import DEVICES, step_seconds
from flexbert import build
from flexbert.accounting import count_parameters
from flexbert.config import without_init
from recipe.config import RunConfig, load_run_config
from recipe.phases import Phase, PhasePlan
from training.microbatches import Microbatches

ROOT = Path(__file__).parent.parent
PER_NODE = 8
# NVIDIA's H100 data sheet: NVLink 900 GB/s, both directions together. NCCL's tests reach about 360 of 450 one way.
_NVLINK = 0.8 * 450e9
_NETWORK_SHARE = 0.85  # of a network's bits that NCCL's rings use: an assumption
# Seconds of a hop, and of a collective's start: NCCL 2.2x, src/graph/tuning.cc, protocol Simple.
_BASE, _HOP_NVLINK, _HOP_NETWORK = 8.4e-6, 3.4e-6, 14e-6
_TREE_NVLINK, _TREE_NETWORK = 4.0e-6, 14e-6
_BUCKET = 25 * 2**20  # torch's DistributedDataParallel, bucket_cap_mb
_SMALL = 8  # collectives of Composer and ours a step, each read by the host (docs/gpu.md)
WAYS = ("ddp", "fsdp2", "fsdp2, gather bf16", "hsdp", "hsdp, gather bf16")


@dataclass(frozen=True)
class Cluster:
    """gpus: in all. network: bytes/s of a node, one way."""

    gpus: int
    network: float

    @property
    def nodes(self) -> int:
        return -(-self.gpus // PER_NODE)

    def _ring(self, ranks: int, within: bool) -> tuple[float, float]:
        """Bytes/s of a ring through all ranks, and seconds of its hops. within: a node."""
        if within or self.nodes == 1:
            return _NVLINK, (ranks - 1) * _HOP_NVLINK
        # A node's rings go out by all its network cards: what each GPU's share of them can send is not more.
        return min(_NVLINK, self.network * _NETWORK_SHARE), (
            ranks - self.nodes
        ) * _HOP_NVLINK + self.nodes * _HOP_NETWORK

    def gather(self, size: float, ranks: int, within: bool) -> float:
        """Seconds of an all-gather or reduce-scatter of so many bytes in all."""
        if ranks == 1:
            return 0.0
        rate, hops = self._ring(ranks, within)
        return _BASE + hops + (ranks - 1) / ranks * size / rate

    def all_reduce(self, size: float) -> float:
        """Of all ranks: by a ring, or a tree where its fewer hops are worth it."""
        if self.gpus == 1:
            return 0.0
        rate, hops = self._ring(self.gpus, False)
        sent = 2 * (self.gpus - 1) / self.gpus * size / rate
        inside = min(self.gpus, PER_NODE) - 1
        tree = 2 * (inside * _TREE_NVLINK + math.ceil(math.log2(self.nodes)) * _TREE_NETWORK)
        return _BASE + sent + min(2 * hops, tree)

    def across(self, size: float) -> float:
        """An all-reduce over the nodes, of a part of so many bytes on each of a node's GPUs at the same time."""
        if self.nodes == 1:
            return 0.0
        rate = self.network * _NETWORK_SHARE / PER_NODE
        hops = min(2 * (self.nodes - 1), 2 * math.ceil(math.log2(self.nodes))) * _HOP_NETWORK
        return _BASE + hops + 2 * (self.nodes - 1) / self.nodes * size / rate


class Queues:
    """Times at which the two queues are through with what they were given."""

    def __init__(self) -> None:
        self.computed = self.sent = self.busy = 0.0

    def compute(self, seconds: float, after: float = 0.0) -> float:
        self.computed = max(self.computed, after) + seconds
        self.busy += seconds
        return self.computed

    def send(self, seconds: float, after: float = 0.0) -> float:
        self.sent = max(self.sent, after) + seconds
        return self.sent


@dataclass(frozen=True)
class Work:
    """Of a rank's step. blocks: parameters of each, in order of forward; rest: of embeddings and head. seconds: of a
    microbatch's forward and backward; update: of the optimizer, with all parameters."""

    blocks: Sequence[int]
    rest: int
    microbatches: int
    seconds: float
    update: float


def simulate(way: str, work: Work, cluster: Cluster) -> tuple[float, float]:
    """Seconds of a step, and of them those in which the device computes."""
    queues = Queues()
    forward = work.seconds / 3 / len(work.blocks)
    backward = 2 * forward
    host = _SMALL * cluster.all_reduce(8) if cluster.gpus > 1 else 0.0
    if way == "ddp":
        _ddp(queues, work, cluster, forward, backward)
        update = work.update
    else:
        _sharded(queues, work, cluster, forward, backward, 2.0 if "bf16" in way else 4.0, way.startswith("hsdp"))
        update = work.update / (min(PER_NODE, cluster.gpus) if way.startswith("hsdp") else cluster.gpus)
    queues.compute(update, queues.sent)
    return queues.computed + host, queues.busy


def _ddp(queues: Queues, work: Work, cluster: Cluster, forward: float, backward: float) -> None:
    filled = 4.0 * work.rest / 2  # the head's part comes first, that of the tied table last
    for number in range(work.microbatches):
        for _ in work.blocks:
            queues.compute(forward)
        for block in reversed(work.blocks):
            done = queues.compute(backward)
            if number + 1 == work.microbatches:
                filled += 4.0 * block
                while filled >= _BUCKET:
                    queues.send(cluster.all_reduce(_BUCKET), done)
                    filled -= _BUCKET
    queues.send(cluster.all_reduce(filled + 4.0 * work.rest / 2), queues.computed)


def _sharded(
    queues: Queues, work: Work, cluster: Cluster, forward: float, backward: float, gathered: float, copies: bool
) -> None:
    ranks = min(PER_NODE, cluster.gpus) if copies else cluster.gpus

    def gather(size: float, after: float) -> float:
        return queues.send(cluster.gather(size, ranks, copies), after)

    def reduce(parameters: int, after: float) -> None:
        queues.send(cluster.gather(4.0 * parameters, ranks, copies), after)
        if copies:
            queues.send(cluster.across(4.0 * parameters / ranks), after)

    for number in range(work.microbatches):
        last = number + 1 == work.microbatches
        ready = gather(4.0 * work.rest, queues.computed)  # float32, whatever blocks are gathered in
        for seconds, order in ((forward, list(work.blocks)), (backward, list(reversed(work.blocks)))):
            begun = queues.computed
            ready = max(ready, gather(gathered * order[0], begun))
            for place, block in enumerate(order):
                begun = max(queues.computed, ready)
                done = queues.compute(seconds, ready)
                if place + 1 < len(order):  # one ahead: while this one runs
                    ready = gather(gathered * order[place + 1], begun)
                if last and seconds == backward:
                    reduce(block, done)
        if last:
            reduce(work.rest, queues.computed)


def work_of(config: RunConfig, phase: Phase, device: str, gpus: int) -> Work:
    """What one of so many ranks does in a step. Raises ValueError for a batch that they cannot divide."""
    if phase.global_batch_size % gpus:
        raise ValueError(f"batches of {phase.global_batch_size} rows cannot be divided among {gpus} GPUs")
    rows = phase.global_batch_size // gpus
    microbatches = -(-rows // Microbatches(config.trainer).rows(phase.max_seq_len, rows))
    tokens = rows * phase.max_seq_len
    whole = step_seconds(config, phase, DEVICES[device], tokens, microbatches)
    update = step_seconds(config, phase, DEVICES[device], 0, 0)
    import torch

    with torch.device("meta"):
        model = build(without_init(config.model))
    blocks = [sum(each.numel() for each in block.parameters()) for block in model.encoder.layers]
    rest = count_parameters(config.model) - sum(blocks)
    return Work(blocks, rest, microbatches, (whole - update) / microbatches, update)


def lines(config: RunConfig, device: str, gpus: Sequence[int], network: float) -> list[dict[str, Any]]:
    """One for each way and number of GPUs. network: bytes/s of a node, one way."""
    phase = PhasePlan(config).phases[0]
    found = []
    for number in gpus:
        work = work_of(config, phase, device, number)
        alone = work.microbatches * work.seconds + work.update
        for way in WAYS:
            step, busy = simulate(way, work, Cluster(number, network))
            tokens = phase.global_batch_size * phase.max_seq_len
            found.append(
                {
                    "on_paper": True,
                    "gpus": number,
                    "way": way,
                    "tokens_a_rank": tokens // number,
                    "microbatches": work.microbatches,
                    "step_ms": round(1e3 * step, 1),
                    "bubbles": round(1 - busy / step, 4),
                    "efficiency": round(alone / step, 4),
                    "tokens_per_second": round(tokens / step),
                }
            )
    return found


def _numbers(text: str) -> list[int]:
    return [count(each) for each in text.split(",")]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs/pretrain/modernbert-base.yaml", help="a run file"
    )
    parser.add_argument("--gpus", type=_numbers, default=[8, 64, 512], help="separated by commas")
    parser.add_argument("--network", type=count, default=3200, help="Gbit/s of a node, one way; default: of a DGX H100")
    parser.add_argument("--device", choices=list(DEVICES), default="h100-sxm")
    parser.add_argument("overrides", type=override, nargs="*", help="of the run file: KEY=VALUE")
    arguments = parser.parse_args()
    config = load_run_config(arguments.config, arguments.overrides)
    try:
        found = lines(config, arguments.device, arguments.gpus, arguments.network * 1e9 / 8)
    except ValueError as error:
        parser.error(f"--gpus: {error}")
    for line in found:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
