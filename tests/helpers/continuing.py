"""What a run goes on from: tiny models of transformers with tokenizers of text, terms of a domain, and texts with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)

from data.keyed import keyed_generator
from data.preparation.dataset import load_prepare_config, prepare
from data.tokenizer import TOKENIZERS, save_tokenizer
from flexbert import from_hf
from tests.helpers.preparing import write_jsonl
from tests.helpers.texts import SENTENCES, text_tokenizer

_STEMS = ("kin", "pol", "lig", "tran", "oxi", "glu", "hel", "pep", "cas", "nucle")
TERMS = tuple(f"{stem}{ending}" for stem in _STEMS for ending in ("ase", "osome", "itide", "amine", "oxid"))
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
POSITIONS = 512


def old_texts(count: int) -> list[str]:
    """Distinct texts of the old domain."""
    draws = keyed_generator(1, "old texts").integers(len(SENTENCES), size=(count, 5))
    return [" ".join(SENTENCES[choice] for choice in row) + f" {'ab'[number % 2] * (number % 9)}" for number, row in enumerate(draws)]  # fmt: skip


def domain_texts(count: int) -> list[str]:
    """In which each term is followed by the one that belongs to it."""
    draws = keyed_generator(2, "domain texts").integers(len(TERMS), size=(count, 8))
    pair = lambda term: f"the {TERMS[term]} and {TERMS[(term + 7) % len(TERMS)]} sat on the mat"  # noqa: E731
    return [", ".join(pair(int(term)) for term in row) + "." for row in draws]


def bytes_tokenizer(folder: Path, texts: Sequence[str] = (*SENTENCES, "[MASK] Paris, Berlin")) -> None:
    tokenizer, names = TOKENIZERS.build(TOKENIZERS.parse({"name": "train", "vocab_size": 320})).build(iter(texts))
    save_tokenizer(tokenizer, names, folder)


def hf_folder(folder: Path, kind: str, headless: bool = False) -> Any:
    """A model of transformers with random weights, saved there with its tokenizer; the model. kind: bert (WordPiece) or
    modernbert (byte-level)."""
    if kind == "bert":
        text_tokenizer().save_pretrained(folder)
    else:
        bytes_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    classes: dict[str, Any] = {
        "bert": (BertConfig, BertForMaskedLM, BertModel),
        "modernbert": (ModernBertConfig, ModernBertForMaskedLM, None),
    }
    config_class, model_class, headless_class = classes[kind]
    if headless:
        model_class = headless_class
    # Attention's is the one dropout that depends on the number of ranks
    more = (
        {"attention_probs_dropout_prob": 0.0}
        if kind == "bert"
        else {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    )
    torch.manual_seed(3)
    config = config_class(
        vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, initializer_range=0.1, **SIZES, **ids, **more
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # zeros would hide a bias that is left out
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model


def write_terms(folder: Path, terms: Sequence[str] = TERMS) -> Path:
    file = folder / "terms.txt"
    file.write_text("".join(f"{term}\n" for term in terms))
    return file


def extended(source: Path, folder: Path, terms: Path | None, **options: Any) -> Path:
    """The tokenizer folder that prepare makes of the source's."""
    node = {"name": "load", "path": str(source), **({"add": str(terms)} if terms else {}), **options}
    tokenizer, names = TOKENIZERS.build(TOKENIZERS.parse(node)).build(iter([]))
    save_tokenizer(tokenizer, names, folder)
    return folder


def prepare_data(folder: Path, tokenizer: dict[str, Any]) -> Path:
    """Streams `domain` and `old`, with a tokenizer."""
    write_jsonl(folder / "texts" / "domain.jsonl", domain_texts(200))
    write_jsonl(folder / "texts" / "old.jsonl", old_texts(100))
    node = {
        "output": str(folder / "data"),
        "validation_fraction": 0.1,
        "tokenizer": tokenizer,
        "streams": {
            name: {"source": {"name": "jsonl", "paths": [str(folder / "texts" / f"{name}.jsonl")]}}
            for name in ("domain", "old")
        },
    }
    file = folder / "prepare.yaml"
    file.write_text(yaml.safe_dump(node, sort_keys=False))
    prepare(load_prepare_config(file), workers=1)
    return folder / "data"


def run_file(folder: Path, source: str | dict[str, Any], tokenizer: Path, **changes: Any) -> Path:
    """A run file that goes on from the source, over streams beside the tokenizer; the run is FOLDER/run."""
    node: dict[str, Any] = {
        "name": "run",
        "runs": str(folder),
        "from": source,
        "model": "from",
        "data": {
            "tokenizer": str(tokenizer),
            "streams": {
                "domain": {"path": str(tokenizer.parent / "domain"), "weight": 3},
                "old": {"path": str(tokenizer.parent / "old"), "weight": 1},
            },
            "num_workers": 0,
            "lanes": 4,
        },
        "phases": [
            {
                "name": "domain",
                "tokens": 20 * 512,
                "max_seq_len": 64,
                "global_batch_size": 8,
                "lr": 2e-2,
                "warmup": 2048,
            }
        ],
        "checkpoint": {"interval": 1024, "keep": 100},
        "evaluation": {"max_rows": 8},
        "trainer": {"log_interval": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump({**node, **changes}, sort_keys=False))
    return file


@torch.no_grad()
def check_export(export: Path) -> None:
    """transformers loads it with its tokenizer; text with terms comes back, and logits are ours."""
    hf, tokenizer = AutoModelForMaskedLM.from_pretrained(export).eval(), AutoTokenizer.from_pretrained(export)
    assert hf.config.vocab_size % 64 == 0
    assert len(tokenizer) <= hf.config.vocab_size
    for text in domain_texts(3):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert sum(token in TERMS for token in tokens) == 16
    ids = tokenizer(domain_texts(1)[0], return_tensors="pt").input_ids
    ours = from_hf(export).eval()
    found = ours(ids[0], torch.tensor([0, ids.shape[1]], dtype=torch.int32), ids.shape[1]).logits
    torch.testing.assert_close(found, hf(ids).logits[0], atol=1e-4, rtol=0)
