"""Hidden tokens: the same for every model, and their loss that of transformers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from data.keyed import keyed_generator
from evals.corpora import pieces
from evals.interface import Model
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.texts import SENTENCES, evaluation, model_folder, model_of

# Worst difference measured between our sums and the reference's: 4e-6 of a nat a token.
TOLERANCE = 1e-4


def texts_file(folder: Path, name: str = "prose", copies: int = 6) -> Path:
    file = folder / f"{name}.jsonl"
    rows = [{"text": f"{SENTENCES[i % 4]} {SENTENCES[(i * 3 + 1) % 4]}"} for i in range(copies)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def reference(model: Model, text: str, domain: str, number: int, rate: float) -> tuple[float, int, int, int]:
    """Nats, hidden tokens, hits and bytes of a text, by transformers, one token after the other."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder)
    theirs = AutoModelForMaskedLM.from_pretrained(model.folder)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    draws = keyed_generator(0, f"masked evaluation, tokens, {domain}", number).random(len(ids))
    hidden = [at for at, each in enumerate(ids) if each > 4 and draws[at] < rate]
    masked = [tokenizer.mask_token_id if at in hidden else each for at, each in enumerate(ids)]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([masked])).logits[0]
    nats, hits, letters = 0.0, 0, 0
    for at in hidden:
        nats -= float(logits[at].double().log_softmax(0)[ids[at]])
        hits += int(logits[at].argmax()) == ids[at]
        first, last = encoded["offset_mapping"][at]
        letters += len(text[first:last].encode())
    return nats, len(hidden), hits, letters


def test_loss_and_accuracy_are_those_of_transformers(model: Model, tmp_path: Path) -> None:
    file = texts_file(tmp_path)
    masked = evaluation(name="masked", texts={"prose": str(file)}, rates=[0.15, 0.4], rows=4)
    results = {cell.name: masked.compute(cell, model, tmp_path) for cell in masked.cells(model, {})}
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()][:4]
    for rate in (0.15, 0.4):
        sums = [reference(model, text, "prose", number, rate) for number, text in enumerate(texts)]
        nats, tokens, hits, letters = (math.fsum(each[i] for each in sums) for i in range(4))
        result = results[f"prose/rate{rate}"]
        assert (result["tokens"], result["correct"], result["bytes"]) == (tokens, hits, letters)
        assert result["nats"] == pytest.approx(nats, abs=TOLERANCE * tokens)
        assert result["loss"] == result["nats"] / tokens
        assert result["nats/byte"] == result["nats"] / letters
        assert result["runtime"] == "flexbert"
    scores = masked.scores(model, results)
    assert list(scores) == [f"prose {rate} {key}" for rate in (0.15, 0.4) for key in ("loss", "nats/byte", "accuracy")]


@pytest.mark.parametrize("unit", ["tokens", "words"])
def test_both_runtimes_see_and_say_the_same(unit: str, model: Model, tmp_path: Path) -> None:
    config = {"name": "masked", "texts": {"prose": str(texts_file(tmp_path))}, "rates": [0.3], "unit": unit}
    found = []
    for more in ({}, {"runtime": "transformers"}, {"batch_tokens": 40}):
        masked = evaluation(**config, **more)
        found.append(masked.compute(masked.cells(model, {})[0], model, tmp_path))
    assert [each["runtime"] for each in found] == ["flexbert", "transformers", "flexbert"]
    for other in found[1:]:
        assert [other[key] for key in ("tokens", "bytes", "correct")] == [
            found[0][key] for key in ("tokens", "bytes", "correct")
        ]
        assert other["loss"] == pytest.approx(found[0]["loss"], abs=TOLERANCE)


def test_words_hide_the_same_text_for_another_tokenizer(model: Model, tmp_path: Path) -> None:
    letters = model_folder(tmp_path / "letters", words=())
    config = {"name": "masked", "texts": {"prose": str(texts_file(tmp_path))}, "rates": [0.3]}
    found = {}
    for unit in ("tokens", "words"):
        masked = evaluation(**config, unit=unit)
        found[unit] = [masked.compute(masked.cells(each, {})[0], each, tmp_path) for each in (model, letters)]
    assert found["words"][0]["bytes"] == found["words"][1]["bytes"]
    assert found["words"][0]["tokens"] < found["words"][1]["tokens"]
    assert found["tokens"][0]["bytes"] != found["tokens"][1]["bytes"]
    lines = (tmp_path / "prose.jsonl").read_text().splitlines()
    hidden = 0
    for number, line in enumerate(lines):
        words = json.loads(line)["text"].split()
        draws = keyed_generator(0, "masked evaluation, words, prose", number).random(len(words))
        hidden += sum(len(word) for word, draw in zip(words, draws, strict=True) if draw < 0.3)
    assert found["words"][0]["bytes"] == hidden


