"""Small models of transformers with random weights, which are the reference for ours."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.helpers.models import Batch, batch_of

# Measured worst case over all cases here: 3.1e-6 on logits up to 6.2, 1.2e-7 on gradients up to 0.15.
TOLERANCE = 1e-5

CLASSES: dict[str, Any] = {
    "modernbert": (ModernBertConfig, ModernBertForMaskedLM),
    "bert": (BertConfig, BertForMaskedLM),
    "roberta": (RobertaConfig, RobertaForMaskedLM),
}

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}

FIELDS: dict[str, dict[str, Any]] = {
    "modernbert": {
        "global_rope_theta": 5000.0,
        "local_rope_theta": 100.0,
        "pad_token_id": 96,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "reference_compile": False,
    },
    "bert": {"pad_token_id": 96, "layer_norm_eps": 1e-12},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 258, "type_vocab_size": 1},
}


def reference_model(attn_implementation: str, model_type: str = "modernbert", **changes: Any) -> Any:
    config_class, model_class = CLASSES[model_type]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **FIELDS[model_type], **changes})
    model = model_class._from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # ones and zeros would hide a norm or bias that is left out
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def batch_for(reference: Any, lengths: tuple[int, ...]) -> Batch:
    """Without the padding id: the reference keeps its row's gradient at zero, and RoBERTa would not count its places."""
    batch = batch_of(lengths, vocab_size=96)
    pad = reference.config.pad_token_id
    return batch._replace(input_ids=torch.where(batch.input_ids == pad, 5, batch.input_ids))


def one_by_one(model: Any, batch: Batch) -> Tensor:
    return torch.cat([model(input_ids=ids[None]).logits[0] for ids in batch.split()])
