"""Continuing from Hugging Face with any number of rows: kept, or padded with rows that change nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from flexbert import FlexBertForMaskedLM
from recipe.config import load_run_config
from tests.helpers.in_process import go, invoke
from tests.helpers.ranks import Ranks
from tests.helpers.tiny import VOCABULARY, write_config
from training.branching import read_origin

MODELS: dict[str, Any] = {
    "bert": (BertForMaskedLM, BertConfig, "bert-base", {"pad_token_id": 0}),
    "roberta": (
        RobertaForMaskedLM,
        RobertaConfig,
        "roberta-base",
        {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "modernbert": (
        ModernBertForMaskedLM,
        ModernBertConfig,
        "modernbert-base",
        {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    ),
}
IDS = ("cls", "sep", "mask", "pad", "bos", "eos")


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams that say 128 ids, of which the tokenizer names 64."""
    folder = tmp_path_factory.mktemp("padded") / "data"
    shutil.copytree(tiny_data, folder)
    for file in folder.glob("*/*/stream.json"):
        manifest = json.loads(file.read_text())
        manifest["vocab_size"] = 2 * VOCABULARY
        manifest["special_ids"] += list(range(VOCABULARY, 2 * VOCABULARY))
        file.write_text(json.dumps(manifest))
    return folder


def continued(folder: Path, data: Path, kind: str, rows: int, vocab_size: int, **changes: Any) -> Path:
    """A run file that goes on from a model of transformers with so many rows."""
    model_class, config_class, preset, ids = MODELS[kind]
    torch.manual_seed(rows)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    hf = model_class(config_class(vocab_size=rows, max_position_embeddings=80, **sizes, **ids)).eval()
    with torch.no_grad():
        hf.get_output_embeddings().bias.normal_()
    hf.save_pretrained(folder / "hf")
    for file in (data / "tokenizer").iterdir():
        shutil.copy(file, folder / "hf")
    file = write_config(folder, data, 1, "full", **{"from": str(folder / "hf"), **changes})
    length = 80 - 2 * (kind == "roberta")
    node = {"preset": preset, "vocab_size": vocab_size, **sizes, "max_position_embeddings": length}
    node |= {f"{name}_token_id": None for name in IDS}
    text = json.dumps({"defaults": file.name, "model": node})
    run = load_run_config(file)
    assert run.name == "run"
    (folder / "go.yaml").write_text(text)
    # The tiny file's own architecture must not stay below the preset's.
    plain = file.read_text()
    start = plain.index("model:")
    file.write_text(plain[:start] + plain[plain.index("data:") :])
    return folder / "go.yaml"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("rows", "vocab_size"), [(64, 64), (70, 70), (70, 128), (150, 192), (61, 128), (61, 64)])
def test_old_tokens_keep_their_logits(tmp_path: Path, data: Path, kind: str, rows: int, vocab_size: int) -> None:
    """1e-5 of transformers' own; ids without a token have no share in the softmax, new tokens an ordinary one."""
    config = load_run_config(continued(tmp_path, data, kind, rows, vocab_size))
    start = read_origin(config)
    assert start is not None
    model = FlexBertForMaskedLM(config.model)
    model.load_state_dict(start.weights)
    ids = torch.randint(5, 61, (1, 30), generator=torch.Generator().manual_seed(0))
    hf = MODELS[kind][0].from_pretrained(tmp_path / "hf").eval()
    expected = hf(ids).logits[0]
    with torch.no_grad():
        found = model.eval()(ids[0], torch.tensor([0, 30], dtype=torch.int32), 30).logits
    assert found is not None
    assert found.shape == (30, vocab_size)
    torch.testing.assert_close(found[:, :rows], expected, atol=1e-5, rtol=0)
    spare = found.softmax(1)[:, max(rows, VOCABULARY) :]
    assert float(spare.sum(1).max() if spare.numel() else 0) < 1e-6
    if rows < VOCABULARY:
        new = found[:, rows:VOCABULARY].detach()
        torch.testing.assert_close(new, expected.mean(1, keepdim=True).expand_as(new).detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "rows", "vocab_size"),
    [
        pytest.param("bert", 70, 70, marks=pytest.mark.slow),
        pytest.param("roberta", 70, 128, marks=pytest.mark.slow),
        ("bert", 61, 64),
    ],
)
def test_such_a_run_trains_and_exports(
    tmp_path: Path, data: Path, ranks: Ranks, kind: str, rows: int, vocab_size: int
) -> None:
    file = str(continued(tmp_path, data, kind, rows, vocab_size))
    codes, text = ranks.run(1, "train", file, "--dry-run")
    assert codes == [0], text
    ranks.train(1, file)
    (export,) = (tmp_path / "run" / "exports").iterdir()
    hf = MODELS[kind][0].from_pretrained(export)
    assert hf.config.vocab_size == vocab_size
    (tmp_path / "run" / "summary.json").unlink()
    assert "resuming after step 1" in ranks.train(1, file)


def test_a_run_with_spare_rows_is_branched_and_decayed(tmp_path: Path, data: Path) -> None:
    """It has 192 rows, as its source 150; the streams say 128."""
    run = go(continued(tmp_path, data, "bert", 150, 192))
    told = invoke("decay", str(run), "--tokens", "256")
    assert "resuming" not in told
    (branch,) = tmp_path.glob("run-decay-*")
    summaries = [json.loads((each / "summary.json").read_text()) for each in (run, branch)]
    assert summaries[1]["validation_before"]["loss"] == pytest.approx(summaries[0]["validation"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "override", "line"),
    [
        (70, "model.vocab_size=64", "model.vocab_size: is 64, the model that `from` names has 70 rows: set model.vocab_size=128"),
        (61, "model.vocab_size=61", "model.vocab_size: is 61, the streams' tokenizer has ids up to 63: set model.vocab_size=128"),
        (70, "model.vocab_size=256", "model.vocab_size: is 256, the model that `from` names has 70 rows, the streams' tokenizer 64 ids: set model.vocab_size=128"),
        (70, "model.cls_token_id=9", "model.cls_token_id is 9, in the streams 1: set model.cls_token_id=null (null: the tokenizer's)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_in_dry_run_and_train(
    tmp_path: Path, data: Path, ranks: Ranks, rows: int, override: str, line: str
) -> None:
    file = str(continued(tmp_path, data, "bert", rows, 128))
    for arguments in (["train", file, override], ["train", file, override, "--dry-run"]):
        codes, text = ranks.run(1, *arguments)
        assert codes == [2], text
        assert [said for said in text.splitlines() if said.startswith("error: ")] == [f"error: {line}"]
    assert not (tmp_path / "run").exists()


def test_ids_of_a_preset_that_are_not_the_tokenizers(tmp_path: Path, data: Path, ranks: Ranks) -> None:
    file = write_config(tmp_path, data, 1, "full", model={"vocab_size": 128, "cls_token_id": 2, "mask_token_id": 9})
    codes, text = ranks.run(1, "train", str(file))
    assert codes == [2]
    assert "set model.cls_token_id=null model.mask_token_id=null (null: the tokenizer's)" in text
    ranks.train(1, str(file), "model.cls_token_id=null", "model.mask_token_id=null")
