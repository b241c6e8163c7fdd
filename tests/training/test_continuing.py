"""A run that goes on from a folder of transformers with 50 new tokens: what it learns, writes and survives."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.helpers.continuing import check_export, domain_texts, hf_folder, prepare_data, run_file, write_terms
from tests.helpers.hub import hub_environment, run_hub
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, command, run
from tests.helpers.texts import SENTENCES
from training.checkpoint_source import model_of, read_source

STEPS, PER_STEP = 20, 512
LAST = f"tokens-{STEPS * PER_STEP}"
KILLER: dict[str, Any] = {"imports": [str(ROOT / "tests" / "helpers" / "killer.py")]}


class Domain:
    """A source, terms, and streams prepared with both."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.source, self.kind = folder / "hf", kind
        hf_folder(self.source, kind)
        self.terms = write_terms(folder)
        self.data = prepare_data(folder, {"name": "load", "path": str(self.source), "add": str(self.terms)})

    def run_file(self, folder: Path, source: Path | None = None, **changes: Any) -> str:
        tokens = {"add": str(self.terms)}
        return str(run_file(folder, str(source or self.source), self.data / "tokenizer", tokens=tokens, **changes))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return Domain(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return Domain(tmp_path_factory.mktemp("modernbert"), "modernbert")


@pytest.fixture(scope="module")
def trained(bert: Domain, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", ranks.train(1, bert.run_file(folder))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path) -> list[bytes]:
    files = [run / "checkpoints" / LAST / f"{name}.safetensors" for name in ("model", "optimizer")]
    return [file.read_bytes() for file in (*files, run / "exports" / LAST / "model.safetensors")]


def check_learned(run: Path, text: str) -> None:
    """The domain's loss falls, and what it was is in the summary, in metrics.jsonl, and printed for each stream."""
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["validation_before"], summary["validation"]
    assert after["streams"]["domain"]["loss"] < 0.8 * before["streams"]["domain"]["loss"]
    first = next(line for line in metrics(run) if line["step"] == 0)
    assert first["validation"] == before
    rows = {row.split()[1]: row for row in text.splitlines() if row.startswith("│")}
    assert "loss before" in text
    for name in ("domain", "old"):
        losses = [f"{result['streams'][name]['loss']:.3f}" for result in (before, after)]
        assert f"│ {losses[0]} " in rows[name], rows[name]
        assert f"│ {losses[1]} " in rows[name], rows[name]
    assert "50 are new ('kinase', 'kinosome', 'kinitide', ...) and start as mean-of-pieces" in text


def test_fifty_terms_lower_the_domains_loss_and_are_exported(trained: tuple[Path, str]) -> None:
    run, text = trained
    check_learned(run, text)
    check_export(run / "exports" / LAST)
    record = json.loads((run / "origin.json").read_text())
    assert record["vocabulary"]["new"] == 50
    assert "(a Hugging Face folder; 50 tokens are new); then t" in (run / "exports" / LAST / "README.md").read_text()
    # The learning rate rises again from 0 over the phase's warmup of 4 steps
    rates = [line["lr"] for line in metrics(run) if "lr" in line]
    assert rates[:5] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02])


@pytest.mark.slow
def test_the_same_with_a_byte_level_tokenizer(modernbert: Domain, ranks: Ranks, tmp_path: Path) -> None:
    text = ranks.train(1, modernbert.run_file(tmp_path))
    check_learned(tmp_path / "run", text)
    check_export(tmp_path / "run" / "exports" / LAST)


