"""Models of a row of scores for each token: ours on packed batches, transformers' on padded ones.

T tokens of all rows of a batch, one row after the other, C classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evals.classifiers import Encoded, PackedClassifier, PaddedClassifier
from flexbert import build, from_hf
from flexbert.dropout import TokenKeys
from flexbert.hf.mappings import MAPPINGS
from flexbert_core.schema import ConfigError, RunError


class PackedTagger(PackedClassifier):
    """Ours: `logits` gives (T, C)."""

    def _head_keys(self, seed: int, keys: TokenKeys, rows: int) -> TokenKeys:
        """A line for each token."""
        return keys


class PaddedTagger(PaddedClassifier):
    """Any of transformers': `logits` gives (T, C), without those of padding."""

    def logits(self, batch: Sequence[Encoded], dropout_seed: int | None) -> Tensor:
        padded = super().logits(batch, dropout_seed)
        return torch.cat([row[: len(each.input_ids)] for row, each in zip(padded, batch, strict=True)])


def load_tagger(
    folder: Path,
    num_labels: int,
    seed: int,
    device: torch.device,
    runtime: Literal["flexbert", "transformers"] | None = None,
) -> PackedTagger | PaddedTagger:
    """A token classifier with the folder's encoder and a fresh last layer, drawn by the seed.

    Raises ConfigError for a folder that cannot be loaded, RunError for one whose weights are not all there.
    """
    model_type = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    ours = model_type in (*MAPPINGS, "flexbert")
    if runtime == "flexbert" and not ours:
        raise ConfigError(f"runtime: flexbert does not know {model_type!r}: leave it out")
    if ours and runtime != "transformers":
        encoder = from_hf(folder, "encoder", trust_remote_code=True)
        config = encoder.config.model_validate({**encoder.config.to_dict(), "head": "tokens", "init": "default"})
        model = build(config, "tokens", num_labels=num_labels, seed=seed)
        model.encoder.load_state_dict(encoder.state_dict())
        return PackedTagger(model, device)  # pyright: ignore[reportArgumentType]
    return PaddedTagger(_padded_model(folder, num_labels, seed), folder, device)


def _padded_model(folder: Path, num_labels: int, seed: int) -> Any:
    from transformers import AutoModelForTokenClassification

    with torch.random.fork_rng(devices=[]):  # what is fresh is drawn from the global generator
        torch.manual_seed(seed)
        try:
            model, about = AutoModelForTokenClassification.from_pretrained(
                folder,
                num_labels=num_labels,
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=True,
                output_loading_info=True,
            )
        except Exception as error:  # the loaders raise bare Exception among others
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{folder}: transformers cannot load it for tagging: {said}") from None
    base = model.base_model_prefix + "."
    if missing := [name for name in about["missing_keys"] if name.startswith(base) and ".pooler." not in f".{name}"]:
        raise RunError(f"{folder}: {missing[0]} and {len(missing) - 1} more are not in its weights: it is not whole")
    return model
