"""A FlexBERT encoder for transformers. Needs torch and transformers, not FlexBERT.

Exports of architectures that transformers has no class for carry this file and activations.py beside their weights and
load with `trust_remote_code=True`. It computes on padded batches what FlexBERT computes on packed ones, from the same
config (field `flexbert` of config.json) and with the same names of weights. What it cannot do it refuses.
Licence: Apache-2.0.

B batch, S slots, N heads, K key-value heads, H head dim, D hidden, V vocabulary, C labels.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, modeling_outputs
from transformers.modeling_layers import GradientCheckpointingLayer

from flexbert.activations import FUNCTIONS  # in an export: from .activations

# What this file can build: slot -> names, all that FlexBERT has. Parts from outside need modeling_with_parts.py.
SUPPORTED = {
    "embedding": {"tokens"},
    "position": {"none", "rope", "alibi", "learned", "sinusoidal"},
    "attention": {"multihead"},
    "norm": {"layernorm", "rmsnorm"},
    "mlp": {"glu", "mlp"},
    "block": {"prenorm", "postnorm", "parallel", "sandwich"},
    "head": {"mlm"},
}
Given = Tensor | None
Flag = bool | None
# Fields of `flexbert` that are fields of transformers' configs too.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES += ("max_position_embeddings",)
# FlexBERT's default heads, for configs that have none for the task; dropout is 0.1.
TASK_HEADS: dict[str, Any] = {"tokens": {}}
TASK_HEADS["classification"] = {"pooling": "cls", "dense_bias": True, "activation": "tanh", "norm": False}


class FlexBertConfig(PretrainedConfig):
    """`flexbert`: the architecture, as FlexBERT's YAML says it with every default spelt out.

    It is the one place of truth: the SIZES and `tie_word_embeddings` of this config are read from it and written to it.
    Raises ValueError for one of them that is also given and differs.
    """

    model_type = "flexbert"

    def __init__(self, flexbert: dict[str, Any] | None = None, initializer_range: float = 0.02, **kwargs: Any) -> None:
        self.flexbert = copy.deepcopy(flexbert or {})
        self.initializer_range = initializer_range
        for name, size in sizes_of(self.flexbert).items():
            if kwargs.setdefault(name, size) != size:
                raise ValueError(f"{name}: {kwargs[name]!r}, but flexbert says {size!r}: they must agree")
        kwargs.setdefault("tie_word_embeddings", False)  # transformers 4 would say True
        if kwargs.get("id2label") is None and "num_labels" in self.flexbert.get("head", {}):
            kwargs.setdefault("num_labels", self.flexbert["head"]["num_labels"])
        super().__init__(**kwargs)

    def _tie(self, value: bool) -> None:
        if "tied" in self.flexbert.get("head", {}):  # heads of other tasks have nothing to tie
            self.flexbert["head"]["tied"] = value

    tie_word_embeddings = property(lambda self: self.flexbert.get("head", {}).get("tied", False), _tie)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **{name: getattr(self, name) for name in (*SIZES, "tie_word_embeddings")}}


def sizes_of(flexbert: dict[str, Any]) -> dict[str, Any]:
    """What of the architecture is a field of transformers' configs too."""
    sizes = {name: flexbert[name] for name in SIZES if name in flexbert}
    head = flexbert.get("head")
    return sizes | ({"tie_word_embeddings": head["tied"]} if isinstance(head, dict) and "tied" in head else {})


def _size(name: str) -> property:
    return property(
        lambda config: config.flexbert.get(name), lambda config, value: config.flexbert.update({name: value})
    )


for _name in SIZES:
    setattr(FlexBertConfig, _name, _size(_name))


def _activation(name: str) -> Any:
    return FUNCTIONS[name]() if isinstance(FUNCTIONS[name], type) else FUNCTIONS[name]


