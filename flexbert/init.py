"""Slot `init`: starting weights, each a function of the seed and the parameter's own name."""

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert.layers import OutputProjection
from flexbert.registry import INITS
from flexbert_core.schema import Component


class Initializer:
    """Draws linear and embedding weights as `draw` says, and sets their biases to 0.

    Other parameters (norm scales, a learned factor) keep what their class sets.
    """

    def __init__(self, config: Component, *, num_hidden_layers: int) -> None:
        self.num_hidden_layers = num_hidden_layers

    def __call__(self, module: nn.Module, seed: int, prefix: str = "") -> None:
        """Fill the linear and embedding weights of `module` in place, skipping what lives on the meta device.

        prefix: path of `module` in the model, so that an encoder alone starts like the encoder inside a model.
        """
        for name, child in _drawn_modules(module, prefix):
            # Drawn on the CPU in float32, so that every device and dtype starts from the same numbers.
            values = torch.empty(child.weight.shape, dtype=torch.float32, device="cpu")
            generator = torch.Generator("cpu").manual_seed(parameter_seed(seed, f"{name}.weight"))
            with torch.no_grad():
                self.draw(values, name, child, generator)
                child.weight.copy_(values)
            if isinstance(child, nn.Linear) and child.bias is not None:
                nn.init.zeros_(child.bias)

    def draw(self, values: Tensor, name: str, module: nn.Module, generator: torch.Generator) -> None:
        """Fill `values`, float32 of the shape of module.weight; `name` is the module's path in the model."""
        raise NotImplementedError


def _drawn_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear | nn.Embedding) and not child.weight.is_meta:
            yield name, child


def parameter_seed(seed: int, name: str) -> int:
    """63-bit seed of one parameter: it does not depend on which other parameters exist."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normal(values: Tensor, std: float, cutoff_factor: float | None, generator: torch.Generator) -> None:
    if cutoff_factor is None:
        values.normal_(0.0, std, generator=generator)
    else:
        truncated_normal_(values, std, cutoff_factor, generator)


def truncated_normal_(values: Tensor, std: float, cutoff_factor: float, generator: torch.Generator) -> None:
    """Fill float32 `values` with a normal distribution of mean 0, cut off at cutoff_factor * std on either side.

    By inverting the distribution function, as torch.nn.init.trunc_normal_ did up to torch 2.7, to the same bits. Newer
    ones draw other numbers, and a seed must mean the same weights with every torch.
    """
    edge = math.erf(cutoff_factor / math.sqrt(2))  # the share of the normal distribution that is kept
    values.uniform_(-edge, edge, generator=generator).erfinv_().mul_(std * math.sqrt(2))
    values.clamp_(-cutoff_factor * std, cutoff_factor * std)


class _SmallConfig(Component):
    small_embedding: bool = Field(
        False, description="token table uniform within +-1e-4, for a norm right behind it (RWKV's SmallInitEmb)"
    )


def _is_token_table(name: str) -> bool:
    return name.endswith("embedding.tokens")


def _is_decoder(name: str) -> bool:
    """Of a masked-token head that is not tied to the token table."""
    return name == "head.output"


@INITS.register("full_megatron")
class FullMegatron(Initializer):
    """Truncated normal; projections into the residual stream are scaled down by sqrt(2 * layers); a decoder of its own
    has 1/sqrt(hidden_size); biases 0.

    Source: Megatron-LM (arXiv 1909.08053, sec. 3); weights as in ModernBERT's pretraining code, where the head's dense
    layer has the plain std. Two things differ there: the bias of its tied decoder, which nothing sets after torch made
    it, starts uniform within 1/sqrt(hidden_size), here at 0; and its fine-tuning classifiers have std
    1/sqrt(hidden_size), here they start like the rest.
    """

    class Config(Component):
        std: float = Field(0.02, gt=0, le=100, description="standard deviation before truncation (ModernBERT: 0.02)")
        cutoff_factor: float = Field(
            2.0, gt=0, le=100, description="truncation, in standard deviations (ModernBERT: 2)"
        )

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        super().__init__(config, num_hidden_layers=num_hidden_layers)
        self.config = config
        self.output_std = config.std / math.sqrt(2 * num_hidden_layers)

    def draw(self, values: Tensor, name: str, module: nn.Module, generator: torch.Generator) -> None:
        std = self.output_std if isinstance(module, OutputProjection) else self.config.std
        if _is_decoder(name):
            std = 1 / math.sqrt(values.shape[1])
        _normal(values, std, self.config.cutoff_factor, generator)


@INITS.register("default")
class Default(Initializer):
    """One normal distribution for everything, not truncated, as transformers starts its BERT."""

    class Config(_SmallConfig):
        std: float = Field(0.02, gt=0, le=100, description="standard deviation (BERT: 0.02)")

    cutoff_factor: float | None = None

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        super().__init__(config, num_hidden_layers=num_hidden_layers)
        self.config = config

    def draw(self, values: Tensor, name: str, module: nn.Module, generator: torch.Generator) -> None:
        if self.config.small_embedding and _is_token_table(name):
            values.uniform_(-1e-4, 1e-4, generator=generator)
        else:
            _normal(values, self.config.std, self.cutoff_factor, generator)


@INITS.register("normal")
class Normal(Default):
    """The same, truncated (BERT's TensorFlow code: 0.02, cut at 2)."""

    class Config(Default.Config):
        cutoff_factor: float = Field(2.0, gt=0, le=100, description="truncation, in standard deviations")

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        super().__init__(config, num_hidden_layers=num_hidden_layers)
        self.cutoff_factor = config.cutoff_factor


@INITS.register("uniform")
class Uniform(Initializer):
    """Uniform within +-limit (NeoBERT: 0.02)."""

    class Config(_SmallConfig):
        limit: float = Field(0.02, gt=0, le=100, description="largest absolute value")

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        super().__init__(config, num_hidden_layers=num_hidden_layers)
        self.config = config

    def draw(self, values: Tensor, name: str, module: nn.Module, generator: torch.Generator) -> None:
        limit = 1e-4 if self.config.small_embedding and _is_token_table(name) else self.config.limit
        values.uniform_(-limit, limit, generator=generator)


@INITS.register("depth_scaled")
class DepthScaled(Initializer):
    """Std 1/sqrt(fan_in), cut at 3 std; output projections of layer l another 1/sqrt(2 (l + 1)) smaller.

    The "Mitchell" init of OLMo (arXiv 2402.00838) and of ModernBERT's pretraining code. An embedding's fan_in is its
    width.
    """

    class Config(_SmallConfig):
        cutoff_factor: float = Field(3.0, gt=0, le=100, description="truncation, in standard deviations")

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        super().__init__(config, num_hidden_layers=num_hidden_layers)
        self.config = config

    def draw(self, values: Tensor, name: str, module: nn.Module, generator: torch.Generator) -> None:
        if self.config.small_embedding and _is_token_table(name):
            values.uniform_(-1e-4, 1e-4, generator=generator)
            return
        std = 1 / math.sqrt(values.shape[1])
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if isinstance(module, OutputProjection) and layer:
            std /= math.sqrt(2 * (int(layer[1]) + 1))
        _normal(values, std, self.config.cutoff_factor, generator)
