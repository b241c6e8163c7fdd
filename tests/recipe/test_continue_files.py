"""The files of configs/continue: they load, build, and hold together, where what they go on from lies in the test's folder."""

from pathlib import Path

import pytest
import torch
import yaml

from data.added_tokens import read_tokens
from data.preparation.dataset import load_prepare_config
from data.tokenizer import VOCAB_MULTIPLE
from flexbert import build
from flexbert.accounting import count_parameters
from flexbert.config import without_init
from recipe.config import RunConfig, load_run_config
from tests.helpers.continuing import extended, hf_folder

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "configs" / "continue"
DATA = sorted(FOLDER.glob("*-data.yaml"))
RUNS = sorted(set(FOLDER.glob("*.yaml")) - set(DATA))


def loaded(file: Path, folder: Path) -> RunConfig:
    """Over a stand-in for the source, and its tokenizer with the terms."""
    hf_folder(folder / "hf", "bert")
    tokenizer = extended(folder / "hf", folder / "tokenizer", FOLDER / "terms.txt")
    origin = yaml.safe_load(file.read_text())["from"]
    key = "from.checkpoint" if isinstance(origin, dict) else "from"
    return load_run_config(file, [f"{key}={folder / 'hf'}", f"data.tokenizer={tokenizer}", f"runs={folder}"])


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_every_run_file_builds(file: Path, tmp_path: Path) -> None:
    config = loaded(file, tmp_path)
    with torch.device("meta"):
        model = build(without_init(config.model))
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config.model)
    assert config.model.vocab_size % VOCAB_MULTIPLE == 0
    assert config.phases[0].warmup > 0
    assert len(config.data.streams) == 2, "a domain, and replay"


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_run_and_prepare_file_belong_together(file: Path) -> None:
    """The same tokens, source and streams, by name."""
    run = yaml.safe_load(file.read_text())
    data = load_prepare_config(FOLDER / f"{file.stem}-data.yaml")
    assert run["tokens"]["add"] == data.tokenizer.add == "configs/continue/terms.txt"
    origin = run["from"]["checkpoint"] if isinstance(run["from"], dict) else run["from"]
    assert origin == (data.tokenizer.path or f"hf:{data.tokenizer.hub}")
    assert run["data"]["tokenizer"] == f"{data.output}/tokenizer"
    assert {name: share["path"] for name, share in run["data"]["streams"].items()} == {
        name: f"{data.output}/{name}" for name in data.streams
    }


def test_there_are_examples_for_an_export_for_an_encoder_and_on_paper() -> None:
    assert {file.stem for file in RUNS} == {"demo", "minilm", "modernbert-base"}
    assert len(DATA) == len(RUNS)
    assert len(read_tokens(str(FOLDER / "terms.txt"))) == 50


def test_modernbert_has_room_for_its_tokens_and_the_terms(tmp_path: Path) -> None:
    """Its tokenizer names 50,368 ids."""
    config = load_run_config(FOLDER / "modernbert-base.yaml")
    assert config.model.vocab_size == -(-(50368 + 50) // 64) * 64
