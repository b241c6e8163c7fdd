"""Slot `position`: how a token's place enters the model.   T packed tokens, N heads, H head dim, D hidden."""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert.config import FlexBertConfig, ModelComponent
from flexbert.registry import POSITIONS
from flexbert.rotary import RotaryAngles, RotaryConfig, Rotation
from flexbert_core.schema import Component


class Positions(NamedTuple):
    """What a forward's attention layers need to know about positions; None: nothing."""

    global_layers: Rotation | None = None
    local_layers: Rotation | None = None
    alibi_slopes: Tensor | None = None  # (N,) float32


class Position(nn.Module):
    """Base of the entries: does nothing at either place where positions can enter.

    Position ids restart at 0 in each sequence.
    """

    def embed(self, position_ids: Tensor, max_seqlen: int) -> Tensor | None:
        """(T, D) to add to the token embeddings, before their norm, from position ids (T,) int64; None: nothing."""
        return None

    def for_attention(self, position_ids: Tensor, max_seqlen: int) -> Positions:
        """What the attention layers use, computed once per forward."""
        return Positions()


@POSITIONS.register("none")
class NoPosition(Position):
    """No positions: a bag of tokens, but for what windows tell."""

    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()


@POSITIONS.register("rope")
class RotaryPosition(Position):
    """Rotary embedding of queries and keys, with a theta for global and one for local layers: see rotary.py."""

    Config = RotaryConfig

    def __init__(self, config: RotaryConfig, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.config = config
        self._angles = RotaryAngles(model.head_dim)

    def set_theta(self, config: RotaryConfig) -> None:
        """Use other thetas from the next forward on."""
        self.config = config
        self._angles.clear()

    def for_attention(self, position_ids: Tensor, max_seqlen: int) -> Positions:
        config = self.config
        global_layers = self._angles(config, config.global_theta, position_ids, max_seqlen)
        if config.local_theta == config.global_theta:
            return Positions(global_layers, global_layers)
        return Positions(global_layers, self._angles(config, config.local_theta, position_ids, max_seqlen))


@POSITIONS.register("alibi")
class Alibi(Position):
    """Attention scores less slope * distance, alike in both directions (ALiBi, arXiv 2108.12409; MosaicBERT).

    Slopes: 2^(-8k/N), k = 1..N, for N a power of two; else those for the power below, then every second of those for
    the power above. No sequence is too long.
    """

    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.slopes = alibi_slopes(model.num_attention_heads)
        self._tensors: dict[torch.device, Tensor] = {}

    def for_attention(self, position_ids: Tensor, max_seqlen: int) -> Positions:
        device = position_ids.device
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.slopes, dtype=torch.float32, device=device)
        return Positions(alibi_slopes=self._tensors[device])


def alibi_slopes(num_heads: int) -> list[float]:
    """One for each head, as in the paper's code."""
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    between = [2.0 ** (-4.0 * k / power) for k in range(1, 2 * power + 1)]
    return slopes + between[0::2][: num_heads - power]


@POSITIONS.register("learned")
class LearnedPosition(Position):
    """A table of positions, added to the token embeddings (BERT, arXiv 1810.04805)."""

    class Config(Component):
        offset: int = Field(
            0,
            ge=0,
            le=2**24,
            description="unused rows before position 0 (RoBERTa: 2; its table has max_position_embeddings + 2)",
        )

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.offset, self.limit = config.offset, model.max_position_embeddings
        self.table = nn.Embedding(self.limit + config.offset, model.hidden_size)

    def embed(self, position_ids: Tensor, max_seqlen: int) -> Tensor:
        """Raises ValueError for a sequence longer than the table."""
        if max_seqlen > self.limit:
            raise ValueError(
                f"a sequence of {max_seqlen} tokens is longer than the {self.limit} learned positions: "
                "cut it, or build the model with a larger max_position_embeddings"
            )
        return self.table(position_ids + self.offset if self.offset else position_ids)


@POSITIONS.register("sinusoidal")
class SinusoidalPosition(Position):
    """scale * (sin on even, cos on odd channels of position * theta^(-2i/D)), added to the token embeddings.

    Source: arXiv 1706.03762, sec. 3.5; with a learned scale that starts at 1/sqrt(D): CrammingBERT, arXiv 2212.14034.
    """

    class Config(ModelComponent):
        theta: float = Field(10000.0, ge=1, le=1e15, description="base of the wavelengths")
        learned_scale: bool = Field(False, description="learn one factor for the whole table (CrammingBERT), else 1")

        def check(self, model: FlexBertConfig) -> None:
            if model.hidden_size % 2:
                raise ValueError(f"hidden_size: {model.hidden_size} is odd, and position sinusoidal needs pairs")

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.theta, self.hidden_size = config.theta, model.hidden_size
        self.scale = nn.Parameter(torch.full((1,), model.hidden_size**-0.5)) if config.learned_scale else None
        self._tables: dict[torch.device, Tensor] = {}

    def embed(self, position_ids: Tensor, max_seqlen: int) -> Tensor:
        """In float32."""
        table = self._tables.get(position_ids.device)
        if table is None or len(table) < max_seqlen:
            table = self._make_table(max(max_seqlen, 512), position_ids.device)
            self._tables[position_ids.device] = table
        rows = table.index_select(0, position_ids)
        return rows if self.scale is None else rows * self.scale

    @torch.no_grad()
    def _make_table(self, positions: int, device: torch.device) -> Tensor:
        exponents = torch.arange(0, self.hidden_size, 2, device=device, dtype=torch.float32) / self.hidden_size
        angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] / self.theta**exponents
        return torch.stack((angles.sin(), angles.cos()), 2).flatten(1)
