"""BERT-family encoders on packed batches, in plain PyTorch. These names are the package's public face."""

from typing import TYPE_CHECKING, Any

# Each of these modules registers its entries, which a config may then name.
from flexbert import (  # noqa: F401
    attention,
    blocks,
    embeddings,
    growing,
    heads,
    init,
    losses,
    mlps,
    norms,
    positions,
)
from flexbert.config import FlexBertConfig
from flexbert.encoder import FlexBertEncoder
from flexbert.model import FlexBertForMaskedLM, MaskedLMOutput, build
from flexbert.registry import register, registered
from flexbert.tasks import ClassificationOutput, FlexBertForSequenceClassification, FlexBertForTokenClassification

if TYPE_CHECKING:
    from flexbert.hf.convert import from_hf, to_hf

__all__ = [
    "ClassificationOutput",
    "FlexBertConfig",
    "FlexBertEncoder",
    "FlexBertForMaskedLM",
    "FlexBertForSequenceClassification",
    "FlexBertForTokenClassification",
    "MaskedLMOutput",
    "build",
    "from_hf",
    "register",
    "registered",
    "to_hf",
]


def __getattr__(name: str) -> Any:
    # On demand: safetensors and transformers are needed at the border only.
    if name in ("from_hf", "to_hf"):
        from flexbert.hf import convert as hf

        return getattr(hf, name)
    raise AttributeError(f"module 'flexbert' has no attribute {name!r}")
