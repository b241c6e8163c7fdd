"""How long a run takes on devices that are not here: from its FLOPs, the memory it moves, and rates that were measured.

A step on one device takes, one after the other,

    products    6 x weights FLOPs a token, at a share of the peak that grows with a layer's width
    attention   14 x D x keys FLOPs a token and layer: 4 forward, 10 backward (FlashAttention-2, arXiv 2307.08691)
    memory      bytes of norms, rotations, gates, residuals and the loss, at the memory's rate
    optimizer   bytes a parameter and step
    launches    seconds a microbatch

Rates and bytes were fitted to one H100's step of ModernBERT base, 32 x 1024 tokens in one microbatch, compiled,
flash-attn 2: 103.7 ms by benchmarks.gpu (docs/gpu.md), split into parts on paper. So that case is no test of them; the
same model at 4 x 8192 is: see KNOWN. No model of another size, no second device and no other kind was ever measured.
Ranks are taken to hide what they send behind backward: 600 MB over NVLink is 3 ms of some 100 (base, 8 devices).
"""

from dataclasses import dataclass

from flexbert.accounting import flops_per_token, step_work
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.cost import phase_flops_per_token
from recipe.phases import Phase
from training.microbatches import Microbatches


@dataclass(frozen=True)
class Device:
    """One device. flops: of dense bfloat16 products, 1/s. memory_rate: bytes/s. memory: GB. price: an assumption,
    US dollars an hour, about what clouds asked in 2025; --price-per-hour says yours."""

    flops: float
    memory_rate: float
    memory: int
    price: float


# NVIDIA's data sheets (H100, H200, A100 80GB SXM).
DEVICES = {
    "h100-sxm": Device(989.5e12, 3.35e12, 80, 3.0),
    "h100-pcie": Device(756e12, 2.0e12, 80, 2.5),
    "h200-sxm": Device(989.5e12, 4.8e12, 141, 3.5),
    "a100-sxm-80": Device(312e12, 2.039e12, 80, 1.5),
}

# Shares of the peak, and of the memory's rate, on an H100. Of products of width w: _WIDEST w / (w + _HALF), Hockney's
# law of a rate half reached at _HALF, through 763 TFLOP/s, measured at 8192, and 520 at 768, which fits the step.
_HALF = 416.0
_WIDEST = 802e12 / 989.5e12
_GLOBAL = 290e12 / 989.5e12  # 2.9 TFLOP in 10 ms
_WINDOWS = 224e12 / 989.5e12  # 1.9 TFLOP in 8.5 ms
_MEMORY = 2.75e12 / 3.35e12  # 77 GB in 28 ms: 9 of the loss, the rest of blocks
_TILE = 128  # keys of a tile: a window is computed by whole ones, one more than it fills
_BYTES_OF_ENDS = 9.8  # a token moves so many for each input and output of a linear layer: 68 GB of 32,768 x 211,200
_BYTES_OF_LOGITS = 18.2  # a masked token for each entry of the vocabulary: 9 GB of 9,830 x 50,368
_BYTES_OF_OPTIMIZER = 28  # a parameter: 4.2 GB of 149.7M
_LAUNCHES = 9e-3  # of which the host does 5 to 9 ms of work; with these the sum is what was measured
_UNCOMPILED = 1.47  # benchmarks.gpu: 315,969 over 215,009 tokens/s

KNOWN = (
    "measured on one H100, base: 315,969 tokens/s at 1024 (rates are fitted to it) and 198,715 at 8192 (predicted "
    "there: 4 % less); several GPUs and other sizes were never measured. Ettin's own code took 1.9, 1.8 and 1.2 times "
    "the hours that are predicted here for 17m, 32m and 68m: a small model waits for its host, which is left out"
)


@dataclass(frozen=True)
class Target:
    """So many devices of a kind. efficiency: model FLOPs as a share of the peak (MFU), in place of the rates here."""

    name: str
    gpus: int
    efficiency: float | None = None

    @property
    def device(self) -> Device:
        """Raises ConfigError for one that is not in the table."""
        if self.name not in DEVICES:
            raise ConfigError(f"--device: unknown device {self.name!r}, {did_you_mean(self.name, DEVICES)}")
        return DEVICES[self.name]

    @property
    def price(self) -> float:
        """Of all, an hour."""
        return self.gpus * self.device.price

    def tokens_per_second(self, config: RunConfig, phase: Phase) -> float:
        """Of all together, in a phase. Raises ConfigError for a run that is not what the rates are of."""
        if config.trainer.precision == "fp32":
            raise ConfigError("--device: predicts bfloat16, trainer.precision is fp32: set amp_bf16 or auto")
        if phase.global_batch_size % self.gpus:
            raise ConfigError(
                f"--gpus: batches of {phase.global_batch_size} rows cannot be divided among {self.gpus}: change one of "
                "them"
            )
        if self.efficiency is not None:
            flops = phase_flops_per_token(config, phase)
            return self.efficiency * self.device.flops * self.gpus / flops
        rows = phase.global_batch_size // self.gpus
        microbatches = -(-rows // Microbatches(config.trainer).rows(phase.max_seq_len, rows))
        step = rows * phase.max_seq_len
        return self.gpus * step / step_seconds(config, phase, self.device, step, microbatches)

    def describe(self) -> str:
        """What the figures rest on, in a line."""
        memory = f"{self.gpus} x {self.name} of {self.device.memory} GB, {self.price:,.2f} dollars an hour unless told"
        if self.efficiency is not None:
            return f"{memory}; speed from the FLOPs at {self.efficiency:.1%} of the peak, as told"
        return f"{memory}; predicted: {KNOWN}"


def _share_of_products(width: int) -> float:
    """Of the peak. width: the smaller of a linear layer's inputs and outputs: K of one product, N of another."""
    return _WIDEST * width / (width + _HALF)


def step_seconds(config: RunConfig, phase: Phase, device: Device, tokens: int, microbatches: int) -> float:
    """Of one device's step."""
    work = step_work(config.model, phase.masking.mean_rate)
    again = 1 + 1 / 3 / config.trainer.activation_checkpointing if config.trainer.activation_checkpointing else 1.0
    memory_rate = _MEMORY * device.memory_rate
    seconds = sum(6 * weights / (_share_of_products(width) * device.flops) for width, weights in work.widths.items())
    for window, layers in work.windows.items():
        keys, share = float(phase.max_seq_len), _GLOBAL
        if window[0] >= 0:
            seen = (sum(window) + 1 + _TILE - 1) // _TILE + 1
            keys, share = min(keys, float(seen * _TILE)), _WINDOWS
        keys /= 1 + phase.is_causal  # tiles behind the queries are left out
        seconds += layers * 14 * config.model.hidden_size * keys / (share * device.flops)
    logits = phase.masking.rate * config.model.vocab_size
    seconds += (_BYTES_OF_ENDS * work.ends + _BYTES_OF_LOGITS * logits) / memory_rate
    slower = 1.0 if config.trainer.compile else _UNCOMPILED
    fixed = _BYTES_OF_OPTIMIZER * work.parameters / memory_rate
    # What an objective does besides takes as long as its share of the FLOPs.
    alone = flops_per_token(config.model, phase.max_seq_len, phase.masking.mean_rate, phase.is_causal)
    seconds *= phase_flops_per_token(config, phase) / alone
    return slower * (tokens * seconds * again + _LAUNCHES * microbatches) + fixed
