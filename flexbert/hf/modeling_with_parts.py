"""A FlexBERT encoder with parts from outside FlexBERT, for transformers. Needs torch, transformers and pydantic.

Exports whose architecture has such parts carry this file, the parts, and FlexBERT's library itself, since the parts are
written for it: flexbert_sources.py holds all texts. They load with `trust_remote_code=True`. Licence: Apache-2.0.

The model computes on padded batches what the library does on packed ones, with the same names of weights. What it
cannot do it refuses.   B batch, S slots, T tokens, D hidden, V vocabulary, C labels.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import pydantic  # noqa: F401 (the library needs it: transformers looks here for what is to be installed)
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import modeling_outputs

# Of a local folder, transformers copies what this file imports, and not what that imports: so this one is named here.
from .activations import FUNCTIONS  # noqa: F401  # pyright: ignore[reportMissingImports]
from .carried_modules import CarriedModules
from .flexbert_sources import IMPORTABLE, PARTS, ROOTS, SOURCES  # pyright: ignore[reportMissingImports]
from .modeling_flexbert import FlexBertConfig, FlexBertPreTrainedModel
from .modeling_flexbert import FlexBertForMaskedLM as _ForMaskedLM
from .modeling_flexbert import FlexBertForSequenceClassification as _ForSequences
from .modeling_flexbert import FlexBertForTokenClassification as _ForTokens

_CARRIED = CarriedModules({**SOURCES, **PARTS}, IMPORTABLE, Path(__file__).parent)
flexbert = _CARRIED.load("flexbert")
_packed, _registry = _CARRIED.load("flexbert/packed.py"), _CARRIED.load("flexbert/registry.py")
for _part in ROOTS:
    _CARRIED.load(_part)

Given = Tensor | None
Flag = bool | None


def _architecture(model: dict[str, Any]) -> Any:
    """The library's config. Loss and starting weights are of pretraining."""
    return flexbert.FlexBertConfig.from_dict({**model, "loss": "cross_entropy", "init": "default"})


def _built(make: Any, model: dict[str, Any], prefix: str) -> Any:
    """A module of the library's, with weights of its own. What a part computes when it is made, and keeps beside its
    weights, is there where transformers asks for weights without values (device meta), too."""
    architecture = _architecture(model)
    is_meta = torch.empty(0).device.type == "meta"
    with torch.device("cpu") if is_meta else contextlib.nullcontext():
        module = make(architecture)
    for child in module.modules():  # the kernel of the machine that trained may not be here
        if hasattr(getattr(child, "config", None), "backend"):
            child.config = child.config.model_copy(update={"backend": "auto"})
        if child._non_persistent_buffers_set:  # transformers 5 empties them
            made = {name: child._buffers[name] for name in child._non_persistent_buffers_set}
            child.made = {name: buffer.clone() for name, buffer in made.items() if buffer is not None}
    if not is_meta:
        layers = architecture.num_hidden_layers
        seed = int(torch.randint(2**31, (), device="cpu"))
        _registry.INITS.build(architecture.init, num_hidden_layers=layers)(module, seed, prefix)
    return module


def _head(model: dict[str, Any]) -> Any:
    return _built(lambda config: _registry.HEADS.build(config.head, model=config), model, "head")


class _WithParts(FlexBertPreTrainedModel):
    _no_split_modules = [entry.__name__ for entry in _registry.BLOCKS.entries.values()]
    supports_gradient_checkpointing = False

    def _init_weights(self, module: nn.Module) -> None:
        pass  # `_built` has; in weights that are loaded none may be missing

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers'. Raises ValueError when a weight is missing, but of a head for another task: a part's
        starting weights are not known."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # pyright: ignore
        is_new = getattr(model, "head_is_new", False)
        missing = sorted(name for name in info["missing_keys"] if not (is_new and name.startswith("head.")))
        if missing:
            raise ValueError(f"{missing[0]}: is missing in the weights")
        for module in model.modules():
            for name, values in getattr(module, "made", {}).items():
                module.get_buffer(name).copy_(values)
        return (model, info) if output_loading_info else model

    def _layout(self, states: Tensor, attention_mask: Given) -> tuple[Tensor, Any]:
        """The rows (T, D) of real tokens in (B, S, D), and where they are."""
        places = states[..., 0].long()
        layout = _packed.unpad(places, torch.ones_like(places) if attention_mask is None else attention_mask)
        return states.flatten(0, 1).index_select(0, layout.slots), layout


