"""Which of some tokens a model puts in a masked place.

B texts at once, D hidden, K tokens to choose from.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.finetuning import autocast
from evals.masked_models import load_masked
from flexbert_core.schema import RunError


class MaskedReader:
    """A folder's model with its masked-token head."""

    def __init__(self, folder: Path, device: torch.device, precision: str) -> None:
        """Raises as `load_masked` does."""
        model, self.runtime = load_masked(folder, None)
        self._device, self._precision = device, precision
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
