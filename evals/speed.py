"""Encoders to be timed, of the same weights: ours on packed batches, transformers' on padded ones."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from evals.embedding_models import load_encoder
from evals.loading import Runtime


class Encoder:
    """One runtime of a model. Its weights are on the device during `turn` only, so that each has the memory alone."""

    def __init__(
        self, folder: Path, runtime: Runtime, device: torch.device, dtype: torch.dtype, attention: str | None
    ) -> None:
        """attention: transformers' attn_implementation; None: its own choice."""
        options = {} if runtime == "flexbert" or attention is None else {"attn_implementation": attention}
        model, self.runtime = load_encoder(folder, runtime, **options)
        self.model: Any = model.to(dtype).eval()
        self.device = device
        self.padding_id = int(getattr(self.model.config, "pad_token_id", 0) or 0)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def attention(self) -> str:
        """What computes it, as far as the runtime says."""
        if self.runtime == "transformers":
            return str(self.model.config._attn_implementation)
        return str(getattr(self.model.config.attention, "backend", "auto"))

    def inputs(self, documents: Sequence[Tensor]) -> dict[str, Any]:
        """Of one batch, on the device. documents: ids of each."""
        if self.runtime == "flexbert":
            lengths = [len(ids) for ids in documents]
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            return {
                "input_ids": torch.cat(list(documents)).to(self.device),
                "cu_seqlens": bounds.to(self.device),
                "max_seqlen": max(lengths),
            }
        ids = pad_sequence(list(documents), batch_first=True, padding_value=self.padding_id)
        mask = pad_sequence([torch.ones_like(each) for each in documents], batch_first=True)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    @torch.inference_mode()
    def seconds(self, inputs: dict[str, Any]) -> float:
        """That one forward takes, once it is done."""
        self.wait()
        start = time.perf_counter()
        self.model(**inputs)
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> "Encoder":
        self.model.to(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest size found to fit, by doubling and then by halving the gap to an eighth; 0: not even one does."""
    good, bad = 0, most + 1
    size = 1
    while size < bad:
        if not fits(size):
            bad = size
            break
        good, size = size, min(2 * size, most) if size < most else bad
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def fits_on_gpu(encoder: Encoder, document: Tensor) -> Callable[[int], bool]:
    """Whether so many of this document go through the encoder at once."""

    def fits(size: int) -> bool:
        try:
            encoder.seconds(encoder.inputs([document] * size))
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return fits
