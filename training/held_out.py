"""Held-out loss and masked accuracy, beside the best guess that looks at nothing: the most frequent token."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ranks
from data.feed.batches import Batch
from data.feed.held_out import HeldOutRows, check_masking
from data.feed.loader import open_streams, tokenizer_folder
from data.feed.masking import IGNORE, is_causal
from data.feed.mixture import stream_weights
from data.keyed import torch_seed
from data.store.shards import Stream
from flexbert import FlexBertForMaskedLM
from flexbert.encoder import require_causal
from flexbert.losses import TokenScores
from flexbert_core.schema import Component, ConfigError, RunError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.sections import HeldOutConfig
from recipe.slots import EVALUATIONS
from training.objectives.diffusion import shares

log = logging.getLogger(__name__)
_FIX = (
    "raise its masking.rate or max_rows, or prepare with a larger validation_fraction; text of "
    "special and unknown tokens only wants a tokenizer that knows it"
)


@EVALUATIONS.register("held_out")
class HeldOut:
    """Loss and masked accuracy on the validation split of every stream, on the same rows and masks every time. The
    section `evaluation` is the first of these; more of them measure at other lengths, rates or maskings."""

    class Config(HeldOutConfig, Component):
        pass

    def __init__(
        self, config: HeldOutConfig, *, run: RunConfig, plan: PhasePlan, streams: Sequence[Stream], folder: Path
    ) -> None:
        """streams: those of training. Raises ConfigError for a missing split, for a masking that refuses the
        tokenizer, and when no token would be masked."""
        data, train_streams = run.data, streams
        if is_causal(config.masking):
            require_causal(run.model)
        self.config = config
        self.place = f"evaluations: {config.name}" if isinstance(config, Component) else "evaluation"
        max_seq_len, seed = config.max_seq_len or plan.phases[0].max_seq_len, torch_seed(run.seed, "validation")
        self.tokenizer = partial(tokenizer_folder, data)
        self.streams = dict(zip(data.streams, open_streams(data, "validation"), strict=True))
        check_masking(list(self.streams.values()), config.masking, self.tokenizer, self.place)
        self.rows = {
            name: HeldOutRows(stream, max_seq_len, config.max_rows, seed) for name, stream in self.streams.items()
        }
        self.fingerprints = {name: stream.fingerprint for name, stream in self.streams.items()}
        counts = [np.load(BytesIO(stream.files.read("token_counts.npy"))).astype(float) for stream in train_streams]
        tokens = {name: stream.manifest.tokens for name, stream in zip(self.streams, train_streams, strict=True)}
        weights = stream_weights(data.streams, tokens)
        mixture = sum(count / count.sum() * weights[name] for name, count in zip(self.streams, counts, strict=True))
        self.frequent = {name: int(np.argmax(count)) for name, count in zip(self.streams, counts, strict=True)}
        self.frequent_overall = int(np.argmax(mixture))
        self._unmasked = set[str]()
        # Now, and not after the first billion of tokens; the first batch tells, but for odd configs.
        if not any(batch["masked"] for name in self.streams for batch in self._batches(name, 0, 1)):
            raise ConfigError(f"{self.place}: no token of the held-out text would be masked: {_FIX}")

    def _batches(self, name: str, rank: int, world_size: int) -> Iterator[Batch]:
        return self.rows[name].batches(self.config.batch_size, self.config.masking, self.tokenizer, rank, world_size)

    @torch.no_grad()
    def run(self, model: FlexBertForMaskedLM, step: int) -> dict[str, Any]:
        """{"loss": nats, "masked_accuracy", "unigram_accuracy", "masked_tokens", "streams": {name: the same four}}.

        With masking `diffusion` also "nll_bound", an upper bound on the negative log-likelihood in nats a token
        (training/objectives/diffusion.py), of one draw of rates and masks: over all tokens that could be masked.
        Means over masked tokens; None for a stream without any, which is said. Raises RunError when there is none at
        all. unigram_accuracy: of always answering the training data's most frequent token (of the
        stream, and of the mixture for the overall figure), on the same masked tokens. A collective over ranks.
        """
        device = next(model.parameters()).device
        streams, total = {}, torch.zeros(6, dtype=torch.float64)
        for name in self.streams:
            # loss, correct, masked, unigram hits of stream and of mixture, weighed loss, tokens that it is over
            sums = torch.zeros(7, dtype=torch.float64)
            for batch in self._batches(name, ranks.rank(), ranks.world_size()):
                labels = batch["labels"][batch["labels"] != IGNORE]
                scores = TokenScores.empty(labels.to(device)) if "row_rates" in batch else None
                loss, correct, masked = model.evaluate(
                    batch["input_ids"].to(device),
                    batch["cu_seqlens"].to(device),
                    batch["max_seqlen"],
                    batch["labels"].to(device),
                    is_causal(self.config.masking),
                    scores,
                )
                hits = [(labels == token).sum() for token in (self.frequent[name], self.frequent_overall)]
                values = (loss, correct, masked, *hits, *_weighed(batch, scores))
                sums += torch.tensor([float(value) for value in values], dtype=torch.float64)
            sums = ranks.over_ranks(sums)
            streams[name] = _means(sums[[0, 1, 2, 3, 5, 6]])
            total += sums[[0, 1, 2, 4, 5, 6]]
        self._say_unmasked([name for name, means in streams.items() if not means["masked_tokens"]])
        if not total[2]:
            raise RunError(f"{self.place}: no token of the held-out text is masked, so there is no loss: {_FIX}")
        return {**_means(total), "streams": streams}

    def _say_unmasked(self, names: list[str]) -> None:
        """Once for each stream."""
        for name in names:
            if name not in self._unmasked and ranks.rank() == 0:
                log.warning("%s: no token of stream %s is masked, so it has no loss: %s", self.place, name, _FIX)
        self._unmasked.update(names)


def _means(sums: torch.Tensor) -> dict[str, Any]:
    loss, correct, masked, hits, weighed, selectable = sums.tolist()
    means = zip(("loss", "masked_accuracy", "unigram_accuracy"), (loss, correct, hits), strict=True)
    bound = {"nll_bound": weighed / selectable} if selectable else {}
    return {
        **{name: total / masked if masked else None for name, total in means},
        "masked_tokens": int(masked),
        **bound,
    }


def _weighed(batch: Batch, scores: TokenScores | None) -> tuple[float, int]:
    """The sum of 1/rate times each masked token's loss, and the tokens that could have been masked; nothing where rows
    draw no rates."""
    if scores is None:
        return 0.0, 0
    index = (batch["labels"] != IGNORE).nonzero().squeeze(1)
    return float(scores.losses.cpu().double() @ shares(batch, index).double()), sum(batch["selectable"])
