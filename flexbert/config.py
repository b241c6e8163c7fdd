"""The architecture of a model: one validated object, from YAML, a dict, or a Hugging Face config (flexbert.hf)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from flexbert.registry import (
    ATTENTIONS,
    BLOCKS,
    EMBEDDINGS,
    HEADS,
    INITS,
    LOSSES,
    MLPS,
    NORMS,
    POSITIONS,
    ModelComponent,
)
from flexbert_core.composing import load_node
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import Component, ConfigError, Schema, ShownSlot, validate

_HERE = Path(__file__).resolve().parent
# An installed library has the presets inside, a checkout among the other configs.
PRESETS = _HERE / "presets" if (_HERE / "presets").is_dir() else _HERE.parent / "configs" / "model"

TokenId = Annotated[int | None, Field(ge=0)]


def named_init(node: Any) -> Any:
    """`init: {from: FOLDER}` says enough."""
    return {"name": "grow", **node} if isinstance(node, dict) and "from" in node and "name" not in node else node


_LAYER_SLOTS = ("attention", "mlp", "block")


class InitialLayers(Schema):
    """What the first layers have in place of what the model says; null: as the model says."""

    count: int = Field(1, ge=1, description="layers from the first on that differ")
    attention: Annotated[Any, *ATTENTIONS.slot(optional=True)] = Field(None, description="attention of their blocks")
    mlp: Annotated[Any, *MLPS.slot(optional=True)] = Field(None, description="feed-forward half of their blocks")
    block: Annotated[Any, *BLOCKS.slot(optional=True)] = Field(None, description="how halves join the residual stream")


def _components(component: Any, place: str = "") -> Iterator[tuple[str, ModelComponent]]:
    """Those with rules in a slot, by their place in it: the component itself, and the parts it names, such as norms."""
    if isinstance(component, ModelComponent):
        yield place, component
    if isinstance(component, Component):
        for field in type(component).model_fields:
            yield from _components(getattr(component, field), f"{place}.{field}".lstrip("."))


class FlexBertConfig(Schema):
    """An encoder and its head. Sizes have Hugging Face names; a slot takes a name or a mapping with `name`."""

    vocab_size: int = Field(
        ge=1, le=2**24, description="entries of the token table; a multiple of 64 is fastest on GPUs"
    )
    hidden_size: int = Field(768, ge=1, le=2**17, description="width of the residual stream")
    num_hidden_layers: int = Field(12, ge=1, le=2000, description="blocks")
    num_attention_heads: int = Field(12, ge=1, description="heads per attention layer; must divide hidden_size")
    intermediate_size: int = Field(
        3072, ge=1, le=2**19, description="width inside the mlp; of one half, in a gated one"
    )
    max_position_embeddings: int = Field(
        512, ge=1, le=2**24, description="longest sequence the model is meant for, in tokens"
    )

    pad_token_id: TokenId = Field(None, description="padding in exports; null: the tokenizer's")
    bos_token_id: TokenId = Field(None, description="begin of text in exports; null: the tokenizer's, else [CLS]")
    eos_token_id: TokenId = Field(None, description="end of text in exports; null: the tokenizer's, else [SEP]")
    cls_token_id: TokenId = Field(None, description="[CLS] in exports; null: the tokenizer's")
    sep_token_id: TokenId = Field(None, description="[SEP] in exports; null: the tokenizer's")
    mask_token_id: TokenId = Field(None, description="[MASK] in exports; null: the tokenizer's")

    embedding: Annotated[Any, *EMBEDDINGS.slot()] = Field("tokens", description="from token ids to the residual stream")
    position: Annotated[Any, *POSITIONS.slot()] = Field("rope", description="how a token's place enters")
    attention: Annotated[Any, *ATTENTIONS.slot()] = Field("multihead", description="attention half of a block")
    norm: Annotated[Any, *NORMS.slot()] = Field("layernorm", description="every normalisation of the model")
    mlp: Annotated[Any, *MLPS.slot()] = Field("glu", description="feed-forward half of a block")
    block: Annotated[Any, *BLOCKS.slot()] = Field("prenorm", description="how the halves join the residual stream")
    initial_layers: InitialLayers | None = Field(None, description="first layers that differ; null: none")
    head: Annotated[Any, *HEADS.slot()] = Field("mlm", description="from the residual stream to scores")
    loss: Annotated[Any, *LOSSES.slot()] = Field("cross_entropy", description="what masked-token training minimises")
    init: Annotated[Any, *INITS.slot(), BeforeValidator(named_init), ShownSlot(INITS, implied={"from": "grow"})] = (
        Field("full_megatron", description="starting weights; {from: FOLDER} grows a smaller model")
    )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def layer(self, index: int) -> "FlexBertConfig":
        """The config as it is for layer `index`: the initial layers' components over the model's."""
        initial = self.initial_layers
        if initial is None or index >= initial.count:
            return self
        given = {slot: getattr(initial, slot) for slot in _LAYER_SLOTS}
        return self.model_copy(update={slot: component for slot, component in given.items() if component is not None})

    @property
    def has_local_layers(self) -> bool:
        """Whether a layer sees a window only; true where an attention from outside does not say."""
        numbers = range(self.num_hidden_layers)
        every = [getattr(self.layer(index).attention, "global_attn_every_n_layers", None) for index in numbers]
        return any(number is None or index % number for index, number in enumerate(every))

    def unread(self) -> list[str]:
        """`field: why` for what the config says and no layer reads."""
        initial, lines = self.initial_layers, []
        if initial is not None:
            given = [slot for slot in _LAYER_SLOTS if getattr(initial, slot) is not None]
            if not given:
                lines.append(f"initial_layers: {initial.count} that differ in nothing: say in what, or leave it out")
            elif initial.count == self.num_hidden_layers:
                lines.append(
                    f"{', '.join(given)}: initial_layers covers all {initial.count} layers: give it there only"
                )
        for slot in (name for name in type(self).model_fields if name != "initial_layers"):
            for _, component in _components(getattr(self, slot)):
                lines += [f"{slot}.{line}" for line in component.unread(self)]
        for slot in _LAYER_SLOTS if initial is not None else ():
            for _, component in _components(getattr(initial, slot)):
                lines += [f"initial_layers.{slot}.{line}" for line in component.unread(self)]
        return lines

    @model_validator(mode="after")
    def _check(self) -> "FlexBertConfig":
        faults = []
        if self.hidden_size % self.num_attention_heads:
            low = self.hidden_size // self.num_attention_heads * self.num_attention_heads
            near = [str(size) for size in (low, low + self.num_attention_heads) if size]
            faults.append(
                f"hidden_size: {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}: "
                f"try {' or '.join(near)}"
            )
        for name in TOKEN_IDS:
            value = getattr(self, name)
            if value is not None and value >= self.vocab_size:
                faults.append(
                    f"{name}: {value} is outside the vocabulary of {self.vocab_size}: null takes the tokenizer's"
                )
        count = self.initial_layers.count if self.initial_layers else 0
        if count > self.num_hidden_layers:
            faults.append(
                f"initial_layers.count: {count} is more than num_hidden_layers {self.num_hidden_layers}: at most that"
            )
        # What the initial layers leave as it is; then what they say themselves, which counts for them alone
        rest = [slot for slot in type(self).model_fields if count < self.num_hidden_layers or slot not in _LAYER_SLOTS]
        for model, slots in ((self, rest), (self.layer(0), _LAYER_SLOTS if count else ())):
            for slot in slots:
                for place, component in _components(getattr(model, slot)):
                    if faults:
                        break
                    try:
                        component.check(model)
                    except ValueError as error:
                        where = "" if model is self else "initial_layers: "
                        if place:  # a part of a part does not know where it is
                            where += f"{slot}.{place}: "
                        faults.append(f"{where}{error}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @classmethod
    def from_yaml(cls, source: str | Path) -> "FlexBertConfig":
        """From a preset's name (configs/model/NAME.yaml) or a file's path. Raises ConfigError, one line per fault."""
        path = Path(source)
        if path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
            return validate(cls, load_preset(source), PRESETS / f"{source}.yaml")
        return validate(cls, load_node(path, spelled={"init": named_init}), path)

    @classmethod
    def from_dict(cls, node: dict[str, Any]) -> "FlexBertConfig":
        """The inverse of `to_dict`; a slot may also be a bare name. Raises ConfigError, one line per fault."""
        return validate(cls, node, "model")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default spelt out."""
        return self.model_dump()


def load_preset(name: Any) -> dict[str, Any]:
    """The fields that configs/model/NAME.yaml gives. Raises ConfigError for a name that none of them has."""
    presets = {file.stem: file for file in PRESETS.glob("*.yaml")}
    if not isinstance(name, str) or name not in presets:
        raise ConfigError(f"model: unknown preset {str(name)!r}, {did_you_mean(str(name), presets)}")
    return load_node(presets[name])


def without_init(config: FlexBertConfig) -> FlexBertConfig:
    """The config with plain starting weights: for a model whose weights come from elsewhere, or are never looked at.

    What `init` says of them costs nothing then, and may name a folder that is not there.
    """
    return config.model_copy(update={"init": INITS.parse("default")})


TOKEN_IDS = tuple(name for name in FlexBertConfig.model_fields if name.endswith("_token_id"))
