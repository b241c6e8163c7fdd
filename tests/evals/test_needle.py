"""The probe of reach: one who reads far finds the number at every depth, one who cannot guesses."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForMaskedLM

from commands.evaluate import run_eval
from evals.classifiers import load_tokenizer
from evals.masked_reader import MaskedReader
from evals.needle import Facts
from flexbert_core.schema import RunError
from tests.helpers.sentences import word_tokenizer, write_beir, write_model

CPU, STEPS = torch.device("cpu"), 150
CELLS = ("end-64", "start-64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", max_length=128)


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to say a number again."""
    folder = write_model(tmp_path_factory.mktemp("models") / "copier", max_length=128)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    facts, rng = Facts(tokenizer), np.random.default_rng(0)
    stream = np.asarray(tokenizer("bread sea word1 word2 word3 word4", add_special_tokens=False)["input_ids"] * 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        texts = [facts.text(rng, stream, 64, rng.random(), str(rng.choice(["end", "start"]))) for _ in range(32)]
        places = torch.tensor([place for _, place, _ in texts])
        logits = model(input_ids=torch.tensor([ids for ids, _, _ in texts])).logits[torch.arange(32), places]
        wanted = torch.tensor([facts.answers[answer] for _, _, answer in texts])
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def evaluate(folder: Path, model: Path, *overrides: str) -> tuple[dict[str, Any], str]:
    file = folder / "reach.yaml"
    file.write_text("evaluation: {name: needle}\n")
    data = write_beir(folder / "set") if not (folder / "set").exists() else folder / "set"
    console = Console(file=io.StringIO(), width=10_000)
    assert run_eval(str(file), [str(model), f"data={data}", *overrides], folder / "out", console)
    (results,) = (folder / "out/reach").glob("*/results.json")
    return json.loads(results.read_text()), console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_random_weights_guess(model: Path, tmp_path: Path) -> None:
    results, said = evaluate(tmp_path, model, "lengths=[64,128,256]", "depths=3", "texts=60")
    scores = results["scores"]
    columns = [f"asked at the {end}, {length} tokens" for end in ("end", "start") for length in (64, 128)]
    longer = [f"asked at the {end}, 256 tokens" for end in ("end", "start")]
    assert set(scores) == {*columns, *longer, "chance"}, "a mean over other lengths would not compare"
    assert {scores[name] for name in longer} == {"longer than the model takes"}
    assert scores["chance"] == 1 / 90
    count = 4 * 3 * 60
    assert abs(sum(scores[name]["mean"] for name in columns) / 4 - 1 / 90) < 4 * (1 / 90 / count) ** 0.5
    assert "needle.png" in said
    assert (tmp_path / "out/reach/needle.png").stat().st_size > 10_000


def test_one_who_can_say_it_again_finds_it_at_every_depth(copier: Path, tmp_path: Path) -> None:
    results, _ = evaluate(tmp_path, copier, "lengths=[64]", "depths=3", "texts=20")
    for cell in CELLS:
        assert results["scores"]["accuracy"] == sum(results["cells"][name]["accuracy"] for name in CELLS) / 2
        # Measured 0.5 to 0.75 after so short a training; a guess is right in 1 of 90.
        assert min(results["cells"][cell]["depths"].values()) >= 0.3, results["cells"]


@pytest.mark.parametrize("ask", ["end", "start"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_text_has_the_fact_once_whole_and_once_masked(ask: str, depth: float) -> None:
    tokenizer: Any = word_tokenizer(128)
    facts = Facts(tokenizer)
    filler = tokenizer("word1 word2", add_special_tokens=False)["input_ids"]
    stream = np.asarray(filler * 100)
    rng = np.random.default_rng(0)
    ids, place, answer = facts.text(rng, stream, 100, depth, ask)
    assert len(ids) == 100
    assert ids[place] == tokenizer.mask_token_id
    assert ids.count(tokenizer.mask_token_id) == 1
    assert [where for where, token in enumerate(ids) if token in facts.answers] == [
        place_of(ids, facts.answers[answer])
    ]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert (words[0], words[-1]) == ("[CLS]", "[SEP]")
    question = words[place - 7 : place + 2]
    number = tokenizer.convert_ids_to_tokens(facts.answers[answer])
    fact = [number if word == "[MASK]" else word for word in question]
    assert fact[:4] == ["the", "pass", "code", "of"]
    start = next(at for at in range(100) if words[at : at + 9] == fact)
    body = 100 - 2 - 9
    assert start == 1 + round(depth * (body - 9)) + (9 if ask == "start" else 0)


def place_of(ids: list[int], token: int) -> int:
    assert ids.count(token) == 1
    return ids.index(token)


def test_both_runtimes_choose_alike(model: Path) -> None:
    reader = MaskedReader(model, CPU, "fp32")
    assert reader.runtime == "flexbert"
    reference = AutoModelForMaskedLM.from_pretrained(model).eval()
    rng = np.random.default_rng(0)
    rows = rng.integers(5, 100, (20, 50)).tolist()
    places = rng.integers(0, 50, 20).tolist()
    tokens = list(range(30, 90))
    logits = reference(input_ids=torch.tensor(rows)).logits
    wanted = logits[torch.arange(20), torch.tensor(places)][:, tokens].argmax(1).tolist()
    assert reader.choose(rows, places, tokens) == wanted
    assert len(set(wanted)) > 1


def test_a_model_without_a_masked_token_head_is_refused(tmp_path: Path, model: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "bare")
    word_tokenizer(128).save_pretrained(tmp_path / "bare")
    file = tmp_path / "reach.yaml"
    file.write_text(f"evaluation: {{name: needle, data: {write_beir(tmp_path / 'set')}, lengths: [64]}}\n")
    console = Console(file=io.StringIO(), width=10_000)
    assert not run_eval(str(file), [str(tmp_path / "bare")], tmp_path / "out", console)
    assert "has no masked-token head" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_length_without_room_is_refused() -> None:
    facts = Facts(word_tokenizer(128))
    with pytest.raises(RunError, match="lengths: 16 tokens have no room for a fact of 9 and its question"):
        facts.text(np.random.default_rng(0), np.arange(500), 16, 0.5, "end")