class RMSNorm(nn.Module):
    """Inside in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight.float()).to(states.dtype)


def _norm(config: dict[str, Any] | None, size: int) -> nn.Module:
    if config is None:
        return nn.Identity()
    if config["name"] == "rmsnorm":
        return RMSNorm(size, config["eps"])
    return nn.LayerNorm(size, eps=config["eps"], bias=config["bias"])


class Position(nn.Module):
    """Learned or computed positions, at whichever place the config puts them."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.limit = model["position"], model["max_position_embeddings"]
        self.hidden_size, self.heads = model["hidden_size"], model["num_attention_heads"]
        if self.config["name"] == "learned":
            self.table = nn.Embedding(self.limit + self.config["offset"], self.hidden_size)
        if self.config["name"] == "sinusoidal" and self.config["learned_scale"]:
            self.scale = nn.Parameter(torch.full((1,), self.hidden_size**-0.5))

    def embed(self, places: Tensor) -> Tensor | None:
        """(B, S, D) to add to the embeddings at these places (B, S)."""
        if self.config["name"] == "learned":
            if _can_look() and places.numel() and not 0 <= int(places.min()) <= int(places.max()) < self.limit:
                raise ValueError(f"a sequence is longer than the {self.limit} learned positions: cut it")
            return self.table(places + self.config["offset"])
        if self.config["name"] == "sinusoidal":
            exponents = torch.arange(0, self.hidden_size, 2, device=places.device, dtype=torch.float32)
            angles = places[..., None].float() / self.config["theta"] ** (exponents / self.hidden_size)
            table = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)
            return table * self.scale if self.config["learned_scale"] else table
        return None

    def rotation(self, places: Tensor, local: bool) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the angles, (B, S, 1, R / 2) each."""
        if self.config["name"] != "rope":
            return None
        dim = round(self.hidden_size // self.heads * self.config["rotary_fraction"])
        exponents = torch.arange(0, dim, 2, device=places.device, dtype=torch.float32) / dim
        theta, factor = self.config["local_theta" if local else "global_theta"], self.config["scaling_factor"]
        ntk = self.config["scaling"] == "ntk"
        frequencies = (theta * factor) ** -exponents / factor ** (2 / dim) if ntk else theta**-exponents / factor
        angles = places[..., None, None].float() * frequencies
        return angles.cos(), angles.sin()

    def rotate(self, states: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Turn queries or keys (B, S, N, H), in float32."""
        if rotation is None:
            return states
        (cos, sin), dim, pairs = rotation, 2 * rotation[0].shape[-1], self.config["layout"] == "interleaved"
        turning, rest = states[..., :dim].float(), states[..., dim:]
        first, second = (turning[..., 0::2], turning[..., 1::2]) if pairs else turning.chunk(2, -1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)
        return torch.cat((joined.to(states.dtype), rest), -1)

    def bias(self, places: Tensor, real: Tensor | None, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(B or 1, N or 1, S, S) to add to attention scores; None: nothing. window: tokens seen to either side, None:
        all. real (B, S): which tokens are; None: all."""
        is_alibi = self.config["name"] == "alibi"
        if real is None and window is None and not is_alibi:
            return None
        distance = (places[:, None, :] - places[:, :, None]).abs()[:, None]
        visible = torch.ones_like(distance, dtype=torch.bool) if real is None else real[:, None, None, :]
        if window is not None:
            visible = visible & (distance <= window)
        slopes = _alibi_slopes(self.heads, places.device) if is_alibi else torch.zeros(1, device=places.device)
        bias = -slopes[:, None, None] * distance
        return torch.where(visible, bias, torch.finfo(dtype).min).to(dtype)


def _alibi_slopes(heads: int, device: torch.device) -> Tensor:
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2 ** (-4 * (head + 1) / power) for head in range(0, 2 * power, 2)][: heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


class Embedding(nn.Module):
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        config = model["embedding"]
        self.scale = math.sqrt(model["hidden_size"]) if config["scaled"] else 1.0
        self.tokens = nn.Embedding(model["vocab_size"], model["hidden_size"])
        self.types = nn.Embedding(config["token_types"], model["hidden_size"]) if config["token_types"] else None
        self.norm = _norm(model["norm"] if config["norm"] else None, model["hidden_size"])
        self.dropout = nn.Dropout(config["dropout"])

    def forward(self, states: Tensor, added: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        """states (B, S, D): the tokens' rows. added: of the positions. token_type_ids (B, S); None: all 0."""
        states = states * self.scale
        if added is not None:
            states = states + added.to(states.dtype)
        if self.types is not None:
            zeros = torch.zeros_like(states[..., 0], dtype=torch.int64)
            states = states + self.types(zeros if token_type_ids is None else token_type_ids)
        elif token_type_ids is not None and _can_look() and bool(token_type_ids.any()):
            raise ValueError("token_type_ids: this model has none: tokenize with return_token_type_ids=False")
        return self.dropout(self.norm(states))


class Attention(nn.Module):
    def __init__(self, model: dict[str, Any], layer: int) -> None:
        super().__init__()
        config, size, heads = model["attention"], model["hidden_size"], model["num_attention_heads"]
        self.config, self.head_dim = config, size // heads
        shared = config["num_key_value_heads"] or heads
        self.heads = (heads, shared, shared)
        self.is_local = layer % config["global_attn_every_n_layers"] != 0
        self.window = config["window_per_side"] if self.is_local else None
        widths = [number * self.head_dim for number in self.heads]
        if config["fused"]:
            self.Wqkv = nn.Linear(size, sum(widths), bias=config["qkv_bias"])
        else:
            self.Wq, self.Wk, self.Wv = (nn.Linear(size, width, bias=config["qkv_bias"]) for width in widths)
        self.q_norm, self.k_norm = _norm(config["qk_norm"], self.head_dim), _norm(config["qk_norm"], self.head_dim)
        self.inner_norm = _norm(config["inner_norm"], size)
        self.Wo = nn.Linear(size, size, bias=config["out_bias"])
        self.probs_dropout, self.out_dropout = nn.Dropout(config["probs_dropout"]), nn.Dropout(config["out_dropout"])

    def forward(
        self, states: Tensor, position: Position, rotation: Any, bias: Tensor | None, eager: bool
    ) -> tuple[Tensor, Tensor | None]:
        """New states and, if eager, the attention weights (B, N, S, S)."""
        if self.config["fused"]:
            parts = self.Wqkv(states).split([number * self.head_dim for number in self.heads], -1)
        else:
            parts = self.Wq(states), self.Wk(states), self.Wv(states)
        parts = [part.unflatten(-1, (-1, self.head_dim)) for part in parts]
        queries = position.rotate(self.q_norm(parts[0]), rotation).transpose(1, 2)
        keys = position.rotate(self.k_norm(parts[1]), rotation)
        groups = self.heads[0] // self.heads[1]
        keys, values = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (keys, parts[2]))
        if eager:
            scores = (queries * self.head_dim**-0.5 @ keys.transpose(-1, -2)).float()
            # The bias is added in float32: the lowest number of a half and a bit less would be infinite.
            scores = scores if bias is None else scores + bias
            probs = self.probs_dropout(scores.softmax(-1).to(values.dtype))
            attended = probs @ values
        else:
            probs, dropout = None, self.probs_dropout.p if self.training else 0.0
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, dropout_p=dropout)
        return self.out_dropout(self.Wo(self.inner_norm(attended.transpose(1, 2).flatten(2)))), probs


