"""Retrieval by a vector for each token (ColBERT, arXiv 2004.12832), by PyLate: exact MaxSim, and a PLAID index.

Q queries, D documents, S tokens of a query, T tokens of a document, H width of a vector.
"""

import heapq
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evals.classifiers import load_tokenizer, longest
from evals.finetuning import autocast
from evals.ranking import Ranking
from evals.sentence_modules import is_sentence_model, quiet, transformer
from flexbert_core.schema import ConfigError

EXACT_DOCUMENTS = 50_000
"""Documents of a corpus that is scored exactly as a whole; of a larger one the CANDIDATES that PLAID finds are."""
CANDIDATES = 1000
_AT_ONCE = 2**26  # similarities held in memory: 256 MB


class MultiVector:
    """A checkpoint that embeds each token."""

    columns: Sequence[str] = ("exact", "plaid")

    def __init__(
        self,
        folder: Path,
        dimensions: int | None,
        lengths: tuple[int | None, int | None],
        device: torch.device,
        precision: str,
        seed: int,
    ) -> None:
        """dimensions: of a token's vector; None: 128, or as a folder of PyLate's says. lengths: tokens of queries and
        documents; None: 32 and 180, or as the folder says. seed: of PLAID's centroids, and of the projection and the
        marks [Q] and [D], which PyLate adds to a plain checkpoint."""
        from pylate import models

        self.device, self.precision, self.seed = device, precision, seed
        most = longest(folder, load_tokenizer(folder))
        query_length, document_length = (None if each is None else min(each, most) for each in lengths)
        options: dict[str, Any] = {"query_length": query_length, "document_length": document_length}
        options |= {"embedding_size": dimensions, "device": str(device)}
        if is_sentence_model(folder):
            options |= {"model_name_or_path": str(folder), "local_files_only": True, "trust_remote_code": True}
        else:
            options["modules"] = [transformer(folder, None)]
        try:
            with quiet(), torch.random.fork_rng(devices=_devices(device)):
                torch.manual_seed(seed)
                self.model: Any = models.ColBERT(**options)
        except NotImplementedError as error:
            raise ConfigError(f"{folder}: PyLate cannot use it: {' '.join(str(error).split())}") from None
        # What it falls back to may be more than the model takes.
        self.model.query_length = min(self.model.query_length, most)
        self.model.document_length = min(self.model.document_length, most)
        self.exact_over = "the corpus"

    def facts(self) -> dict[str, Any]:
        """What a result says of how it was had."""
        lengths = {"query_length": self.model.query_length, "document_length": self.model.document_length}
        return {**lengths, "dimensions": self.model[-1].out_features, "exact_over": self.exact_over}

    def embed(self, texts: Sequence[str], is_query: bool, batch_size: int) -> list[Tensor]:
        """(S or T, H) float32 on the CPU for each text, vectors of length 1."""
        self.model.eval()
        with torch.no_grad(), autocast(self.device, self.precision):
            found = self.model.encode(list(texts), batch_size=batch_size, is_query=is_query, show_progress_bar=False)
        return [torch.as_tensor(each).float() for each in found]

    def rankings(
        self, documents: Mapping[str, str], queries: Mapping[str, str], count: int, batch_size: int
    ) -> dict[str, Ranking]:
        """The best documents for each query: by exact scores, and as PLAID finds and scores them."""
        names = list(documents)
        of_documents = dict(zip(names, self.embed(list(documents.values()), False, batch_size), strict=True))
        of_queries = self.embed(list(queries.values()), True, batch_size)
        small = len(names) <= EXACT_DOCUMENTS
        found = plaid(of_queries, of_documents, count if small else max(count, CANDIDATES), self.device, self.seed)
        if small:
            exact = max_sim(of_queries, of_documents, count, self.device)
        else:
            self.exact_over = f"{CANDIDATES} documents found by PLAID"
            exact = [
                max_sim([query], {name: of_documents[name] for name in hits}, count, self.device)[0]
                for query, hits in zip(of_queries, found, strict=True)
            ]
        best = [dict(sorted(row.items(), key=lambda hit: -hit[1])[:count]) for row in found]
        return {"exact": dict(zip(queries, exact, strict=True)), "plaid": dict(zip(queries, best, strict=True))}

    def features(self, texts: Sequence[str], is_query: bool) -> dict[str, Tensor]:
        """Tokenized and padded to the longest, on the device, for `loss`."""
        tokens = self.model.tokenize(list(texts), is_query=is_query)
        return {name: tensor.to(self.device) for name, tensor in tokens.items()}

    def loss(self, temperature: float, microbatch: int | None) -> nn.Module:
        """Cross entropy of the positive's score among those of all documents of the batch."""
        from pylate import losses

        if microbatch is None:
            return losses.Contrastive(self.model, temperature=temperature)
        return losses.CachedContrastive(self.model, temperature=temperature, mini_batch_size=microbatch)


def max_sim(
    queries: Sequence[Tensor], documents: Mapping[str, Tensor], count: int, device: torch.device
) -> list[dict[str, float]]:
    """For each query, (S, H), the best documents, (T, H): the sum over its tokens of the largest product with a token
    of the document. Documents of one length are scored together, so that nothing is padded."""
    from pylate.scores import colbert_scores

    padded = nn.utils.rnn.pad_sequence(list(queries), batch_first=True).to(device)  # zeros add nothing to the sum
    by_length: dict[int, list[str]] = defaultdict(list)
    for name, tensor in documents.items():
        by_length[len(tensor)].append(name)
    best: list[list[tuple[float, str]]] = [[] for _ in queries]
    for length, names in by_length.items():
        step = max(1, _AT_ONCE // (padded.shape[0] * padded.shape[1] * length))
        for first in range(0, len(names), step):
            part = names[first : first + step]
            stacked = torch.stack([documents[name] for name in part]).to(device)
            scores = colbert_scores(padded, stacked, backend="torch").cpu()
            values, places = scores.topk(min(count, len(part)), dim=1)
            for row, (of_row, at) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
                found = [(value, part[place]) for value, place in zip(of_row, at, strict=True)]
                best[row] = heapq.nlargest(count, best[row] + found)
    return [{name: value for value, name in row} for row in best]


def plaid(
    queries: Sequence[Tensor], documents: Mapping[str, Tensor], count: int, device: torch.device, seed: int
) -> list[dict[str, float]]:
    """The same by an index that keeps centroids and residuals of 4 bits (PLAID, arXiv 2205.09707)."""
    from pylate import indexes

    # The documents that centroids are drawn from, it draws from the global generator, before it seeds that.
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=_devices(device)):
        torch.manual_seed(seed)
        index: Any = indexes.PLAID(
            index_folder=folder,
            index_name="index",
            override=True,
            nbits=4,
            seed=seed % 2**31,
            use_triton=False,  # its kernels vary from run to run
            show_progress=False,
            device=str(device),
        )
        index.add_documents(list(documents), list(documents.values()))
        found = index(list(queries), k=min(count, len(documents)))
    return [{str(hit["id"]): float(hit["score"]) for hit in hits} for hits in found]


def _devices(device: torch.device) -> list[torch.device]:
    """Whose generators are put back beside the CPU's."""
    return [device] if device.type == "cuda" else []
