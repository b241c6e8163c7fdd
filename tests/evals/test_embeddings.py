"""Embeddings of frozen encoders, what a linear model reads from them, and how they lie on the sphere."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from data.keyed import keyed_generator
from evals.embedding_models import EmbeddingConfig, EmbeddingModel
from evals.embeddings import alignment, mean_cosine, uniformity
from evals.interface import Model
from flexbert_core.schema import ConfigError
from tests.helpers.texts import SENTENCES, evaluation, model_of


def points(count: int, seed: int = 0) -> Any:
    return keyed_generator(seed, "points").normal(size=(count, 5)) * 3 + 0.5


def unit(vector: Any) -> list[float]:
    length = math.sqrt(sum(float(x) ** 2 for x in vector))
    return [float(x) / length for x in vector]


def test_formulas_are_those_of_a_plain_loop() -> None:
    """Wang & Isola 2020, in Python floats, which are float64."""
    first, second = points(13), points(13, 1)
    a, b = [unit(row) for row in first], [unit(row) for row in second]
    squares = [sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) for p, q in zip(a, b, strict=True)]
    assert alignment(first, second) == pytest.approx(sum(squares) / 13, rel=1e-12)
    assert alignment(first, second, alpha=1) == pytest.approx(sum(map(math.sqrt, squares)) / 13, rel=1e-12)
    kernel, cosines = [], []
    for i in range(13):
        for j in range(13):
            if i != j:
                kernel.append(math.exp(-2 * sum((x - y) ** 2 for x, y in zip(a[i], a[j], strict=True))))
                cosines.append(sum(x * y for x, y in zip(a[i], a[j], strict=True)))
    assert uniformity(first) == pytest.approx(math.log(sum(kernel) / len(kernel)), rel=1e-12)
    assert mean_cosine(first) == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)


def test_known_values() -> None:
    same = np.ones((4, 3))
    assert alignment(same, 2 * same) == 0.0
    assert uniformity(same) == 0.0
    assert mean_cosine(same) == pytest.approx(1.0)
    assert alignment(np.array([[1.0, 0]]), np.array([[0, 5.0]])) == pytest.approx(2.0)
    assert uniformity(np.eye(6)) == pytest.approx(-4.0)  # all at right angles: |x - y|^2 = 2, t = 2


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("runtime", [None, "transformers"])
def test_the_evaluation_embeds_as_transformers_does(
    runtime: str | None, pooling: str, model: Model, headless: Path, tmp_path: Path
) -> None:
    pairs = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[2], SENTENCES[3]), ("the cat", "the dogs")]
    (tmp_path / "pairs.tsv").write_text("".join(f"{one}\t{two}\n" for one, two in pairs))
    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder)
    theirs = AutoModel.from_pretrained(model.folder)

    def embed(text: str) -> Any:
        with torch.no_grad():
            states = theirs(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        return (states.mean(0) if pooling == "mean" else states[0]).double().numpy()

    first, second = (np.stack([embed(pair[side]) for pair in pairs]) for side in (0, 1))
    for each in (model, model_of(headless)):
        config = {"name": "embeddings", "data": str(tmp_path / "pairs.tsv"), "pooling": pooling, "runtime": runtime}
        scores = evaluation(**config, batch_tokens=30).run(each, tmp_path)
        assert scores["alignment"] == pytest.approx(alignment(first, second), abs=1e-5)
        assert scores["uniformity"] == pytest.approx(uniformity(np.concatenate((first, second))), abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("runtime", ["flexbert", "transformers"])
def test_embeddings_keep_their_length(runtime: Any, pooling: Any, model: Model) -> None:
    """Alignment looks at directions only, a linear probe does not."""
    config = EmbeddingConfig(name="embeddings", pooling=pooling, runtime=runtime, batch_tokens=30)
    found, cut = EmbeddingModel(model.folder, config).embed(SENTENCES)
    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder)
    theirs = AutoModel.from_pretrained(model.folder)
    for sentence, embedding in zip(SENTENCES, found, strict=True):
        with torch.no_grad():
            states = theirs(input_ids=torch.tensor([tokenizer(sentence)["input_ids"]])).last_hidden_state[0]
        expected = states.mean(0) if pooling == "mean" else states[0]
        torch.testing.assert_close(torch.from_numpy(embedding), expected, atol=1e-5, rtol=0)
    assert cut == 0


def test_pairs_of_low_scores_count_as_texts_only(model: Model, tmp_path: Path) -> None:
    rows = [("the cat", "the cat", 5.0), ("the dog", "paris in berlin", 1.0)]
    (tmp_path / "sts.tsv").write_text("a\tb\tscore\n" + "".join(f"{one}\t{two}\t{score}\n" for one, two, score in rows))
    config = {"name": "embeddings", "data": str(tmp_path / "sts.tsv"), "first": "a", "second": "b"}
    scores = evaluation(**config, score="score", min_score=4.0)
    result = scores.compute(scores.cells(model, {})[0], model, tmp_path)
    assert result["alignment"] == pytest.approx(0.0, abs=1e-10)
    assert (result["pairs"], result["texts"]) == (1, 3)
    for wrong, words in (
        ({"score": "score"}, "score, min_score: give both"),
        ({"score": "score", "min_score": 6.0}, "no pair has a score of 6 or more"),
        ({"score": "a", "min_score": 1.0}, "row 1: 'the cat' is no number"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluation(**config, **wrong)
    (tmp_path / "sts.tsv").write_text("a\tb\tscore\nthe cat\tthe cat\tnan\n")
    with pytest.raises(ConfigError, match="row 1: 'nan' is no number"):
        evaluation(**config, score="score", min_score=4.0)


def write_task(folder: Path, count: int, seed: int, name: str) -> None:
    """Whether a sentence is about cats, and of how many words it is."""
    generator = keyed_generator(seed, "task")
    lines = ["text\tother\tlabel\tscore"]
    for _ in range(count):
        words = generator.choice(["the", "sat", "on", "mat", "in", "paris"], size=int(generator.integers(3, 9)))
        label = int(generator.integers(0, 2))
        words[int(generator.integers(0, len(words)))] = "cat" if label else "dog"
        lines.append(f"{' '.join(words)}\t{' '.join(words[::-1])}\t{label}\t{len(words)}.0")
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


def test_a_linear_model_reads_what_is_there(model: Model, tmp_path: Path) -> None:
    for name, count, seed in (("train", 300, 0), ("dev", 100, 1)):
        write_task(tmp_path / "cats", count, seed, name)
    task = {"data": str(tmp_path / "cats"), "text": "text"}
    tasks = [
        {**task, "name": "cats", "label": "label", "metrics": ["accuracy"]},
        {**task, "name": "words", "label": "score", "metrics": ["spearman"]},
        {**task, "name": "pairs", "pair": "other", "label": "label", "metrics": ["accuracy"]},
    ]
    probe = evaluation(name="linear_probe", tasks=tasks)
    results = {cell.name: probe.compute(cell, model, tmp_path) for cell in probe.cells(model, {})}
    assert results["cats"]["accuracy"] > 0.9
    assert results["words"]["spearman"] > 0.9
    assert results["pairs"]["score"] >= 0.0
    assert results["cats"]["strength"] in probe.config.strengths
    scores = probe.scores(model, results)
    assert scores["average"] == pytest.approx(sum(each["score"] for each in results.values()) / 3)
    assert probe.compute(probe.cells(model, {})[0], model, tmp_path) == results["cats"]
    few = evaluation(name="linear_probe", tasks=tasks[:1], rows=4)
    assert few.compute(few.cells(model, {})[0], model, tmp_path)["accuracy"] < 0.8


def test_tasks_without_labels_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "cats", 5, 0, "train")
    (tmp_path / "cats" / "dev.tsv").write_text("text\tlabel\nthe cat\t-1\n")
    task = {"name": "cats", "data": str(tmp_path / "cats"), "text": "text", "label": "label", "metrics": ["accuracy"]}
    with pytest.raises(ConfigError, match="tasks: cats: its dev set has no labels"):
        evaluation(name="linear_probe", tasks=[task])


def test_rows_of_all_classes_are_learnt_from(tmp_path: Path) -> None:
    """Files that are sorted by label, and tasks of one name, would be lost on the way without a word."""
    lines = ["text\tlabel", *["bad\t0"] * 6, *["good\t1"] * 6]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    task = {"name": "mood", "data": str(tmp_path), "text": "text", "label": "label", "metrics": ["accuracy"]}
    said = (
        "tasks: mood: rows: the class 1 is in none of the first 6 training rows of 12: shuffle them, or give more rows"
    )
    with pytest.raises(ConfigError, match=said):
        evaluation(name="linear_probe", tasks=[task], rows=6)
    assert evaluation(name="linear_probe", tasks=[task], rows=7).tasks["mood"].train.labels == [0] * 6 + [1]
    with pytest.raises(ValueError, match="tasks: mood stands there twice"):
        evaluation(name="linear_probe", tasks=[task, {**task, "metrics": ["mcc"]}])