class FeedForward(nn.Module):
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        config, size, width = model["mlp"], model["hidden_size"], model["intermediate_size"]
        self.config, self.activation, self.gated = config, _activation(config["activation"]), config["name"] == "glu"
        self.Wi = nn.Linear(size, 2 * width if self.gated else width, bias=config["in_bias"])
        self.inner_norm = _norm(config["inner_norm"], width)
        self.Wo = nn.Linear(width, size, bias=config["out_bias"])
        self.inner_dropout, self.out_dropout = nn.Dropout(config["inner_dropout"]), nn.Dropout(config["out_dropout"])

    def forward(self, states: Tensor) -> Tensor:
        inner = self.Wi(states)
        if self.gated:
            inner, other = inner.chunk(2, -1)
            if self.config["activated_half"] == "second":
                inner, other = other, inner
        inner = self.activation(inner) * other if self.gated else self.activation(inner)
        return self.out_dropout(self.Wo(self.inner_dropout(self.inner_norm(inner))))


class Block(GradientCheckpointingLayer):
    def __init__(self, model: dict[str, Any], layer: int) -> None:
        super().__init__()
        initial = model["initial_layers"]
        if initial is not None and layer < initial["count"]:
            model = {**model, **{slot: initial[slot] for slot in ("attention", "mlp", "block") if initial[slot]}}
        self.kind, norm, size = model["block"]["name"], model["norm"], model["hidden_size"]
        first = None if layer == 0 and model["block"].get("skip_first_attention_norm") else norm
        if self.kind == "parallel":
            self.norm = _norm(first, size)
        else:
            self.attn_norm, self.mlp_norm = _norm(first, size), _norm(norm, size)
        after = norm if self.kind == "sandwich" else None
        self.attn_out_norm, self.mlp_out_norm = _norm(after, size), _norm(after, size)
        self.attn, self.mlp = Attention(model, layer), FeedForward(model)

    def forward(self, states: Tensor, *where: Any) -> tuple[Tensor, Tensor | None]:
        """`Attention.forward` of a whole block."""
        if self.kind == "postnorm":
            attended, probs = self.attn(states, *where)
            states = self.attn_norm(states + attended)
            return self.mlp_norm(states + self.mlp(states)), probs
        normed = self.norm(states) if self.kind == "parallel" else self.attn_norm(states)
        attended, probs = self.attn(normed, *where)
        if self.kind == "parallel":
            return states + attended + self.mlp(normed), probs
        states = states + self.attn_out_norm(attended)
        return states + self.mlp_out_norm(self.mlp(self.mlp_norm(states))), probs