class FlexBertModel(_WithParts):
    """The encoder: ids in, hidden states out."""

    def __init__(self, config: FlexBertConfig) -> None:
        super().__init__(config)
        if not config.flexbert:
            raise ValueError("config.flexbert: is empty: a FlexBERT model is built from what it says")
        for file, digest in getattr(config, "parts", {}).items():
            if hashlib.sha256(PARTS.get(file, "").encode()).hexdigest() != digest:
                raise ValueError(f"{file}: in flexbert_sources.py is not the part that config.json has the sha256 of")
        encoder = _built(flexbert.FlexBertEncoder, config.flexbert, "encoder")
        self._library = (encoder,)  # in a tuple, so that its weights have one name each: those of its children
        for name, child in encoder.named_children():
            setattr(self, name, child)
        self.post_init()

    def forward(
        self, input_ids: Given = None, attention_mask: Given = None, token_type_ids: Given = None,
        position_ids: Given = None, inputs_embeds: Given = None, output_attentions: Flag = None,
        output_hidden_states: Flag = None, return_dict: Flag = None,
    ) -> Any:  # fmt: skip
        """Hidden states (B, S, D) of `input_ids` (B, S), zero where attention_mask is.

        attention_mask (B, S): 1 or true where the token is real. token_type_ids (B, S). hidden_states ends with what is
        after the final norm. Raises ValueError for other shapes, masks that are not of 0 and 1, and for what a part may
        not know: position_ids, inputs_embeds, output_attentions.
        """
        refused = {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        wants = self.config.output_attentions if output_attentions is None else output_attentions
        for name, value in {**refused, "output_attentions": wants or None}.items():
            if value is not None:
                raise ValueError(f"{name}: not supported by a model with parts from outside: leave it out")
        if input_ids is None:
            raise ValueError("input_ids: is required")
        (encoder,) = self._library
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = _packed.unpad(input_ids, mask)
        types = None
        if token_type_ids is not None:
            if token_type_ids.shape != input_ids.shape:
                raise ValueError(
                    f"token_type_ids: expected {tuple(input_ids.shape)}, got {tuple(token_type_ids.shape)}"
                )
            types = token_type_ids.flatten().index_select(0, rows.slots)
        every = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        collected: list[Tensor] = []
        sources = [encoder.embedding, *encoder.layers[:-1]] if every else []
        hooks = [each.register_forward_hook(lambda _, __, states: collected.append(states)) for each in sources]
        try:
            states = encoder(rows.input_ids, rows.cu_seqlens, rows.max_seqlen, types)
        finally:
            for hook in hooks:
                hook.remove()
        padded = [_packed.pad(each, rows.slots, *input_ids.shape) for each in (*collected, states)]
        output: Any = modeling_outputs.BaseModelOutput(padded[-1], tuple(padded) if every else None)
        return self._returned(output, return_dict)


class FlexBertForMaskedLM(_WithParts, _ForMaskedLM):
    """The encoder under its masked-token head."""

    encoder_class, head_class = FlexBertModel, staticmethod(_head)
    _tied_weights_keys = None  # a head that is tied reads the token table

    @staticmethod
    def _predicts_tokens(head: Any) -> bool:
        return head in _registry.HEADS.entries and _registry.HEADS.entries[head].task == "mlm"

    def _scores(self, states: Tensor, attention_mask: Given) -> Tensor:
        rows, layout = self._layout(states, attention_mask)
        weight, bias = self.head.decoder(self.get_input_embeddings().weight)
        return _packed.pad(F.linear(self.head(rows), weight, bias), layout.slots, *states.shape[:2])

    def get_output_embeddings(self) -> Any:
        return getattr(self.head, "output", None)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers', for a model whose embedding and head are FlexBERT's: a part may hold more of the
        vocabulary's size."""
        names = {slot: self.config.flexbert[slot]["name"] for slot in ("embedding", "head")}
        if names != {"embedding": "tokens", "head": "mlm"}:
            raise NotImplementedError(f"resize_token_embeddings: not supported with {names}")
        return super().resize_token_embeddings(*args, **kwargs)


class _ForTask(_WithParts):
    encoder_class, head_class = FlexBertModel, staticmethod(_head)
    config: FlexBertConfig
    head: Any

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. A head for another task than the weights' starts anew."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.head_is_new:
            with torch.device("cpu"):
                new = _head(model.config.flexbert)
            model.head.load_state_dict(new.state_dict())
        return loaded


class FlexBertForSequenceClassification(_ForTask, _ForSequences):
    """One row of scores per sequence."""

    def _scores(self, states: Tensor, attention_mask: Given) -> Tensor:
        rows, layout = self._layout(states, attention_mask)
        return self.head(rows, layout.cu_seqlens)


class FlexBertForTokenClassification(_ForTask, _ForTokens):
    """One row of scores per token; labels (B, S) int64, -100 = ignored."""

    def _scores(self, states: Tensor, attention_mask: Given) -> Tensor:
        rows, layout = self._layout(states, attention_mask)
        return _packed.pad(self.head(rows, layout.cu_seqlens), layout.slots, *states.shape[:2])
