"""A FlexBERT encoder for transformers, in one file. Needs torch and transformers, not FlexBERT.

Exports of architectures that transformers has no class for carry this file beside their weights and load with
`trust_remote_code=True`. It computes on padded batches what FlexBERT computes on packed ones, from the same config
(field `flexbert` of config.json) and with the same names of weights. Licence: Apache-2.0.

B batch, S slots, N heads, K key-value heads, H head dim, D hidden, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

# What this file can build: slot -> names. FlexBERT refuses to export anything else.
SUPPORTED = {
    "embedding": {"tokens"},
    "position": {"none", "rope", "alibi", "learned", "sinusoidal"},
    "attention": {"multihead"},
    "norm": {"layernorm", "rmsnorm"},
    "mlp": {"glu", "mlp"},
    "block": {"prenorm", "postnorm", "parallel", "sandwich"},
    "head": {"mlm"},
}
ACTIVATIONS: dict[str, Any] = {
    "gelu_tanh": lambda states: F.gelu(states, approximate="tanh"),
    "relu_squared": lambda states: F.relu(states).square(),
    "identity": lambda states: states,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "prelu": nn.PReLU,
    **{
        name: getattr(F, name)
        for name in (
            *("gelu", "silu", "relu", "celu", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
            *("logsigmoid", "mish", "relu6", "selu", "softplus", "softsign"),
        )
    },
}


class FlexBertConfig(PretrainedConfig):
    """`flexbert`: the architecture, as FlexBERT's YAML says it with every default spelt out."""

    model_type = "flexbert"

    def __init__(self, flexbert: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.flexbert = flexbert or {}
        super().__init__(**kwargs)


def _activation(name: str) -> Any:
    return ACTIVATIONS[name]() if isinstance(ACTIVATIONS[name], type) else ACTIVATIONS[name]


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
        self.config, self.hidden_size, self.heads = (
            model["position"],
            model["hidden_size"],
            model["num_attention_heads"],
        )
        self.limit = model["max_position_embeddings"]
        if self.config["name"] == "learned":
            self.table = nn.Embedding(self.limit + self.config["offset"], self.hidden_size)
        if self.config["name"] == "sinusoidal" and self.config["learned_scale"]:
            self.scale = nn.Parameter(torch.full((1,), self.hidden_size**-0.5))

    def embed(self, places: Tensor) -> Tensor | None:
        """(B, S, D) to add to the embeddings at these places (B, S)."""
        if self.config["name"] == "learned":
            if places.numel() and int(places.max()) >= self.limit:
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
        if self.config["scaling"] == "ntk":
            frequencies = (theta * factor) ** -exponents / factor ** (2 / dim)
        else:
            frequencies = theta**-exponents / factor
        angles = places[..., None, None].float() * frequencies
        return angles.cos(), angles.sin()

    def rotate(self, states: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Turn queries or keys (B, S, N, H), in float32."""
        if rotation is None:
            return states
        cos, sin = rotation
        dim = 2 * cos.shape[-1]
        turning, rest = states[..., :dim].float(), states[..., dim:]
        if self.config["layout"] == "interleaved":
            first, second = turning[..., 0::2], turning[..., 1::2]
        else:
            first, second = turning.chunk(2, -1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        pairs = self.config["layout"] == "interleaved"
        joined = torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)
        return torch.cat((joined.to(states.dtype), rest), -1)

    def bias(self, places: Tensor, real: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B, 1 or N, S, S) to add to attention scores; window: tokens seen to either side, None: all."""
        distance = (places[:, None, :] - places[:, :, None]).abs()[:, None]
        visible = real[:, None, None, :]
        if window is not None:
            visible = visible & (distance <= window)
        bias = torch.zeros((), device=places.device)
        if self.config["name"] == "alibi":
            bias = -_alibi_slopes(self.heads, places.device)[:, None, None] * distance
        return torch.where(visible, bias, torch.finfo(dtype).min).to(dtype)


def _alibi_slopes(heads: int, device: torch.device) -> Tensor:
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2 ** (-4 * (head + 1) / power) for head in range(0, 2 * power, 2)][: heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


class Embedding(nn.Module):
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.config = model["embedding"]
        self.scale = math.sqrt(model["hidden_size"]) if self.config["scaled"] else 1.0
        self.tokens = nn.Embedding(model["vocab_size"], model["hidden_size"])
        if self.config["token_types"]:
            self.types = nn.Embedding(self.config["token_types"], model["hidden_size"])
        self.norm = _norm(model["norm"] if self.config["norm"] else None, model["hidden_size"])

    def forward(self, input_ids: Tensor, added: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        states = self.tokens(input_ids) * self.scale
        if added is not None:
            states = states + added.to(states.dtype)
        if self.config["token_types"]:
            states = states + self.types(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        return F.dropout(self.norm(states), self.config["dropout"], self.training)


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

    def forward(self, states: Tensor, position: Position, places: Tensor, real: Tensor) -> Tensor:
        if self.config["fused"]:
            parts = self.Wqkv(states).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        else:
            parts = [linear(states).unflatten(-1, (-1, self.head_dim)) for linear in (self.Wq, self.Wk, self.Wv)]
        rotation = position.rotation(places, self.is_local)
        queries = position.rotate(self.q_norm(parts[0]), rotation)
        keys = position.rotate(self.k_norm(parts[1]), rotation)
        groups = self.heads[0] // self.heads[1]
        keys, values = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (keys, parts[2]))
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            attn_mask=position.bias(places, real, self.window, queries.dtype),
            dropout_p=self.config["probs_dropout"] if self.training else 0.0,
        )
        out = self.Wo(self.inner_norm(attended.transpose(1, 2).flatten(2)))
        return F.dropout(out, self.config["out_dropout"], self.training)


class FeedForward(nn.Module):
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        config, size, width = model["mlp"], model["hidden_size"], model["intermediate_size"]
        self.config, self.activation, self.gated = config, _activation(config["activation"]), config["name"] == "glu"
        self.Wi = nn.Linear(size, 2 * width if self.gated else width, bias=config["in_bias"])
        self.inner_norm = _norm(config["inner_norm"], width)
        self.Wo = nn.Linear(width, size, bias=config["out_bias"])

    def forward(self, states: Tensor) -> Tensor:
        inner = self.Wi(states)
        if self.gated:
            first, second = inner.chunk(2, -1)
            if self.config["activated_half"] == "second":
                first, second = second, first
            inner = self.activation(first) * second
        else:
            inner = self.activation(inner)
        inner = F.dropout(self.inner_norm(inner), self.config["inner_dropout"], self.training)
        return F.dropout(self.Wo(inner), self.config["out_dropout"], self.training)


class Block(nn.Module):
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
        if self.kind == "sandwich":
            self.attn_out_norm, self.mlp_out_norm = _norm(norm, size), _norm(norm, size)
        self.attn, self.mlp = Attention(model, layer), FeedForward(model)

    def forward(self, states: Tensor, *where: Any) -> Tensor:
        if self.kind == "postnorm":
            states = self.attn_norm(states + self.attn(states, *where))
            return self.mlp_norm(states + self.mlp(states))
        if self.kind == "parallel":
            normed = self.norm(states)
            return states + self.attn(normed, *where) + self.mlp(normed)
        if self.kind == "sandwich":
            states = states + self.attn_out_norm(self.attn(self.attn_norm(states), *where))
            return states + self.mlp_out_norm(self.mlp(self.mlp_norm(states)))
        states = states + self.attn(self.attn_norm(states), *where)
        return states + self.mlp(self.mlp_norm(states))


class FlexBertPreTrainedModel(PreTrainedModel):
    config_class = FlexBertConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["Block"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()


class FlexBertModel(FlexBertPreTrainedModel):
    """The encoder: ids in, hidden states out."""

    def __init__(self, config: FlexBertConfig) -> None:
        super().__init__(config)
        model = config.flexbert
        self.position, self.embedding = Position(model), Embedding(model)
        self.layers = nn.ModuleList(Block(model, layer) for layer in range(model["num_hidden_layers"]))
        last = self.layers[-1].kind
        self.final_norm = _norm(None if last == "postnorm" else model["norm"], model["hidden_size"])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """input_ids (B, S); attention_mask (B, S), true or 1 where the token is real."""
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        places = (real.long().cumsum(1) - 1).clamp_min(0)
        if not self.embedding.config["token_types"]:
            token_type_ids = None  # tokenizers send them whether or not a model has any
        states = self.embedding(input_ids, self.position.embed(places), token_type_ids)
        collected = [states]
        for layer in self.layers:
            states = layer(states, self.position, places, real)
            collected.append(states)
        states = self.final_norm(states)
        return BaseModelOutput(
            last_hidden_state=states,  # pyright: ignore[reportArgumentType]
            hidden_states=(*collected[:-1], states) if output_hidden_states else None,  # pyright: ignore
        )


class Head(nn.Module):
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.config, size = model["head"], model["hidden_size"]
        if self.config["transform"]:
            self.dense = nn.Linear(size, size, bias=self.config["dense_bias"])
            self.activation = _activation(self.config["activation"])
            self.norm = _norm(model["norm"], size)
        if not self.config["tied"]:
            self.output = nn.Linear(size, model["vocab_size"], bias=False)
        if self.config["decoder_bias"]:
            self.decoder_bias = nn.Parameter(torch.zeros(model["vocab_size"]))

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        if self.config["transform"]:
            states = self.norm(self.activation(self.dense(states)))
        bias = self.decoder_bias if self.config["decoder_bias"] else None
        return F.linear(states, table if self.config["tied"] else self.output.weight, bias)


class FlexBertForMaskedLM(FlexBertPreTrainedModel):
    """The encoder under its masked-token head."""

    def __init__(self, config: FlexBertConfig) -> None:
        super().__init__(config)
        self.encoder, self.head = FlexBertModel(config), Head(config.flexbert)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embedding.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embedding.tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """labels (B, S), -100 = not masked: the loss is the mean over the others."""
        output = self.encoder(input_ids, attention_mask, token_type_ids, output_hidden_states)
        logits = self.head(output.last_hidden_state, self.encoder.embedding.tokens.weight)
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)  # pyright: ignore
