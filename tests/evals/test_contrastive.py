"""What a model is trained on for retrieval."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evals.beir import RetrievalSet, read_beir
from evals.bm25 import Bm25
from evals.contrastive import Tune, drawn, fine_tune, mined
from evals.dense import SingleVector
from evals.ranking import Ranking
from flexbert_core.schema import Component, ConfigError
from recipe.slots import OPTIMIZERS
from tests.helpers.registries import registries_as_before
from tests.helpers.sentences import write_beir, write_model


class Found:
    """A model that finds documents in one order, whatever is asked."""

    columns = ("",)

    def rankings(self, documents: Any, queries: Any, count: int, batch_size: int) -> dict[str, Ranking]:
        names = sorted(documents)[:count]
        return {"": {query: {name: -float(place) for place, name in enumerate(names)} for query in queries}}


ENCODER: Any = Found()


@pytest.fixture
def data(tmp_path: Path) -> RetrievalSet:
    return read_beir(write_beir(tmp_path / "set"), ["test", "train"])


@pytest.mark.parametrize("negatives", ["bm25", "model"])
def test_each_relevant_document_is_an_example_and_no_negative_is_relevant(data: RetrievalSet, negatives: Any) -> None:
    tune = Tune(negatives=negatives, num_negatives=5)
    examples = mined(data, tune, ENCODER, Bm25(data.documents), 8, seed=0)
    names = {text: name for name, text in data.documents.items()}
    judged = data.splits["train"]
    queries = {text: query for query, text in judged.queries.items()}
    pairs = [(queries[each.query], names[each.positive]) for each in examples]
    assert sorted(pairs) == sorted((query, name) for query, row in judged.relevance.items() for name in row)
    for each in examples:
        others = [names[text] for text in each.negatives]
        assert len(others) == 5
        assert not set(others) & judged.relevance[queries[each.query]].keys()
    assert mined(data, tune, ENCODER, Bm25(data.documents), 8, seed=0) == examples
    assert mined(data, tune, ENCODER, Bm25(data.documents), 8, seed=1) != examples


def test_hard_negatives_are_those_that_were_found(data: RetrievalSet) -> None:
    bm25 = Bm25(data.documents)
    judged = data.splits["train"]
    hits = bm25.search(list(judged.queries.values()), 30)
    found = {
        query: {data.documents[name] for name in row} for query, row in zip(judged.queries.values(), hits, strict=True)
    }
    examples = mined(data, Tune(num_negatives=1), ENCODER, bm25, 8, seed=0)
    assert all(set(each.negatives) <= found[each.query] for each in examples)
    assert all(each.negatives == () for each in mined(data, Tune(negatives="none"), ENCODER, bm25, 8, seed=0))


def test_a_split_without_relevant_documents_is_refused(data: RetrievalSet) -> None:
    judged = data.splits["train"]
    none = {query: dict.fromkeys(row, 0) for query, row in judged.relevance.items()}
    empty = RetrievalSet(data.name, data.documents, {"train": type(judged)(judged.queries, none)}, "")
    with pytest.raises(ConfigError, match="set: train: 0 relevant documents: too few to train on"):
        mined(empty, Tune(), ENCODER, Bm25(data.documents), 8, seed=0)


def test_fewer_rows_are_drawn_by_the_seed(data: RetrievalSet) -> None:
    examples = mined(data, Tune(), ENCODER, Bm25(data.documents), 8, seed=0)
    few = drawn(examples, 7, seed=0)
    assert len(few) == 7
    assert all(each in examples for each in few)
    assert (drawn(examples, 7, seed=0), drawn(examples, 7, seed=1) != few) == (few, True)
    assert drawn(examples, None, seed=0) == examples == drawn(examples, 999, seed=0)


class Sgd(torch.optim.SGD):
    """Plain steps, which keep the norm of each gradient that they are given."""

    norms: list[float]

    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: torch.nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), lr=lr)

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = [each.grad for group in self.param_groups for each in group["params"] if each.grad is not None]
        self.norms.append(float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in gradients]))))
        super().step(closure)


@pytest.mark.parametrize("limit", [None, 0.01])
def test_gradients_are_clipped_as_told(data: RetrievalSet, tmp_path: Path, limit: float | None) -> None:
    folder = write_model(tmp_path / "model")
    encoder = SingleVector(folder, "mean", None, (None, None), torch.device("cpu"), "fp32")
    Sgd.norms = []
    with registries_as_before():
        OPTIMIZERS.register("sgd")(Sgd)
        settings: Any = {"optimizer": "sgd", "gradient_clip_norm": limit, "lr": 1e-3, "batch_size": 8}
        tune = Tune(**settings)
        fine_tune(encoder, mined(data, tune, ENCODER, Bm25(data.documents), 8, seed=0)[:24], tune, seed=0)
    assert len(Sgd.norms) >= 3
    if limit is None:
        assert min(Sgd.norms) > 0.01
    else:
        assert Sgd.norms == pytest.approx([limit] * len(Sgd.norms), rel=1e-3)
