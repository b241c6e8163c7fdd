"""Retrieval by one vector for each text, by sentence-transformers: cosine similarity, the whole corpus searched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.classifiers import load_tokenizer, longest
from evals.finetuning import autocast
from evals.ranking import Ranking
from evals.sentence_modules import is_sentence_model, transformer
from flexbert_core.schema import ConfigError

Pooling = Literal["mean", "cls"]


class SingleVector:
    """A checkpoint that embeds texts."""

    columns: Sequence[str] = ("",)
    """Its rankings' names in the table."""

    def __init__(
        self,
        folder: Path,
        pooling: Pooling | None,
        max_length: int | None,
        prefixes: tuple[str | None, str | None],
        device: torch.device,
        precision: str,
    ) -> None:
        """pooling: in place of the folder's; None: as the folder says (its modules.json), else the mean. prefixes: of
        queries and documents; None: the folder's own prompts.

        Raises ConfigError for a folder that cannot be loaded, or that has no pooling to replace; RunError for one whose
        weights are not all there.
        """
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling as PoolingModule

        self.device, self.precision = device, precision
        if is_sentence_model(folder):
            try:
                model = SentenceTransformer(
                    str(folder), device=str(device), local_files_only=True, trust_remote_code=True
                )
            except Exception as error:  # the loaders raise bare Exception among others
                said = (str(error) or type(error).__name__).splitlines()[0]
                raise ConfigError(f"{folder}: sentence-transformers cannot load it: {said}") from None
            if max_length is not None:
                model.max_seq_length = min(max_length, longest(folder, load_tokenizer(folder)))
            if pooling is not None:  # its prompts, its length and its further modules stay
                names = [name for name, module in model.named_children() if isinstance(module, PoolingModule)]
                if len(names) != 1:
                    raise ConfigError(f"{folder}: pooling: its modules.json has {len(names)} poolings: leave it out")
                old: Any = model.get_submodule(names[0])
                width = old.word_embedding_dimension
                new = PoolingModule(width, pooling, include_prompt=old.include_prompt)
                model.set_submodule(names[0], new)
        else:
            first = transformer(folder, max_length)
            pool = PoolingModule(first.get_word_embedding_dimension(), pooling or "mean")
            model = SentenceTransformer(modules=[first, pool], device=str(device))
        self.model: Any = model
        own = (model.prompts.get("query"), model.prompts.get("document"))
        self.prefixes = tuple(
            given if given is not None else said or "" for given, said in zip(prefixes, own, strict=True)
        )

    def facts(self) -> dict[str, Any]:
        """What a result says of how it was had."""
        return {"max_length": self.model.max_seq_length, "dimensions": self.model.get_sentence_embedding_dimension()}

    def prefixed(self, texts: Sequence[str], is_query: bool) -> list[str]:
        prefix = self.prefixes[0 if is_query else 1]
        return [prefix + text for text in texts]

    def embed(self, texts: Sequence[str], is_query: bool, batch_size: int) -> Tensor:
        """(texts, D) float32 of length 1."""
        self.model.eval()
        with autocast(self.device, self.precision):
            found = self.model.encode(
                self.prefixed(texts, is_query),
                prompt="",  # else the folder's default prompt would stand before the prefix
                batch_size=batch_size,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        return F.normalize(found.float(), dim=1)

    def rankings(
        self, documents: Mapping[str, str], queries: Mapping[str, str], count: int, batch_size: int
    ) -> dict[str, Ranking]:
        """The best documents of the corpus for each query."""
        from sentence_transformers.util import dot_score, semantic_search

        names = list(documents)
        found = semantic_search(
            self.embed(list(queries.values()), True, batch_size),
            self.embed(list(documents.values()), False, batch_size),
            corpus_chunk_size=50_000,
            top_k=min(count, len(names)),
            score_function=dot_score,
        )
        ranking = {
            query: {names[int(hit["corpus_id"])]: float(hit["score"]) for hit in hits}
            for query, hits in zip(queries, found, strict=True)
        }
        return {"": ranking}

    def features(self, texts: Sequence[str], is_query: bool) -> dict[str, Tensor]:
        """Tokenized and padded to the longest, on the device, for `loss`."""
        tokens = self.model.tokenize(self.prefixed(texts, is_query))
        return {name: tensor.to(self.device) for name, tensor in tokens.items()}

    def loss(self, temperature: float, microbatch: int | None) -> nn.Module:
        """InfoNCE over the batch's positives and negatives; its defaults are query to documents, cosine."""
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

        if microbatch is None:
            return MultipleNegativesRankingLoss(self.model, scale=1 / temperature)
        return CachedMultipleNegativesRankingLoss(self.model, scale=1 / temperature, mini_batch_size=microbatch)
