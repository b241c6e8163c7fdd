"""BM25 by bm25s: a baseline without a model, and a source of hard negatives."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

_WORD = re.compile(r"[^\W_]+")
# Anserini's defaults, which BEIR's and Pyserini's tables use; the variant is Lucene's (Kamphuis et al. 2020).
_K1, _B = 0.9, 0.4


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case; no stemming, no stop words."""
    return _WORD.findall(text.lower())


class Bm25:
    """An index of documents."""

    def __init__(self, documents: Mapping[str, str]) -> None:
        import bm25s

        self._names = list(documents)
        self._index = bm25s.BM25(k1=_K1, b=_B, method="lucene")
        self._index.index([words(text) for text in documents.values()], show_progress=False)

    def search(self, texts: Sequence[str], count: int) -> list[dict[str, float]]:
        """For each text the best documents that share a word with it, with their scores, best first."""
        found = []
        for text in texts:
            known = [word for word in words(text) if word in self._index.vocab_dict]
            if not known:
                found.append({})
                continue
            scores = self._index.get_scores(known)
            best = np.argsort(-scores, kind="stable")[:count]
            found.append({self._names[row]: float(scores[row]) for row in best if scores[row] > 0})
        return found
