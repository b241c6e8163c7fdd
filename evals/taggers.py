"""Models of a row of scores for each token: ours on packed batches, transformers' on padded ones.

T tokens of all rows of a batch, one row after the other, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evals.classifiers import Encoded, PackedClassifier, PaddedClassifier
from evals.loading import Runtime, load_transformers, require_encoder, runtime_of
from flexbert import build, from_hf
from flexbert.dropout import TokenKeys


class PackedTagger(PackedClassifier):
    """Ours: `logits` gives (T, C)."""

    def _head_keys(self, keys: TokenKeys, rows: int) -> TokenKeys:
        """A line for each token."""
        return keys


class PaddedTagger(PaddedClassifier):
    """Any of transformers': `logits` gives (T, C), without those of padding."""

    def logits(self, batch: Sequence[Encoded], dropout_seed: int | None, first_row: int = 0) -> Tensor:
        padded = super().logits(batch, dropout_seed, first_row)
        return torch.cat([row[: len(each.input_ids)] for row, each in zip(padded, batch, strict=True)])


def load_tagger(
    folder: Path,
    num_labels: int,
    seed: int,
    device: torch.device,
    runtime: Runtime | None = None,
) -> PackedTagger | PaddedTagger:
    """A token classifier with the folder's encoder and a fresh last layer, drawn by the seed.

    Raises ConfigError for a folder that cannot be loaded, RunError for one whose weights are not all there.
    """
    if runtime_of(folder, runtime) == "flexbert":
        encoder = from_hf(folder, "encoder", trust_remote_code=True)
        config = encoder.config.model_validate({**encoder.config.to_dict(), "head": "tokens", "init": "default"})
        model = build(config, "tokens", num_labels=num_labels, seed=seed)
        model.encoder.load_state_dict(encoder.state_dict())
        return PackedTagger(model, device)
    options = {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    padded, missing = load_transformers(folder, "AutoModelForTokenClassification", " for tagging", seed, **options)
    require_encoder(folder, padded, missing)
    return PaddedTagger(padded, "fresh weights", folder, device)
