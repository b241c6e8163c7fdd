"""Small retrieval sets, and small models that read them, without downloads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

TOPICS = ("sea", "bread", "steel", "opera", "glacier", "violin", "desert", "orchard", "harbour", "library")
_FILLERS = [f"word{number}" for number in range(40)]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_FACT = ("the", "pass", "code", "of", "is", ".", "x")


def write_beir(folder: Path, per_topic: int = 3) -> Path:
    """Documents on ten topics; a query has its topic's word, and finds its topic's documents. Their grades fall."""
    rng = np.random.default_rng(7)
    (folder / "qrels").mkdir(parents=True)
    documents, queries, rows = [], [], {"train": [], "test": []}
    for topic in TOPICS:
        names = [f"{topic}-{number}" for number in range(per_topic)]
        for number, name in enumerate(names):
            words = [topic] * (per_topic - number) + list(rng.choice(_FILLERS, 12))
            rng.shuffle(words)
            documents.append({"_id": name, "title": topic if number == 0 else "", "text": " ".join(words)})
        for split, asked in (("train", 2), ("test", 1)):
            for number in range(asked):
                query = f"{split}-{topic}-{number}"
                text = f"{topic} {rng.choice(_FILLERS)} {rng.choice(_FILLERS)}"
                queries.append({"_id": query, "text": text})
                grades = range(per_topic, 0, -1)
                rows[split] += [f"{query}\t{name}\t{grade}" for name, grade in zip(names, grades, strict=True)]
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(folder / "queries.jsonl", queries)
    for split, lines in rows.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines])
        (folder / "qrels" / f"{split}.tsv").write_text(text + "\n")
    return folder


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def word_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Of the words above, and of numbers below 100."""
    from evals.needle import NAMES

    words = [*_SPECIAL, *TOPICS, *_FILLERS, *_FACT, *dict.fromkeys(NAMES), *map(str, range(100))]
    words = list(dict.fromkeys(words))
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {f"{name.strip('[]').lower()}_token": name for name in _SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **roles)


def write_model(folder: Path, max_length: int = 64, seed: int = 0) -> Path:
    """A BERT of random weights that reads them."""
    tokenizer = word_tokenizer(max_length)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=max_length,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
