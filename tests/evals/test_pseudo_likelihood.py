"""Pseudo-log-likelihoods against a loop over transformers' model; what perplexities and pairs make of them."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from evals.interface import Model
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.texts import SENTENCES, evaluation, model_of

# Worst difference measured of a sentence's sum: 3e-5 nats.
TOLERANCE = 1e-3


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)


def reference(model: Model, sentence: str, method: str) -> tuple[float, int]:
    """Sum and tokens: each token hidden by itself, or with those of its word behind it."""
    tokenizer, theirs = loaded(model.folder)
    ids, pieces = tokenizer(sentence)["input_ids"], tokenizer.tokenize(sentence)
    total = 0.0
    for at in range(1, len(ids) - 1):
        masked = list(ids)
        masked[at] = tokenizer.mask_token_id
        later = at + 1
        while method == "word_l2r" and later < len(ids) - 1 and pieces[later - 1].startswith("##"):
            masked[later] = tokenizer.mask_token_id
            later += 1
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([masked])).logits[0, at]
        total += float(logits.double().log_softmax(0)[ids[at]])
    return total, len(ids) - 2


@pytest.mark.parametrize("method", ["token", "word_l2r"])
def test_pseudo_perplexity_is_that_of_a_plain_loop(method: str, model: Model, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("\n".join([*SENTENCES[:3], "Too short."]))
    ppl = evaluation(name="pseudo_perplexity", texts={"prose": str(tmp_path / "prose.txt")}, method=method)
    assert ppl.sentences["prose"] == list(SENTENCES[:3])
    result = ppl.compute(ppl.cells(model, {})[0], model, tmp_path)
    sums = [reference(model, sentence, method) for sentence in SENTENCES[:3]]
    nats, tokens = -math.fsum(each[0] for each in sums), sum(each[1] for each in sums)
    assert result["tokens"] == tokens
    assert result["nats"] == pytest.approx(nats, abs=TOLERANCE)
    assert result["pseudo-perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert result["nats/byte"] == pytest.approx(nats / len("".join(SENTENCES[:3]).replace(" ", "")), rel=1e-4)
    assert list(ppl.scores(model, {"prose": result})) == ["prose pseudo-perplexity", "prose nats/byte"]


def test_methods_differ_where_words_have_several_tokens(model: Model) -> None:
    assert reference(model, "zzz", "token")[0] != reference(model, "zzz", "word_l2r")[0]
    assert reference(model, "the cat", "token") == reference(model, "the cat", "word_l2r")


def pairs_file(folder: Path, name: str, pairs: list[tuple[str, str]], **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    rows = [{"sentence_good": good, "sentence_bad": bad, **more} for good, bad in pairs]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_accuracy_overall_and_by_uid(model: Model, tmp_path: Path) -> None:
    one = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[1], SENTENCES[2]), (SENTENCES[3], SENTENCES[0])]
    two = [(SENTENCES[2], "the the the the"), ("the cat", "the dog")]
    pairs_file(tmp_path / "pairs", "first", one, UID="agreement/1")
    pairs_file(tmp_path / "pairs", "second", two)
    pairs = evaluation(name="minimal_pairs", data=str(tmp_path / "pairs"), method="token")
    results = {cell.name: pairs.compute(cell, model, tmp_path) for cell in pairs.cells(model, {})}
    sums = {text: reference(model, text, "token")[0] for pair in one + two for text in pair}
    expected = [[sums[good] > sums[bad] for good, bad in group] for group in (one, two)]
    assert [results[name]["right"] for name in ("agreement-1", "second")] == [sum(each) for each in expected]
    assert pairs.scores(model, results) == {
        "accuracy": pytest.approx(sum(map(sum, expected)) / 5),
        "agreement-1": pytest.approx(sum(expected[0]) / 3),
        "second": pytest.approx(sum(expected[1]) / 2),
    }
    swapped = [(bad, good) for good, bad in one]
    pairs_file(tmp_path / "swapped", "first", swapped, UID="agreement/1")
    other = evaluation(name="minimal_pairs", data=str(tmp_path / "swapped"), method="token")
    result = other.compute(other.cells(model, {})[0], model, tmp_path)
    assert result["right"] == 3 - sum(expected[0])


def test_a_tie_counts_as_wrong(model: Model, tmp_path: Path) -> None:
    pairs_file(tmp_path / "pairs", "ties", [("the cat sat", "the cat sat"), ("the dog", "the  dog")])
    pairs = evaluation(name="minimal_pairs", data=str(tmp_path / "pairs" / "ties.jsonl"))
    result = pairs.compute(pairs.cells(model, {})[0], model, tmp_path)
    assert (result["accuracy"], result["ties"], result["pairs"]) == (0.0, 2, 2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "pairs.jsonl:2: not valid JSON"),
        ("[1]", "pairs.jsonl:2: expected an object, got list"),
        (
            '{"sentence_good": "a", "sentence_bda": "b"}',
            "pairs.jsonl:2: sentence_bad: expected a sentence: no such key, did you",
        ),
        ('{"sentence_good": "a", "sentence_bad": " "}', "pairs.jsonl:2: sentence_bad: expected a sentence"),
    ],
)
def test_bad_pairs_are_one_line(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n' + line + "\n")
    with pytest.raises(ConfigError) as caught:
        evaluation(name="minimal_pairs", data=str(tmp_path / "pairs.jsonl"))
    assert words in str(caught.value)


def test_a_model_without_a_head_fails_in_one_line(headless: Path, tmp_path: Path) -> None:
    pairs_file(tmp_path / "pairs", "one", [("a", "b")])
    pairs = evaluation(name="minimal_pairs", data=str(tmp_path / "pairs"))
    with pytest.raises(RunError, match="has no masked-token head"):
        pairs.compute(pairs.cells(model_of(headless), {})[0], model_of(headless), tmp_path)
