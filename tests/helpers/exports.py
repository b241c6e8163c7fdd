"""Tiny folders that transformers loads, with a tokenizer of whole words."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM

from flexbert import build, to_hf
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tokenizer_of


def word_tokenizer(size: int) -> Any:
    """Of [UNK] [CLS] [SEP] [PAD] [MASK] word0 word1 ..., with [CLS] A [SEP] B [SEP] around texts and token types."""
    tokenizer: Any = tokenizer_of(size)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def write_export(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """An export of ours, by default a ModernBERT."""
    to_hf(build(tiny(**changes), seed=seed), word_tokenizer(97), folder)
    return folder


def write_bert(folder: Path, dropout: float = 0.0, seed: int = 0) -> Path:
    """A BERT as transformers saves it, with a pooler and a masked-token head, without dropout."""
    config = BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        pad_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertForMaskedLM(config).save_pretrained(folder)
    word_tokenizer(97).save_pretrained(folder)
    return folder
