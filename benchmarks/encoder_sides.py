"""The two sides of benchmarks.encoder: models of the same weights, batches of the same tokens, a step of each."""

import json
import lzma
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flexbert
from flexbert.kernels.cpu import lacks, product

SHARED = Path("../shared/data")
MASKED, IGNORE = 0.3, -100
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def modernbert_peer() -> Any:
    """A 10-layer, 384-wide ModernBERT with the published vocabulary, random weights."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=50368,
        hidden_size=384,
        num_hidden_layers=10,
        num_attention_heads=6,
        intermediate_size=576,
        sparse_prediction=True,
        reference_compile=False,
        attn_implementation="sdpa",
    )
    return ModernBertForMaskedLM(config)


def bert_peer() -> Any:
    """BERT base, random weights, no dropout on either side."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(attn_implementation="sdpa", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForMaskedLM(config)


def ours_of(peer: Any) -> Any:
    """Our model with the peer's weights."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return flexbert.from_hf(folder)


def document_lengths(longest: int, count: int) -> list[int]:
    """Tokens of `count` documents, cut at `longest`, in a fixed random order: even quantiles, that few may stand for
    all, of as many each of abstracts (SciFact, CISI), Python functions (CoSQA), PEPs and Python modules; without
    ../shared of the machine's Python modules and docstrings."""
    from tokenizers import Tokenizer

    rng = np.random.default_rng(0)
    stdlib = sorted(Path(lzma.__file__).parent.rglob("*.py"))
    sources = [[file.read_text("utf8", "replace") for file in rng.permutation(np.array(stdlib, object))[:200]]]
    if SHARED.is_dir():
        tokenizer = Tokenizer.from_file(str(SHARED / "tokenizers/gpt-neox-olmo/tokenizer.json"))
        for name in ("scifact", "cisi", "cosqa"):
            lines = (SHARED / "beir" / name / "corpus.jsonl").read_text("utf8").splitlines()
            documents = [f"{line['title']} {line['text']}" for line in map(json.loads, lines)]
            sources.append([documents[number] for number in rng.permutation(len(documents))[:200]])
        with lzma.open(SHARED / "prose" / "peps.jsonl.xz", "rt", encoding="utf8") as file:
            peps = [json.loads(line)["text"] for line in file]
        sources.append([peps[number] for number in rng.permutation(len(peps))[:200]])
        lengths = [len(tokenizer.encode(text).ids) for texts in sources for text in texts]
    else:
        import pydoc_data.topics

        sources.append([str(text) for text in list(pydoc_data.topics.topics.values())[:200]])
        lengths = [len(text) // 3 for texts in sources for text in texts]
    cut = np.sort(np.clip(np.array(lengths) + 2, 3, longest))
    return rng.permutation(cut[(np.arange(count) * 2 + 1) * len(cut) // (2 * count)]).tolist()


class Batch:
    """The same documents for both sides: packed for ours, padded to the longest for the peer."""

    def __init__(self, lengths: list[int], vocab_size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        documents = [rng.integers(5, vocab_size, length) for length in lengths]
        labels = [
            np.where(rng.random(length) < MASKED, tokens, IGNORE)
            for length, tokens in zip(lengths, documents, strict=True)
        ]
        self.tokens = sum(lengths)
        bounds = np.cumsum([0, *lengths]).astype(np.int32)
        self.packed = {
            "input_ids": torch.from_numpy(np.concatenate(documents)),
            "cu_seqlens": torch.from_numpy(bounds),
            "max_seqlen": max(lengths),
        }
        self.labels = torch.from_numpy(np.concatenate(labels))
        shape = (len(lengths), max(lengths))
        ids, mask, targets = np.zeros(shape, int), np.zeros(shape, int), np.full(shape, IGNORE)
        for row, length in enumerate(lengths):
            ids[row, :length], mask[row, :length], targets[row, :length] = documents[row], 1, labels[row]
        self.padded = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(targets),
        }


class Side:
    """One of the two models with what a step and an inference are to it."""

    def __init__(self, model: Any, dtype: torch.dtype | None, training: Callable[..., float], inference: Any) -> None:
        self.model, self.dtype = model, dtype
        self.training, self.inference = training, inference
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def _autocast(self) -> Any:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)

    def step(self, batch: Batch) -> float:
        """The loss of a training step: mean over the batch's masked tokens."""
        self.model.train()
        total = self.training(self.model, batch, self._autocast)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    @torch.inference_mode()
    def infer(self, batch: Batch) -> Tensor:
        """Hidden states of the batch's real tokens (T, D), document by document."""
        self.model.eval()
        with self._autocast():
            return self.inference(self.model, batch)


def our_training(model: Any, batch: Batch, autocast: Callable[[], Any]) -> float:
    return _back(model, {**batch.packed, "labels": batch.labels}, autocast)


def peer_training(model: Any, batch: Batch, autocast: Callable[[], Any]) -> float:
    return _back(model, batch.padded, autocast)


def _back(model: Any, inputs: dict[str, Any], autocast: Callable[[], Any]) -> float:
    with autocast():
        loss = model(**inputs).loss
    loss.backward()
    return float(loss)


def our_inference(model: Any, batch: Batch) -> Tensor:
    return model.encoder(**batch.packed)


def peer_inference(model: Any, batch: Batch) -> Tensor:
    inputs = {key: batch.padded[key] for key in ("input_ids", "attention_mask")}
    return model.base_model(**inputs).last_hidden_state[batch.padded["attention_mask"].bool()]


WHO = ("ours", "peer", "peer_kept")
MODELS: dict[str, Callable[[], Any]] = {"modernbert": modernbert_peer, "bert-base": bert_peer}
CASES: dict[str, dict[str, Callable[[], Batch]]] = {
    "modernbert": {
        "4 x 1024": lambda: Batch([1024] * 4, 50368, 0),
        "1 x 8192": lambda: Batch([8192], 50368, 0),
        "real lengths to 1024": lambda: Batch(document_lengths(1024, 16), 50368, 0),
    },
    "bert-base": {
        "4 x 512": lambda: Batch([512] * 4, 30522, 0),
        "real lengths to 512": lambda: Batch(document_lengths(512, 8), 30522, 0),
    },
}


def gemm_call(dtype: torch.dtype | None, size: int = 2048) -> tuple[Callable[[], Any], float]:
    """A square product by the faster library, the machine's best case, and its FLOPs."""
    left, right = (torch.randn(size, size).to(dtype or torch.float32) for _ in range(2))
    if dtype is None or lacks(dtype, "cpu"):
        return lambda: product(left, right), 2.0 * size**3
    return lambda: left @ right, 2.0 * size**3