def _can_look() -> bool:
    """Whether values of tensors can be read: while a graph is traced there are none."""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def _check_shape(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if tensor is None or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return  # a traced graph is of these shapes alone, and would hold their comparison as a constant
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")


class FlexBertPreTrainedModel(PreTrainedModel):
    config_class = FlexBertConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch, and does not divide the loss itself
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = _supports_context_parallel = False

    def __init__(self, config: FlexBertConfig) -> None:
        for name in ("is_decoder", "is_encoder_decoder", "add_cross_attention", "chunk_size_feed_forward"):
            if getattr(config, name, None):
                raise ValueError(f"config.{name}: not supported by this model")
        super().__init__(config)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look in this file for its own functions

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embedding.tokens  # pyright: ignore

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embedding.tokens = value  # pyright: ignore

    def prune_heads(self, heads_to_prune: Any) -> None:
        raise NotImplementedError("prune_heads: not supported by this model")

    def _init_weights(self, module: nn.Module) -> None:
        # Functions of torch.nn.init: transformers 5 makes them leave out what has been loaded.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, 0.25)
        elif isinstance(module, Position) and hasattr(module, "scale"):
            nn.init.constant_(module.scale, module.hidden_size**-0.5)
        elif isinstance(module, MaskedHead) and module.decoder_bias is not None:
            nn.init.zeros_(module.decoder_bias)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _returned(self, output: Any, return_dict: Flag) -> Any:
        """The output, or a tuple of what is not None in it."""
        wanted = self.config.return_dict and not getattr(self.config, "torchscript", False)
        return output if (wanted if return_dict is None else return_dict) else output.to_tuple()


class FlexBertModel(FlexBertPreTrainedModel):
    """The encoder: ids in, hidden states out."""

    def __init__(self, config: FlexBertConfig) -> None:
        super().__init__(config)
        model = config.flexbert
        if not model:
            raise ValueError("config.flexbert: is empty: a FlexBERT model is built from what it says")
        self.position, self.embedding = Position(model), Embedding(model)
        self.layers = nn.ModuleList(Block(model, layer) for layer in range(model["num_hidden_layers"]))
        self.final_norm = _norm(None if self.layers[-1].kind == "postnorm" else model["norm"], model["hidden_size"])
        self.post_init()

    def forward(
        self, input_ids: Given = None, attention_mask: Given = None, token_type_ids: Given = None,
        position_ids: Given = None, inputs_embeds: Given = None, output_attentions: Flag = None,
        output_hidden_states: Flag = None, return_dict: Flag = None,
    ) -> Any:  # fmt: skip
        """Hidden states (B, S, D) of `input_ids` (B, S), or of `inputs_embeds` (B, S, D), rows of the token table.

        attention_mask (B, S): 1 or true where the token is real. token_type_ids (B, S). position_ids (B, S) or (1, S):
        the place of each token, for all that depends on places or their distance; None: its place among the real ones.
        The other arguments are as in transformers' models; hidden_states ends with what is after the final norm.
        Raises ValueError for other shapes, masks that are not of 0 and 1, and places outside the learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give one of them")
        given: Any = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        if given.ndim != 2:
            raise ValueError("input_ids, inputs_embeds: expected shape (batch, slots) or (batch, slots, hidden_size)")
        shape = tuple(given.shape)
        _check_shape("attention_mask", attention_mask, shape)
        _check_shape("token_type_ids", token_type_ids, shape)
        _check_shape("position_ids", position_ids, shape, (1, shape[1]))
        real, places = None, torch.arange(shape[1], device=given.device)[None]
        if attention_mask is not None:
            real = attention_mask.bool()
            if _can_look() and not torch.equal(real.to(attention_mask.dtype), attention_mask):
                raise ValueError("attention_mask: expected 1 where the token is real, else 0: it has other values")
            places = (real.long().cumsum(1) - 1).clamp_min(0)
        if position_ids is not None:
            places = position_ids
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        kernel = self.config._attn_implementation
        if kernel not in ("eager", "sdpa"):
            raise ValueError(f"attn_implementation: {kernel!r} is not supported by this model: use sdpa or eager")
        eager = bool(attentions) or kernel == "eager"  # only eager attention has weights to return

        rows = self.embedding.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.embedding(rows, self.position.embed(places), token_type_ids)
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        rotations = [self.position.rotation(places, local) for local in (False, True)]
        biases: dict[int | None, Tensor | None] = {}
        collected, weights = [], []
        for layer in self.layers:
            collected.append(states)
            attn: Any = layer.attn
            if attn.window not in biases:
                biases[attn.window] = self.position.bias(places, real, attn.window, dtype)
            states, probs = layer(states, self.position, rotations[attn.is_local], biases[attn.window], eager)
            weights.append(probs)
        states = self.final_norm(states)
        every = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output: Any = modeling_outputs.BaseModelOutput
        output = output(states, (*collected, states) if every else None, tuple(weights) if attentions else None)
        return self._returned(output, return_dict)


class _WithHead(FlexBertPreTrainedModel):
    output_class: Any
    encoder_class: Any = FlexBertModel
    head_class: Any
    encoder: Any
    head: Any

    def __init__(self, config: FlexBertConfig) -> None:
        super().__init__(config)
        self.encoder, self.head = self.encoder_class(config), self.head_class(config.flexbert)
        self.post_init()

    def _scores(self, states: Tensor, attention_mask: Given) -> Tensor:
        """Of hidden states (B, S, D): (B, S, V or C), or (B, C) of sequences."""
        return self.head(states, attention_mask)

    def forward(
        self, input_ids: Given = None, attention_mask: Given = None, token_type_ids: Given = None,
        position_ids: Given = None, inputs_embeds: Given = None, labels: Given = None,
        output_attentions: Flag = None, output_hidden_states: Flag = None, return_dict: Flag = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """labels: see `_loss`, the mean over them; with num_items_in_batch, their sum divided by it: then the losses of
        a step's microbatches add up to the step's mean. The other arguments: see FlexBertModel."""
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        output = self.encoder(*given, output_attentions, output_hidden_states, return_dict=True)
        logits = self._scores(output.last_hidden_state, attention_mask)
        loss = None if labels is None else self._loss(logits, labels.to(logits.device), num_items_in_batch)
        output = self.output_class(loss, logits, output.hidden_states, output.attentions)
        return self._returned(output, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, items: Given | int) -> Tensor:
        """Cross entropy; labels (B, S) int64, -100 = ignored. 0 when all are ignored."""
        if labels.shape != logits.shape[:-1]:
            raise ValueError(f"labels: {tuple(labels.shape)} do not fit scores {tuple(logits.shape)}")
        total = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=-100)
        return total / _items(items, (labels != -100).sum(), total)


class MaskedHead(nn.Module):
    """norm(act(dense(x))), then the decoder, whose weight is the token table where the config says `tied`."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        config, size = model["head"], model["hidden_size"]
        self.transform = config["transform"]
        if self.transform:
            self.dense = nn.Linear(size, size, bias=config["dense_bias"])
            self.activation = _activation(config["activation"])
            self.norm = _norm(model["norm"], size)
        self.output = nn.Linear(size, model["vocab_size"], bias=False)
        self.decoder_bias = nn.Parameter(torch.zeros(model["vocab_size"])) if config["decoder_bias"] else None

    def forward(self, states: Tensor, _: Tensor | None = None) -> Tensor:
        if self.transform:
            states = self.norm(self.activation(self.dense(states)))
        logits = self.output(states)
        return logits if self.decoder_bias is None else logits + self.decoder_bias


class FlexBertForMaskedLM(_WithHead):
    """The encoder under its masked-token head."""

    output_class, head_class = modeling_outputs.MaskedLMOutput, MaskedHead
    _tied_weights_keys = {"head.output.weight": "encoder.embedding.tokens.weight"}  # where the config says `tied`

    def __init__(self, config: FlexBertConfig) -> None:
        name = config.flexbert.get("head", {}).get("name")
        if not self._predicts_tokens(name):
            raise ValueError(f"config.flexbert: head: {name!r} is no masked-token head: this model has none")
        super().__init__(config)

    @staticmethod
    def _predicts_tokens(head: Any) -> bool:
        return head == "mlm"

    def get_output_embeddings(self) -> nn.Module:
        return self.head.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if new_embeddings.bias is not None:
            raise ValueError("set_output_embeddings: the decoder's bias is head.decoder_bias: give a Linear without")
        self.head.output = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers'. The decoder's bias: new entries have the old ones' mean, without mean_resizing 0."""
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        old, size = self.head.decoder_bias, table.num_embeddings
        if old is not None and len(old) != size:
            added = old.new_full((max(size - len(old), 0),), float(old.detach().mean()) if mean_resizing else 0.0)
            new = torch.cat((old.detach()[:size], added))
            self.head.decoder_bias = nn.Parameter(new, requires_grad=old.requires_grad)
        return table


class TaskHead(nn.Module):
    """Dropout and a linear classifier, for sequences on top of norm(act(dense(pool(x))))."""

    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        config, size = model["head"], model["hidden_size"]
        self.pooling = config.get("pooling")
        if self.pooling is not None:
            self.dense = nn.Linear(size, size, bias=config["dense_bias"])
            self.activation = _activation(config["activation"])
            self.norm = _norm(model["norm"] if config["norm"] else None, size)
        self.dropout = nn.Dropout(config["dropout"])
        self.classifier = nn.Linear(size, config["num_labels"])

    def forward(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, C), or (B, C) with pooling; a row without tokens pools to zeros."""
        if self.pooling is not None:
            real = torch.ones(states.shape[:2], device=states.device) if attention_mask is None else attention_mask
            real = real.bool()
            if self.pooling == "cls":  # the first real token, wherever the padding is
                real = real & (real.long().cumsum(1) == 1)
            wide = torch.where(real[..., None], states, 0).float()
            pooled = (wide.sum(1) / real.sum(1).clamp_min(1)[:, None]).to(states.dtype)
            states = self.norm(self.activation(self.dense(pooled)))
        return self.classifier(self.dropout(states))


class _ForTask(_WithHead):
    """The encoder under the head for a task: the config's if it is one for the task, else FlexBERT's default one."""

    head_class = TaskHead
    task: str

    def __init__(self, config: FlexBertConfig) -> None:
        config = copy.deepcopy(config)  # another model may have been built from it
        head = config.flexbert.get("head", {})
        self.head_is_new, self.num_labels = head.get("name") != self.task, config.num_labels
        if self.head_is_new:
            head = {"name": self.task, "dropout": 0.1, **TASK_HEADS[self.task]}
        config.flexbert["head"] = {**head, "num_labels": config.num_labels}
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Weights of a head for another task are not used, though some have the same names."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.head.modules() if model.head_is_new else ():
            if all(parameter.is_floating_point() for parameter in module.parameters()):  # quantised: not ours
                model._init_weights(module)
        return loaded


class FlexBertForSequenceClassification(_ForTask):
    """One row of scores per sequence."""

    task, output_class = "classification", modeling_outputs.SequenceClassifierOutput

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """By config.problem_type: regression or multi_label_classification: labels (B, C) float, or (B,) for one score;
        single_label_classification: (B,) int64, -100 = ignored. None: set from labels, as transformers does."""
        if self.config.problem_type is None:
            several = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            self.config.problem_type = "regression" if self.num_labels == 1 else several
        if self.config.problem_type == "single_label_classification":
            return super()._loss(logits, labels.flatten(), items)
        if labels.numel() != logits.numel():
            raise ValueError(f"labels: {tuple(labels.shape)} do not fit scores {tuple(logits.shape)}")
        loss = F.mse_loss if self.config.problem_type == "regression" else F.binary_cross_entropy_with_logits
        total = loss(logits.float(), labels.float().reshape(logits.shape), reduction="sum")
        return total / _items(items, labels.numel(), total)


class FlexBertForTokenClassification(_ForTask):
    """One row of scores per token; labels (B, S) int64, -100 = ignored."""

    task, output_class = "tokens", modeling_outputs.TokenClassifierOutput


def _items(items: Tensor | int | None, count: Tensor | int, like: Tensor) -> Tensor:
    return torch.as_tensor(count if items is None else items, device=like.device).clamp_min(1)