@torch.no_grad()
def test_the_first_checkpoint_computes_what_the_source_does(bert: Domain, trained: tuple[Path, str]) -> None:
    """Logits of old tokens, as the run itself has saved them before its first step."""
    first = trained[0] / "checkpoints" / "tokens-0"
    model = model_of(read_source(first), load_file(first / "model.safetensors")).eval()
    hf, tokenizer = AutoModelForMaskedLM.from_pretrained(bert.source).eval(), AutoTokenizer.from_pretrained(bert.source)
    ids = tokenizer(SENTENCES[0], return_tensors="pt").input_ids
    found = model(ids[0], torch.tensor([0, ids.shape[1]], dtype=torch.int32), ids.shape[1]).logits
    assert found is not None
    torch.testing.assert_close(found[:, : len(tokenizer)], hf(ids).logits[0], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_killed_and_without_its_source_it_ends_with_the_same_bits(
    bert: Domain, trained: tuple[Path, str], ranks: Ranks, tmp_path: Path
) -> None:
    """The source and the file of terms are gone after the first kill."""
    source, terms = tmp_path / "source", tmp_path / "terms.txt"
    shutil.copytree(bert.source, source)
    shutil.copy(bert.terms, terms)
    # The second save, after step 2, begins when the first is done: only then can the source go.
    kills = {"name": "killer", "steps": [3, 5], "event": "after_backward"}
    file = str(
        run_file(
            tmp_path, str(source), bert.data / "tokenizer", tokens={"add": str(terms)}, callbacks=[kills], **KILLER
        )
    )
    assert ranks.run(1, "train", file)[0] == [-signal.SIGKILL]
    shutil.rmtree(source)
    terms.unlink()
    assert ranks.run(1, "train", file)[0] == [-signal.SIGKILL]
    text = ranks.train(1, file, "tokens.init=mean")
    assert f"tokens: is not read any more: this run has begun, see {tmp_path}/run/origin.json" in text
    assert last(tmp_path / "run") == last(trained[0])
    summaries = [json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", trained[0])]
    assert summaries[0]["validation_before"] == summaries[1]["validation_before"]
    assert [line["step"] for line in metrics(tmp_path / "run")].count(0) == 1
    assert "loss before" in text


def test_without_its_source_and_a_checkpoint_it_says_so_in_one_line(bert: Domain, ranks: Ranks, tmp_path: Path) -> None:
    file = bert.run_file(tmp_path, source=tmp_path / "gone")
    codes, text = ranks.run(1, "train", file)
    assert codes == [2]
    wanted = (
        f"error: {file}: model: is `from`, and from: {tmp_path}/gone: is no Hugging Face folder (no config.json in it)"
    )
    assert next(line for line in text.splitlines() if line.startswith("error: ")).startswith(wanted)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_two_processes_killed_train_the_same(
    bert: Domain, trained: tuple[Path, str], ranks: Ranks, tmp_path: Path, parallelism: str
) -> None:
    kills = {"name": "killer", "steps": [3], "event": "batch_end"}
    trainer = {"log_interval": 1, "parallelism": parallelism}
    file = bert.run_file(tmp_path, callbacks=[kills], trainer=trainer, **KILLER)
    codes, _ = ranks.run(2, "train", file)
    assert -signal.SIGKILL in codes
    ranks.train(2, file)
    ours, theirs = (
        load_file(run / "checkpoints" / LAST / "model.safetensors") for run in (tmp_path / "run", trained[0])
    )
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 2e-3 * tensor.abs().max(), name
    before = [
        json.loads((run / "summary.json").read_text())["validation_before"] for run in (tmp_path / "run", trained[0])
    ]
    assert before[0]["loss"] == pytest.approx(before[1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_an_export_of_ours_goes_on(trained: tuple[Path, str], bert: Domain, ranks: Ranks, tmp_path: Path) -> None:
    """With no new token; it starts with the loss that it ended with."""
    export = trained[0] / "exports" / LAST
    ranks.train(1, str(run_file(tmp_path, str(export), bert.data / "tokenizer")))
    ended, goes_on = (json.loads((run / "summary.json").read_text()) for run in (trained[0], tmp_path / "run"))
    assert goes_on["validation_before"]["loss"] == pytest.approx(ended["validation"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_with_another_tokenizer_it_trains_resumes_and_is_exported(bert: Domain, ranks: Ranks, tmp_path: Path) -> None:
    """Of bytes, where the source has pieces of words."""
    data = prepare_data(tmp_path, {"name": "train", "vocab_size": 320})
    kills = {"name": "killer", "steps": [3], "event": "batch_end"}
    tokens = {"other_tokenizer": True}
    file = str(run_file(tmp_path, str(bert.source), data / "tokenizer", tokens=tokens, callbacks=[kills], **KILLER))
    assert ranks.run(1, "train", file)[0] == [-signal.SIGKILL]
    text = ranks.train(1, file)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation"]["loss"] < summary["validation_before"]["loss"]
    assert "loss before" in text
    export = tmp_path / "run" / "exports" / LAST
    hf, tokenizer = AutoModelForMaskedLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert hf.config.vocab_size == 320
    assert hf.config.pad_token_id == tokenizer.pad_token_id == 3
    assert tokenizer.decode(tokenizer(domain_texts(1)[0], add_special_tokens=False).input_ids) == domain_texts(1)[0]


@pytest.mark.slow
def test_a_model_of_the_hub_goes_on_and_is_asked_for_once(
    bert: Domain, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub of the test's own; with the hub and the copy gone, the run goes on."""
    with run_hub(tmp_path / "hub") as hub:
        extra = hub_environment(hub, tmp_path / "home")
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # HF_ENDPOINT's, when the package was imported
        api = HfApi(token=False)
        api.create_repo("org/model")
        api.upload_folder(repo_id="org/model", folder_path=bert.source)
        kills = {"name": "killer", "steps": [3], "event": "batch_end"}
        phases = [{"name": "short", "tokens": 4 * PER_STEP, "max_seq_len": 64, "global_batch_size": 8, "lr": 2e-2}]
        file = str(
            run_file(tmp_path, "hf:org/model", bert.data / "tokenizer", phases=phases, callbacks=[kills], **KILLER)
        )
        done = run(command("train", file), extra=extra)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert "starting from hf:org/model" in done.stdout
    shutil.rmtree(tmp_path / "home")
    assert "validation after 0 tokens" not in ranks.train(1, file)  # its first checkpoint has it
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["from"] == "hf:org/model"
