"""Section `speed`: training of ModernBERT base by turns, ours and transformers', as shares of the rate of a square
product; memory; the kernels of a step.

bfloat16 autocast over float32 weights, 32,768 tokens a step, 30 % masked; a step is forward, backward and torch's fused
AdamW. Rows of 1024, of 8192, and documents of real lengths packed end to end (the peer's padded).
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.encoder_sides import MASKED, Batch, document_lengths
from benchmarks.gpu_check.attention import KERNELS
from benchmarks.gpu_check.machine import gemm_rate
from benchmarks.gpu_check.place import Line, Place, failed, skipped, told
from flexbert import FlexBertConfig, build
from flexbert.accounting import batch_flops
from flexbert.config import load_preset
from flexbert.kernels import require_backend
from training.compiling import compile_blocks

# What matters most comes first: the time may end.
OURS = ("compiled", "plain", *(f"compiled, {kernel}" for kernel in KERNELS))
WAYS = (*OURS[:2], "peer, sdpa, compiled", "peer, flash, compiled", *OURS[2:], "peer, sdpa", "peer, flash")
_WARM_SECONDS = 40  # a way's compilation: with less time left it is not begun
KERNELS_SHOWN = 25
VOCABULARY = 50368


def cases(place: Place) -> dict[str, list[int]]:
    """Lengths of documents."""
    if place.small:
        return {"4 x 32": [32] * 4, "real lengths to 32": _real(32, 128)}
    return {"32 x 1024": [1024] * 32, "4 x 8192": [8192] * 4, "real lengths to 1024": _real(1024, 32_768)}


def _real(longest: int, tokens: int) -> list[int]:
    lengths: list[int] = []
    for each in document_lengths(longest, 400):
        lengths.append(min(each, tokens - sum(lengths)))
        if sum(lengths) == tokens:
            return lengths
    raise ValueError("the documents are too few")


def configuration(place: Place) -> FlexBertConfig:
    """Of our model."""
    preset = "modernbert-tiny" if place.small else "modernbert-base"
    changes = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 96, "num_hidden_layers": 3}
    changes["vocab_size"] = VOCABULARY
    return FlexBertConfig.from_dict({**load_preset(preset), **(changes if place.small else {})})


class Way:
    """A model with its optimizer on the device. Raises ConfigError or ImportError for one that cannot run here."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name, self.is_peer = place, name, name.startswith("peer")
        words = name.split(", ")
        if self.is_peer:
            self.model = _peer(place, "sdpa" if words[1] == "sdpa" else "flash_attention_2")
        else:
            backend = words[-1] if words[-1] in KERNELS else "auto"
            if backend != "auto":
                require_backend(backend, place.device, torch.bfloat16, head_dim=64)  # pyright: ignore
            self.model = build(configuration(place), seed=0)
            for module in self.model.modules():
                if hasattr(module, "window_size"):
                    module.config = module.config.model_copy(update={"backend": backend})  # pyright: ignore
        self.model: Any = self.model.to(place.device).train()
        if "compiled" in words and not place.small:
            if self.is_peer:
                self.model.compile()
            else:
                compile_blocks(self.model, 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.batch: dict[str, Any] = {}

    def give(self, batch: Batch) -> None:
        """Put the batch on the device."""
        inputs: dict[str, Any] = batch.padded
        if not self.is_peer:
            inputs = {**batch.packed, "labels": batch.labels, "num_masked": int((batch.labels != -100).sum())}
        self.batch = {key: x.to(self.place.device) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}

    def step(self) -> torch.Tensor:
        """Forward, backward, update. The loss, on the device."""
        with torch.autocast(self.place.device, torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _peer(place: Place, attention: str) -> Any:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    if attention != "sdpa":
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        del flash_attn_varlen_func
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
    }
    torch.manual_seed(0)
    options: dict[str, Any] = {"attn_implementation": attention, "sparse_prediction": attention == "sdpa"}
    return ModernBertForMaskedLM(ModernBertConfig(**options, **(sizes if place.small else {})))


def check(place: Place) -> Iterator[Line]:
    rate = gemm_rate(place)
    batches = {case: Batch(lengths, VOCABULARY, 0) for case, lengths in cases(place).items()}
    first_case = next(iter(batches))
    ours: dict[str, Way] = {}
    for name in WAYS[:2]:
        yield from _begun(place, name, batches[first_case], ours)
    for case, batch in batches.items():
        yield from _by_turns(place, case, batch, ours, rate, list(ours))
    if "compiled" not in ours:
        return
    yield from _kernels(place, ours["compiled"], batches[first_case])
    ours.pop("plain", None)
    for name in WAYS[2:]:
        if place.left < (5 if place.small else _WARM_SECONDS + 20):
            yield skipped(f"speed: {name}", "no time left")
            continue
        both = dict(ours)
        yield from _begun(place, name, batches[first_case], both)
        if name in both:
            for case, batch in batches.items():
                yield from _by_turns(place, case, batch, both, rate, [name])
        del both


def _begun(place: Place, name: str, batch: Batch, ways: dict[str, Way]) -> Iterator[Line]:
    """Make a way, run its first steps, and put it among the others."""
    try:
        way = Way(place, name)
        way.give(batch)
        start = time.perf_counter()
        loss = float(way.step())
        first = time.perf_counter() - start
        peak = place.peak_megabytes(way.step)
    except Exception as error:
        # What transformers or its kernels cannot do here is no fault of this project.
        missing = isinstance(error, ImportError) or name.startswith("peer") or "cannot run" in str(error)
        line = failed(f"speed: {name}", error)
        yield skipped(line["check"], line["error"]) if missing else line
        return
    ways[name] = way
    good = None if way.is_peer else loss == loss and abs(loss) < 100
    yield told(f"speed: {name} begins", good, loss=round(loss, 3), first_seconds=round(first, 1), step_mb=peak)


def _by_turns(
    place: Place, case: str, batch: Batch, ways: dict[str, Way], rate: float, shown: list[str]
) -> Iterator[Line]:
    """Time the ways in a case, by turns. shown: those that get a line; and how `compiled` compares with the others."""
    lengths = batch.packed["cu_seqlens"].diff().numpy()
    flops = batch_flops(configuration(place), lengths, MASKED * lengths)
    seconds: dict[str, list[float]] = {}
    for name, way in ways.items():
        try:
            way.give(batch)
            for _ in range(2):
                way.step()
            seconds[name] = []
        except Exception as error:
            line = failed(f"speed: {name}, {case}", error)
            yield skipped(line["check"], line["error"]) if way.is_peer else line
    compiled = graphs()
    for _ in range(5):
        for name, took in seconds.items():
            if took and place.left < 10:
                break
            took.append(place.seconds(ways[name].step, repeats=1, inner=3))
    for name in shown:
        if name not in seconds:
            continue
        median = statistics.median(seconds[name])
        yield told(
            f"speed: {name}, {case}",
            milliseconds=round(1e3 * median, 2),
            tokens_per_second=round(batch.tokens / median),
            share_of_square_product=round(flops / median / rate, 3),
            rounds=len(seconds[name]),
        )
    if graphs() != compiled:
        yield told(f"speed: {case}: nothing is compiled after two steps", False, graphs=graphs() - compiled)
    for slower in seconds:
        if "compiled" in seconds and slower != "compiled":
            ratio = statistics.median(seconds[slower]) / statistics.median(seconds["compiled"])
            judged = place.on_gpu and (slower == "plain" or slower.startswith("peer"))
            good = ratio > 1 if judged else None
            yield told(f"speed: {case}: compiled is faster than {slower}", good, ratio=round(ratio, 3))


def graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _kernels(place: Place, way: Way, batch: Batch) -> Iterator[Line]:
    """By time, and how much of the step they fill."""
    from torch.profiler import ProfilerActivity, profile

    way.give(batch)
    way.step()
    activity = ProfilerActivity.CUDA if place.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        way.step()
        place.settle()
    key = "self_device_time_total" if place.on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in events)
    table = [
        {"kernel": event.key[:120], "calls": event.count, "milliseconds": round(getattr(event, key) / 1e3, 3)}
        for event in events[:KERNELS_SHOWN]
    ]
    busy = round(total / 1e3, 2)
    yield told("speed: kernels of a compiled step", busy_milliseconds=busy, launches=sum(e.count for e in events))
    for place_in_table, row in enumerate(table, 1):
        yield told(f"speed: kernel {place_in_table}", **row)
