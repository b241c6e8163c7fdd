"""Models that restore masked tokens: ours on packed texts for architectures that it knows, transformers' else.

B texts at once, D hidden, K tokens to choose from.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.finetuning import autocast
from flexbert import from_hf
from flexbert.hf.mappings import MAPPINGS
from flexbert_core.schema import ConfigError, RunError


class MaskedReader:
    """A folder's model with its masked-token head."""

    def __init__(self, folder: Path, device: torch.device, precision: str) -> None:
        """Raises ConfigError for a folder that neither can load, which has no such head, for one."""
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        self.runtime: Literal["flexbert", "transformers"] = (
            "flexbert" if model_type in (*MAPPINGS, "flexbert") else "transformers"
        )
        self._device, self._precision = device, precision
        model: Any = from_hf(folder, trust_remote_code=True) if self.runtime == "flexbert" else _of_transformers(folder)
        self._model = model.eval().to(device)

    @torch.no_grad()
    def choose(self, rows: Sequence[Sequence[int]], places: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """For each text the number, among `tokens`, of the likeliest one at its place. All are of one length."""
        among = torch.tensor(tokens, device=self._device)
        ids = torch.tensor(rows, device=self._device)
        with autocast(self._device, self._precision):
            logits = (
                self._packed(ids, places, among) if self.runtime == "flexbert" else self._padded(ids, places, among)
            )
        if not bool(logits.isfinite().all()):
            raise RunError("the model's scores are no numbers")
        return logits.float().argmax(1).tolist()

    def _packed(self, ids: Tensor, places: Sequence[int], among: Tensor) -> Tensor:
        """(B, K)."""
        texts, length = ids.shape
        bounds = torch.arange(texts + 1, dtype=torch.int32, device=self._device) * length
        wanted = torch.tensor([row * length + place for row, place in enumerate(places)], device=self._device)
        hidden_states = self._model.encoder(ids.flatten(), bounds, length, None, wanted)
        weight, bias = self._model.head.decoder(self._model.encoder.token_table)
        return F.linear(self._model.head(hidden_states), weight[among], None if bias is None else bias[among])

    def _padded(self, ids: Tensor, places: Sequence[int], among: Tensor) -> Tensor:
        """(B, K)."""
        logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits[torch.arange(len(ids)), torch.tensor(places)][:, among]


def _of_transformers(folder: Path) -> Any:
    from transformers import AutoModelForMaskedLM

    try:
        model, about = AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=True, output_loading_info=True
        )
    except Exception as error:  # the loaders raise bare Exception among others
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{folder}: transformers cannot load it with a masked-token head: {said}") from None
    if missing := about["missing_keys"]:
        raise ConfigError(f"{folder}: has no masked-token head, or not all of it: {missing[0]} is not in its weights")
    return model
