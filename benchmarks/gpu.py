"""Our encoder against `transformers` on a CUDA device: training tokens/s, share of the GEMM rate, memory.

`python -m benchmarks.gpu [--rounds 5] [--cases CASE,...] [--ways WAY,...] [--profile FILE]` prints JSON lines.
ModernBERT base with the same weights on both sides sees the same 32,768 tokens a step, 30 % masked: rows of 1024, of
8192, or documents of real lengths, packed end to end (the peer's padded; what it does about it is its own). bfloat16
autocast over float32 weights; a step is forward, backward and torch's fused AdamW. The ways take turns; figures are
medians over the rounds.

    compiled, plain     ours as `main.py train` runs it, with trainer.compile and without; attention.backend auto
    flex, sdpa          ours compiled, with that kernel
    peer_flash          ModernBertForMaskedLM, flash_attention_2, which unpads by itself; scores of all tokens, since
                        with sparse_prediction this path fails on a shape (transformers 4.57.6)
    peer_compiled       the same with reference_compile
    peer_sdpa           the same model with sdpa and sparse_prediction: what it takes without flash-attn

`--agreement` prints how far losses and gradients are from float32 with the eager kernel instead.
"""

import json
import statistics
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import count, names_of, parser_of, refuse, with_defaults
from benchmarks.encoder_sides import MASKED, Batch, document_lengths, ours_of
from flexbert.accounting import batch_flops

TOKENS = 32_768
CASES = {"32 x 1024": 1024, "4 x 8192": 8192, "real lengths to 1024": None}
WAYS = ("compiled", "plain", "flex", "sdpa", "peer_flash", "peer_compiled", "peer_sdpa")


