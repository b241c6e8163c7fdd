"""`generate`: text of a run, an export and a Hugging Face folder; a prompt stays; every wrong argument is one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM
from typer.testing import CliRunner, Result

import main
from tests.helpers.in_process import go
from tests.helpers.tiny import ROW, ROWS, VOCABULARY, write_config


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    return go(write_config(folder, tiny_data, 2, "full", objective="diffusion"))


@pytest.fixture(scope="module")
def bert(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers made, with random weights."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_data / "tokenizer").save_pretrained(folder)
    return folder


def generate(*arguments: Any) -> Result:
    return CliRunner().invoke(main.app, ["generate", *map(str, arguments)])


def texts(*arguments: Any) -> list[list[str]]:
    done = generate(*arguments)
    assert done.exit_code == 0, done.output
    return [text.split() for text in done.output.split("\n") if text and not text.startswith("---")]


def test_a_run_writes_text_by_its_seed(run: Path) -> None:
    (text,) = texts(run, "--tokens", 8)
    assert len(text) == 8
    assert all(word.startswith("w") for word in text), "no special token is drawn"
    assert texts(run, "--tokens", 8) == [text]
    assert texts(run, "--tokens", 8, "--seed", 1) != [text]
    assert texts(run / "checkpoints" / f"tokens-{2 * ROWS * ROW}", "--tokens", 8) == [text]
    several = texts(run, "--tokens", 8, "--samples", 3)
    assert several[0] == text
    assert len(set(map(tuple, several))) == 3


def test_a_prompt_stays_and_its_masks_are_filled_in(run: Path, bert: Path) -> None:
    for model in (run, bert):
        (text,) = texts(model, "--prompt", "w9 [MASK] w11", "--tokens", 3, "--steps", 2)
        assert (text[0], text[2], len(text)) == ("w9", "w11", 6)
        assert "[MASK]" not in text
        assert texts(model, "--prompt", "[MASK] w7", "--tokens", 0)[0][1] == "w7"


def test_what_cannot_be_is_one_line(run: Path, bert: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    headless.mkdir()
    for file in bert.iterdir():
        (headless / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((headless / "tokenizer_config.json").read_text())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (headless / name).is_file():
            node = {
                key: value for key, value in json.loads((headless / name).read_text()).items() if key != "mask_token"
            }
            (headless / name).write_text(json.dumps(node))
    assert "mask_token" in tokenizer
    for arguments, message in (
        ([run, "--tokens", 0], "--tokens: 0, and --prompt holds no [MASK]: there is nothing to fill in"),
        ([bert, "--tokens", 19], f"--tokens: 19 behind a prompt of 0 are more than the 18 that {bert} reads: lower it"),
        ([bert, "--tokens", 10**12], f"--tokens: {10**12} behind a prompt of 0 are more than the 18 that {bert} reads"),
        ([run, "--steps", 10**30], "--steps"),
        ([run, "--samples", 10**12], "--samples"),
        ([run, "--temperature", "inf"], "--temperature"),
        ([run, "--temperature", "nan"], "--temperature"),
        ([run, "--top-p", "nan"], "--top-p"),
        ([tmp_path / "nothing"], f"{tmp_path / 'nothing'}: no such folder"),
        ([headless], f"{headless}: its tokenizer has no mask token: give a masked language model"),
        ([run, "--steps", 0], "--steps"),
        ([run, "--top-p", 0], "--top-p"),
        ([run, "--temperature", 0], "--temperature"),
    ):
        done = generate(*arguments)
        assert done.exit_code == 2, done.output
        assert len(done.output.strip().splitlines()) == 1, done.output
        assert message in done.output