def test_what_is_hidden_at_one_rate_is_hidden_at_a_higher_one(model: Model, tmp_path: Path) -> None:
    """So curves over rates differ by what is added only; and 1 hides every token."""
    masked = evaluation(name="masked", texts={"prose": str(texts_file(tmp_path))}, rates=[0.2, 0.5, 1.0])
    results = {cell.name: masked.compute(cell, model, tmp_path) for cell in masked.cells(model, {})}
    tokens = [results[f"prose/rate{rate}"]["tokens"] for rate in ("0.2", "0.5", "1")]
    assert tokens[0] < tokens[1] < tokens[2]
    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder)
    lines = (tmp_path / "prose.jsonl").read_text().splitlines()
    whole = sum(len(tokenizer.tokenize(json.loads(line)["text"])) for line in lines)
    assert tokens[2] == whole
    again = evaluation(name="masked", texts={"prose": str(tmp_path / "prose.jsonl")}, rates=[0.5, 0.2])
    cells = {cell.name: cell for cell in again.cells(model, {})}
    assert again.compute(cells["prose/rate0.2"], model, tmp_path) == results["prose/rate0.2"]
    first = {cell.name: cell.key(model) for cell in masked.cells(model, {})}
    assert {cell.key(model) for cell in cells.values()} <= set(first.values())


def test_domains_add_up_by_tokens(model: Model, tmp_path: Path) -> None:
    texts = {"one": str(texts_file(tmp_path, "one", 2)), "two": str(texts_file(tmp_path, "two", 6))}
    masked = evaluation(name="masked", texts=texts, rates=[0.4])
    results = {cell.name: masked.compute(cell, model, tmp_path) for cell in masked.cells(model, {})}
    one, two = (results[f"{name}/rate0.4"] for name in ("one", "two"))
    assert masked.scores(model, results)["all 0.4 loss"] == pytest.approx(
        (one["nats"] + two["nats"]) / (one["tokens"] + two["tokens"])
    )
    assert masked.cells(model, {})[0].settings["data"] != masked.cells(model, {})[1].settings["data"]


def test_a_model_without_a_head_fails_in_one_line(headless: Path, tmp_path: Path) -> None:
    for runtime in (None, "transformers"):
        masked = evaluation(name="masked", texts={"prose": str(texts_file(tmp_path))}, rates=[0.3], runtime=runtime)
        with pytest.raises(RunError, match=r"headless: has no masked-token head \(.*\): it cannot restore") as caught:
            masked.compute(masked.cells(model_of(headless), {})[0], model_of(headless), tmp_path)
        assert "\n" not in str(caught.value)


def test_text_comes_from_datasets_and_files_of_every_kind(model: Model, tmp_path: Path) -> None:
    from tests.helpers.preparing import config_file, documents, run, write_jsonl

    for name, first in (("a", 0), ("b", 100)):
        write_jsonl(tmp_path / name / "1.jsonl", documents(40, first))
    folder = run(config_file(tmp_path))
    masked = evaluation(name="masked", data=str(folder), rates=[0.3], rows=3)
    assert list(masked.corpora) == ["a", "b"]
    assert all(text.split()[0].isdigit() for text in masked.corpora["a"].texts)
    assert masked.compute(masked.cells(model, {})[0], model, tmp_path)["tokens"] > 0
    (tmp_path / "plain.txt").write_text("the cat sat\n\nthe dog\nruns\n\n\n  \nin paris\n")
    text = evaluation(name="masked", texts={"plain": str(tmp_path / "plain.txt")})
    assert text.corpora["plain"].texts == ["the cat sat", "the dog\nruns", "in paris\n"] or text.corpora[
        "plain"
    ].texts == ["the cat sat", "the dog\nruns", "in paris"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data": "{}/nowhere"}, "no such dataset"),
        ({"texts": {"x": "{}/nowhere.jsonl"}}, "texts.x: "),
        ({"texts": {"x": "{}/blank.txt"}}, "texts.x: holds no text"),
        ({"texts": {"x": "{}/broken.jsonl"}}, "broken.jsonl:1: not valid JSON"),
    ],
)
def test_bad_text_is_one_line(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    node = json.loads(json.dumps(config).replace("{}", str(tmp_path)))
    with pytest.raises(ConfigError) as caught:
        evaluation(name="masked", **node)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_source_of_text_must_be_given() -> None:
    with pytest.raises(ConfigError, match="give data=FOLDER"):
        evaluation(name="masked")


def test_pieces_are_of_all_documents_first() -> None:
    texts = ["a b c d e", " f  g\nh ", "i"]
    assert pieces(texts, 2, 100) == ["a b", "f  g", "i", "c d", "h", "e"]
    assert pieces(texts, 2, 4) == ["a b", "f  g", "i", "c d"]


def test_rates_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rates: two values are alike in six digits: \[0\.15, 0\.15000001\]"):
        evaluation(name="masked", texts={"prose": str(texts_file(tmp_path))}, rates=[0.15, 0.15000001])