def batch_of(case: str) -> Batch:
    """The case's documents: TOKENS together."""
    length = CASES[case]
    if length is not None:
        return Batch([length] * (TOKENS // length), 50368, 0)
    lengths: list[int] = []
    for each in document_lengths(1024, 400):
        lengths.append(min(each, TOKENS - sum(lengths)))
        if sum(lengths) == TOKENS:
            return Batch(lengths, 50368, 0)
    raise SystemExit("benchmarks.gpu: the documents are too few")


def peer(attention: str, compiled: bool) -> Any:
    """ModernBERT base with random weights, the same each time."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(0)
    config = ModernBertConfig(
        sparse_prediction=attention == "sdpa",
        reference_compile=compiled,
        attn_implementation=attention,
        deterministic_flash_attn=False,
    )
    return ModernBertForMaskedLM(config)


class Way:
    """One model with its optimizer on the device."""

    def __init__(self, name: str) -> None:
        self.name, self.is_peer = name, name.startswith("peer")
        if self.is_peer:
            self.model = peer("sdpa" if name == "peer_sdpa" else "flash_attention_2", name == "peer_compiled")
        else:
            self.model = ours_of(peer("sdpa", False))
            backend = name if name in ("flex", "sdpa") else "auto"
            for module in self.model.modules():
                if hasattr(module, "window_size"):
                    module.config = module.config.model_copy(update={"backend": backend})
        self.model = self.model.cuda().train()
        if name in ("compiled", "flex", "sdpa"):
            self.model.compile_blocks()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batch: dict[str, Any] = {}

    def give(self, batch: Batch) -> None:
        """Put the batch on the device."""
        if self.is_peer:
            inputs = batch.padded
        else:
            inputs = {**batch.packed, "labels": batch.labels, "num_masked": int((batch.labels != -100).sum())}
        self.batch = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}

    def backward(self) -> torch.Tensor:
        """The loss; gradients are there."""
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Forward, backward, update."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self) -> float:
        """Seconds of a step."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def gemm_rate(size: int = 8192) -> float:
    """FLOP/s of a square bfloat16 product."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    took = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(left, right)
        torch.cuda.synchronize()
        took.append((time.perf_counter() - start) / 4)
    return 2.0 * size**3 / statistics.median(took)


def never_waits(way: Way) -> str:
    """Empty, or where the host waited for the device in forward and backward."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        way.backward()
    except RuntimeError:
        return traceback.format_exc().splitlines()[-3].strip()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        way.optimizer.zero_grad(set_to_none=True)
    return ""


def compare(names: list[str], cases: list[str], rounds: int, profile: Path | None) -> None:
    """Print a line for each way in each case."""
    ways: dict[str, Way] = {}
    for name in names:
        try:
            ways[name] = Way(name)
        except (ImportError, ValueError) as error:
            print(json.dumps({"way": name, "cannot": str(error).splitlines()[0]}), flush=True)
    config = next(way.model.config for way in ways.values() if not way.is_peer)
    for case in cases:
        batch = batch_of(case)
        lengths = batch.packed["cu_seqlens"].diff().numpy()
        flops = batch_flops(config, lengths, MASKED * lengths)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        facts: dict[str, dict[str, Any]] = {name: {} for name in ways}
        for name, way in list(ways.items()):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way.give(batch)
            start = time.perf_counter()
            try:
                way.timed()
                facts[name]["first_step_seconds"] = round(time.perf_counter() - start, 1)
                way.timed()
            except Exception as error:  # of the peer or a compiler: the others go on
                print(json.dumps({"way": name, "case": case, "failed": str(error).splitlines()[:2]}), flush=True)
                traceback.print_exc()
                del ways[name]
                way.optimizer.zero_grad(set_to_none=True)
                continue
            facts[name]["activations_mb"] = (torch.cuda.max_memory_allocated() - before) >> 20
            if not way.is_peer:
                facts[name]["host_waits"] = never_waits(way)
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(way.timed())
        rate = gemm_rate()
        for name in ways:
            median = statistics.median(seconds[name])
            line = {
                "way": name,
                "case": case,
                "milliseconds": round(1e3 * median, 1),
                "tokens_per_second": round(batch.tokens / median),
                "tflops": round(flops / median / 1e12),
                "share_of_gemm_rate": round(flops / median / rate, 3),
                **facts[name],
            }
            print(json.dumps(line), flush=True)
        print(
            json.dumps({"case": case, "gemm_tflops": round(rate / 1e12), "device": torch.cuda.get_device_name()}),
            flush=True,
        )
        if profile is not None:
            profiled(ways, case, profile)


def profiled(ways: dict[str, Way], case: str, file: Path) -> None:
    """Append each way's kernels by time."""
    with file.open("a") as out:
        for name, way in ways.items():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                way.step()
                torch.cuda.synchronize()
            table = profiler.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90
            )
            out.write(f"==== {name}, {case}\n{table}\n")


def agreement() -> None:
    """Print how far loss and gradients of each way are from the float32 eager reference, on real lengths."""
    batch = Batch(document_lengths(1024, 6), 50368, 0)
    found: dict[str, dict[str, torch.Tensor]] = {}
    torch.manual_seed(0)
    for name in ("eager", *WAYS):
        try:
            way = Way("plain" if name == "eager" else name)
            way.give(batch)
            if name == "eager":
                for module in way.model.modules():
                    if hasattr(module, "window_size"):
                        module.config = module.config.model_copy(update={"backend": "eager"})
                loss = way.model(**way.batch).loss
                loss.backward()
            else:
                loss = way.backward()
        except Exception as error:
            print(json.dumps({"way": name, "failed": str(error).splitlines()[:2]}), flush=True)
            continue
        gradients = gradients_of(way)
        found[name] = gradients
        exact = found["eager"]
        differences = [
            float((gradients[key] - exact[key]).norm() / exact[key].norm()) for key in exact if key in gradients
        ]
        line = {
            "way": name,
            "loss": round(float(loss), 5),
            "gradients_off_by_at_most": round(max(differences, default=-1), 4),
        }
        print(json.dumps(line), flush=True)
        del way


def gradients_of(way: Way) -> dict[str, torch.Tensor]:
    """Gradients of our models, by name."""
    return (
        {} if way.is_peer else {name: p.grad.float() for name, p in way.model.named_parameters() if p.grad is not None}
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=count, help="default 5")
    parser.add_argument("--cases", type=names_of(CASES), help="separated by commas; default: all")
    parser.add_argument("--ways", type=names_of(WAYS), help="separated by commas; default: all")
    parser.add_argument("--agreement", action="store_true", help="loss and gradients against float32, instead")
    parser.add_argument("--profile", type=Path, help="append tables of kernels to this file")
    arguments = parser.parse_args()
    if arguments.agreement:
        refuse(parser, arguments, "--agreement", "rounds", "cases", "ways", "profile")
    with_defaults(arguments, rounds=5, cases=list(CASES), ways=list(WAYS))
    if all(name.startswith("peer") for name in arguments.ways):
        parser.error("--ways: one of ours must be among them")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: needs a CUDA device; on the CPU: python -m benchmarks.encoder")
    warnings.filterwarnings("ignore")
    if arguments.agreement:
        agreement()
        return
    compare(arguments.ways, arguments.cases, arguments.rounds, arguments.profile)


if __name__ == "__main__":
    main()
