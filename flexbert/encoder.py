"""The encoder: embedding, blocks, final norm.   B batch, S seq, T packed tokens, D hidden."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexbert.config import FlexBertConfig
from flexbert.dropout import dropout_of, with_same_masks
from flexbert.kernels import AttentionPlan
from flexbert.layers import build_norm
from flexbert.packed import check_packed, check_wanted, pad, round_up, unpad
from flexbert.positions import RotaryPosition
from flexbert.registry import ATTENTIONS, BLOCKS, EMBEDDINGS, POSITIONS
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)


def require_causal(config: FlexBertConfig) -> None:
    """Raise ConfigError for a model with a layer whose attention cannot be causal: one from outside that does not say
    `causal = True`, which promises that it looks at `plan.causal`."""
    for layer in map(config.layer, range(config.num_hidden_layers)):
        if not getattr(ATTENTIONS.entries[layer.attention.name], "causal", False):
            raise ConfigError(
                f"model.attention: {layer.attention.name!r} does not say that it can be causal: use multihead, or look "
                "at plan.causal in it and give it `causal = True`"
            )


class FlexBertEncoder(nn.Module):
    """Packed token ids in, hidden states out. No token sees another sequence."""

    def __init__(self, config: FlexBertConfig) -> None:
        super().__init__()
        self.config = config
        self.position = POSITIONS.build(config.position, model=config)
        self.embedding = EMBEDDINGS.build(config.embedding, model=config)
        if not hasattr(getattr(self.embedding, "tokens", None), "weight"):
            raise ConfigError(
                f"embedding: {config.embedding.name} has no module `tokens` with a weight (V, D), to which heads tie "
                "their decoder: see docs/extending/embedding.md"
            )
        self.layers = nn.ModuleList(
            BLOCKS.build(model.block, model=model, layer_index=index)
            for index, model in enumerate(map(config.layer, range(config.num_hidden_layers)))
        )
        needs_norm = self.layers[-1].needs_final_norm
        self.final_norm = build_norm(config.norm, config.hidden_size) if needs_norm else nn.Identity()
        self.recompute_every = 0
        """Every n-th block keeps its input only, and runs again in backward (arXiv 1604.06174); 0: none does."""
        self._compiled = False
        self.last_selects: bool = getattr(self.layers[-1], "selects_tokens", False)

    @property
    def token_table(self) -> Tensor:
        """(V, D) token embeddings, to which a head may tie its decoder."""
        return self.embedding.tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        wanted: Tensor | None = None,
        causal: bool = False,
        kept: dict[int, Tensor | None] | None = None,
    ) -> Tensor:
        """Hidden states (T, D) of a packed batch, or (M, D) of the tokens `wanted`.

        input_ids: (T,) int64. cu_seqlens: (num_seqs + 1,) int32, starts of the sequences, then T; empty sequences and
        T = 0 are fine. max_seqlen: tokens of the longest sequence, or more. token_type_ids: (T,) int64; None: all 0.
        wanted: (M,) int64, rising: the last block then leaves out what only other tokens need (0.94 of a training step
        in float32 and 0.98 in bfloat16, 4 x 1024 tokens with 30 % masked). None: all tokens. causal: whether tokens see
        only what stands before them; see `require_causal`. kept: numbers of blocks, from 0; their outputs, (T, D) and
        without the final norm, are filled in.
        Raises ValueError for other shapes and dtypes, for sequences longer than a table of positions and, on the CPU,
        for bounds that do not fit and tokens wanted twice or out of order.
        """
        check_packed(input_ids, cu_seqlens, max_seqlen)
        if wanted is not None:
            check_wanted(wanted, len(input_ids))
        plan = AttentionPlan(cu_seqlens, max_seqlen, len(input_ids), causal)
        if self._compiled:
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)  # the number of documents differs in every batch
        added = self.position.embed(plan.position_ids, max_seqlen)
        hidden_states = self.embedding(input_ids, added, token_type_ids)
        positions = self.position.for_attention(plan.position_ids, max_seqlen)
        for index in range(len(self.layers) - 1):
            hidden_states = self._block(index, hidden_states, plan, positions)
            if kept is not None and index in kept:
                kept[index] = hidden_states
        last = len(self.layers) - 1
        if kept is not None and last in kept:
            kept[last] = hidden_states = self._block(last, hidden_states, plan, positions)
            hidden_states = hidden_states if wanted is None else hidden_states.index_select(0, wanted)
        elif wanted is None:
            hidden_states = self._block(last, hidden_states, plan, positions)
        elif len(wanted) and self.last_selects:
            computed = round_up(wanted, len(input_ids)) if self._compiled else wanted
            with dropout_of(computed):
                hidden_states = self._block(last, hidden_states, plan, positions, computed)
            if computed is not wanted:
                hidden_states = hidden_states.index_select(0, torch.searchsorted(computed, wanted))
        else:
            hidden_states = self._block(last, hidden_states, plan, positions).index_select(0, wanted)
        return self.final_norm(hidden_states)

    def _block(self, index: int, *inputs: Any) -> Tensor:
        layer: Callable[..., Tensor] = self.layers[index]
        if self.recompute_every and index % self.recompute_every == 0 and torch.is_grad_enabled():
            again: Any = checkpoint(with_same_masks(layer), *inputs, use_reentrant=False)
            return again
        return layer(*inputs)

    def encode(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Hidden states (B, S, D) of a padded batch (B, S), zero where attention_mask (bool or 0/1) is false.

        Raises ValueError for a mask or token types of another shape, or a row longer than a table of positions.
        """
        packed = unpad(input_ids, attention_mask)
        if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
            raise ValueError(f"expected token_type_ids {tuple(input_ids.shape)}, got {tuple(token_type_ids.shape)}")
        types = None if token_type_ids is None else token_type_ids.flatten().index_select(0, packed.slots)
        hidden_states = self(packed.input_ids, packed.cu_seqlens, packed.max_seqlen, types)
        return pad(hidden_states, packed.slots, *input_ids.shape)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block by itself with torch.compile, for batches of few different T: each T compiles anew (on two
        CPU cores half a minute). Attention stays the kernel it is; with torch_flash a block is one graph, with
        others it is two around the kernel. Names of parameters do not change. options: more for torch.compile."""
        torch._dynamo.config.cache_size_limit = 64  # kinds of blocks times lengths; 8 by default
        self._compiled = True
        for layer in self.layers:
            layer.compile(dynamic=False, **options)

    def set_rope_theta(self, global_theta: float | None = None, local_theta: float | None = None) -> None:
        """Change the base of the rotary angles from the next forward on, here and in `config`; None: as it is.

        Raises ConfigError when the model has no rotary positions, or for a theta out of its range.
        """
        given = {"global_theta": global_theta, "local_theta": local_theta}
        changes = {name: theta for name, theta in given.items() if theta is not None}
        if not changes:
            return
        if not isinstance(self.position, RotaryPosition):
            raise ConfigError(f"position: {self.config.position.name} has no theta to set: use rope")
        if local_theta not in (None, self.config.position.local_theta) and not self.config.has_local_layers:
            log.warning("local_theta: %g is read by no layer: all of this model's are global", local_theta)
        node = self.config.to_dict()
        self.config = FlexBertConfig.from_dict({**node, "position": {**node["position"], **changes}})
        self.position.set_theta(self.config.position)
