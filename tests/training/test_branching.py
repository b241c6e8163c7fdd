"""Branches (`from`): what goes on, what starts anew, and every way in which one is refused. Real runs, in this process."""

import json
import logging
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

import main
from commands.inspect_step import inspect_step
from data.feed.loader import build_loader
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig, load_run_config
from recipe.phases import PhasePlan
from tests.helpers.runs import prepare_dataset
from training.branching import read_origin
from training.trainer import train

pytestmark = pytest.mark.slow

RUN = """
runs: {runs}
model:
  preset: modernbert-tiny
  vocab_size: 512
  hidden_size: 32
  num_attention_heads: 2
  num_hidden_layers: 2
  intermediate_size: 32
  attention: {{name: multihead, global_attn_every_n_layers: 1, out_dropout: 0.1}}
data:
  tokenizer: {dataset}/tokenizer
  streams:
    async-code: {{path: {dataset}/async-code}}
    email-code: {{path: {dataset}/email-code}}
  block_documents: 10
  lanes: 4
  num_workers: 0
checkpoint: {{interval: 6K, keep: 10}}
evaluation: {{max_rows: 4}}
trainer: {{log_interval: 1}}
"""
STABLE = "{{name: stable, tokens: {tokens}, max_seq_len: 128, global_batch_size: 8, lr: 2e-3, warmup: {warmup}}}"
DECAY = (
    "{name: decay, tokens: 8K, max_seq_len: 128, global_batch_size: 4, lr: 1e-3, schedule: one_minus_sqrt, "
    "rope_theta: {global_layers: 20000}, masking: {rate: 0.2}, streams: {async-code: {weight: 3}, email-code: {weight: 1}}}"
)
SIX_STEPS = 6 * 1024


class Folder:
    """A folder of runs over one dataset."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder, self.dataset = folder, dataset

    def config(self, name: str, phases: list[str], *overrides: str, start: str | None = None) -> RunConfig:
        file = self.folder / f"{name}.yaml"
        head = f"name: {name}\nphases:\n" + "".join(f"  - {phase}\n" for phase in phases)
        origin = f"from: {start}\n" if start else ""
        file.write_text(head + origin + RUN.format(runs=self.folder / "runs", dataset=self.dataset))
        return load_run_config(file, overrides)

    def train(self, name: str, phases: list[str], *overrides: str, start: str | None = None) -> None:
        train(self.config(name, phases, *overrides, start=start), Console(quiet=True))

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def end(self, name: str) -> tuple[bytes, ...]:
        """Weights, optimizer and export at the end of a run, byte for byte."""
        checkpoint = max((self.run(name) / "checkpoints").iterdir(), key=lambda path: int(path.name[7:]))
        export = max((self.run(name) / "exports").iterdir(), key=lambda path: int(path.name[7:]))
        files = [checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors", export / "model.safetensors"]
        return tuple(file.read_bytes() for file in files)

    def losses(self, name: str) -> list[float]:
        lines = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """With a straight run: 12 stable steps, 16 of decay in another mixture; a branch of it anywhere must end alike."""
    made = tmp_path_factory.mktemp("branching")
    runs = Folder(made, prepare_dataset(made))
    runs.train("straight", [STABLE.format(tokens="12K", warmup="2K"), DECAY])
    return runs


def checkpoint(folder: Folder, run: str, tokens: int) -> str:
    return str(folder.run(run) / "checkpoints" / f"tokens-{tokens}")


def test_a_branch_that_changes_nothing_changes_nothing(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    start = checkpoint(folder, "straight", SIX_STEPS)
    folder.train("same", [STABLE.format(tokens=12 * 1024 - SIX_STEPS, warmup=0), DECAY], start=start)
    assert folder.end("same") == folder.end("straight")
    assert folder.losses("same") == folder.losses("straight")[6:]
    record = json.loads((folder.run("same") / "origin.json").read_text())
    assert (record["from"], record["run"], record["steps"], record["tokens"]) == (start, "straight", 6, SIX_STEPS)
    capsys.readouterr()
    inspect_step(folder.run("same"), 1, 0, True, Console())
    replayed = capsys.readouterr().out
    inspect_step(folder.run("straight"), 7, 0, True, Console())
    assert replayed == capsys.readouterr().out
    assert replayed.count("\n") > 5


def test_a_decay_off_a_stable_run_is_the_straight_run(folder: Folder) -> None:
    """Of a run that had no decay in its file; then a branch of the branch, by the name of the run: its newest."""
    folder.train("stable", [STABLE.format(tokens="14K", warmup="2K")])
    start = checkpoint(folder, "stable", 12 * 1024)
    folder.train("decayed", [DECAY], start=start)
    assert folder.end("decayed") == folder.end("straight")
    assert folder.losses("decayed") == folder.losses("straight")[12:]
    more = DECAY.replace("name: decay", "name: more").replace("tokens: 8K", "tokens: 1K")
    folder.train("straight-on", [STABLE.format(tokens="12K", warmup="2K"), DECAY, more])
    folder.train("branch-of-branch", [more], start=str(folder.run("decayed")))
    assert folder.end("branch-of-branch") == folder.end("straight-on")
    record = json.loads((folder.run("branch-of-branch") / "origin.json").read_text())
    assert (record["steps"], record["tokens"]) == (28, 28 * 512 + 12 * 512)


def test_a_resumed_branch_needs_no_origin(folder: Folder) -> None:
    """Stopped after some of its steps, and before the first one."""
    shutil.copytree(folder.run("straight"), folder.run("gone"))
    for file in folder.run("gone").glob("config.yaml"):
        file.write_text(file.read_text().replace("name: straight\n", "name: gone\n"))
    folder.train("resumed", [DECAY], "checkpoint.interval=2K", start=checkpoint(folder, "gone", 12 * 1024))
    shutil.rmtree(folder.run("gone"))
    for kept in (3, 1):
        checkpoints = sorted((folder.run("resumed") / "checkpoints").iterdir(), key=lambda path: int(path.name[7:]))
        assert checkpoints[0].name == "tokens-0"
        for path in [*checkpoints[kept:], *(folder.run("resumed") / "exports").iterdir()]:
            shutil.rmtree(path)
        (folder.run("resumed") / "summary.json").unlink()
        train(load_run_config(folder.run("resumed") / "config.yaml"), Console(quiet=True))
        assert folder.end("resumed") == folder.end("straight")


def test_other_hyperparameters_are_the_branchs(folder: Folder) -> None:
    start = checkpoint(folder, "straight", SIX_STEPS)
    wanted = ["optimizer.name=stableadamw", "optimizer.weight_decay=0.5", "optimizer.beta2=0.9"]
    again = "{name: again, tokens: 3K, max_seq_len: 128, global_batch_size: 8, lr: 5e-3, warmup: 2K}"
    folder.train("other", [again], *wanted, start=start)
    before, after = (
        json.loads((Path(path) / "state.json").read_text())["optimizer"]["groups"]
        for path in (start, checkpoint(folder, "other", 0))
    )
    assert [group["weight_decay"] for group in before] == [1e-5, 0.0]
    assert [(group["weight_decay"], group["beta2"]) for group in after] == [(0.5, 0.9), (0.0, 0.9)]
    for name in ("model", "optimizer"):
        file = f"{name}.safetensors"
        ours, theirs = (load_file(Path(path) / file) for path in (start, checkpoint(folder, "other", 0)))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = [json.loads(line) for line in (folder.run("other") / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([5e-3 * 1024 / 2000, 5e-3, 5e-3])


def test_weights_only_starts_the_rest_anew(folder: Folder) -> None:
    start = checkpoint(folder, "straight", SIX_STEPS)
    phase = STABLE.format(tokens="2K", warmup="1K")
    folder.train("anew", [phase], start="{checkpoint: " + start + ", weights_only: true}")
    first = Path(checkpoint(folder, "anew", 0))
    assert load_file(first / "optimizer.safetensors") == {}
    ours, theirs = (load_file(path / "model.safetensors") for path in (first, Path(start)))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ledgers = [(folder.run(name) / "ledger.jsonl").read_text().splitlines() for name in ("anew", "straight")]
    assert json.loads(ledgers[0][0])["step"] == 0
    assert all(lane[0] == 0 and lane[3] == [] for lane in json.loads(ledgers[0][0])["lanes"])
    folder.train("other-seed", [phase], "seed=3", start="{checkpoint: " + start + ", data: restart}")
    record = json.loads((folder.run("other-seed") / "origin.json").read_text())
    assert (record["data"], record["steps"]) == ("restart", 6)
    assert load_file(Path(checkpoint(folder, "other-seed", 0)) / "optimizer.safetensors") != {}


def test_a_hugging_face_folder_starts_with_its_loss(folder: Folder) -> None:
    export = max((folder.run("straight") / "exports").iterdir(), key=lambda path: int(path.name[7:]))
    phase = (
        "{name: more, tokens: 1K, max_seq_len: 128, global_batch_size: 8, lr: 1e-4, rope_theta: {global_layers: 20000}}"
    )
    folder.train("continual", [phase], "model.attention.out_dropout=0.0", start=str(export))
    config = load_run_config(folder.run("continual") / "config.yaml")
    batch = next(iter(build_loader(PhasePlan(config).loader_config(config))))
    model, total = AutoModelForMaskedLM.from_pretrained(export).eval(), 0.0
    bounds = batch["cu_seqlens"].tolist()
    with torch.no_grad():
        for begin, end in pairwise(bounds):
            logits = model(batch["input_ids"][None, begin:end]).logits[0]
            total += float(cross_entropy(logits, batch["labels"][begin:end], reduction="sum"))
    assert folder.losses("continual")[0] == pytest.approx(total / batch["masked"], rel=1e-5)
    assert json.loads((folder.run("continual") / "origin.json").read_text())["steps"] == 0


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["from={runs}/straight/checkpoints/tokens-6145"], "from: {runs}/straight/checkpoints/tokens-6145: neither a checkpoint, a run nor a Hugging Face folder: did you mean '{runs}/straight/checkpoints/tokens-6144'?"),
        (["from={runs}/strait"], "did you mean '{runs}/straight'?"),
        (["from={runs}/nope"], "neither a checkpoint, a run nor a Hugging Face folder: in {runs} there are: "),
        (["from={runs}/damaged/checkpoints/tokens-6144"], "model.safetensors: damaged checkpoint file: expected"),
        (["from={runs}/refused"], "is this run's own folder: give the branch a name of its own"),
        (["from.chekpoint=x"], "from: unknown key 'chekpoint', did you mean 'checkpoint'?"),
        (["model.hidden_size=64"], "model.hidden_size: 64 here, 32 in {start}: a branch keeps the architecture"),
        (["model.mlp=mlp"], "model.mlp.name: mlp here, glu in {start}: a branch keeps the architecture"),
        (["model.norm.bias=true"], "from: {start}: encoder.embedding.norm.bias is missing there"),
        (["optimizer=adamw"], "optimizer: 'adamw' here, 'stableadamw' in the state of {start}: give that, or say `from: "),
        (["seed=3"], "seed: 3 here, 17 where {start} was trained: make them equal, or say `from: "),
        (["data.packing=false"], "data.packing: False here, True where {start} was trained"),
        (["data.lanes=2"], "data.lanes: 2 here, 4 where {start} was trained"),
        (["data.block_documents=20"], "data.block_documents: 20 here, 10 where {start} was trained"),
        (["data.streams.email-code.path={dataset}/async-code"], "data.streams.email-code: shards "),
        (["from={runs}/straight/checkpoints/tokens-20480"], "phases[0].rope_theta.global_layers: {runs}/straight/checkpoints/tokens-20480 was trained at 20000, this model has 10000: say which"),
        (["from={other}"], "data.tokenizer: {dataset}/tokenizer: is not the tokenizer of {other}: "),
        (["from={relabelled}"], "data.tokenizer: {dataset}/tokenizer: is not the tokenizer that {relabelled} was trained with"),
    ],
)  # fmt: skip
def test_a_branch_that_cannot_start_is_one_line(folder: Folder, overrides: list[str], line: str) -> None:
    """And leaves nothing behind."""
    runs, start = folder.folder / "runs", checkpoint(folder, "straight", SIX_STEPS)
    names = {"runs": str(runs), "start": start, "dataset": str(folder.dataset)}
    names |= {"other": str(other_tokenizer(folder)), "relabelled": str(relabelled(folder))}
    if not (runs / "damaged").exists():
        shutil.copytree(runs / "straight", runs / "damaged")
        file = runs / "damaged" / "checkpoints" / "tokens-6144" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    phase = STABLE.format(tokens="2K", warmup="0").replace("global_batch_size: 8", "global_batch_size: 4")
    folder.config("refused", [phase])
    given = [override.format(**names) for override in overrides]
    if not given[0].startswith("from"):
        given.append(f"from={start}")
    file = str(folder.folder / "refused.yaml")
    done = CliRunner().invoke(main.app, ["train", file, *given])
    assert done.exit_code == 2, done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert line.format(**names) in done.stderr
    assert not (runs / "refused").exists()


def other_tokenizer(folder: Folder) -> Path:
    """An export with two tokens exchanged."""
    path = folder.folder / "other-tokenizer"
    if not path.exists():
        exports = sorted((folder.run("straight") / "exports").iterdir(), key=lambda path: int(path.name[7:]))
        shutil.copytree(exports[0], path)
        file = path / "tokenizer.json"
        text = json.loads(file.read_text())
        vocabulary: dict[str, Any] = text["model"]["vocab"]
        first, second = sorted(vocabulary, key=vocabulary.__getitem__)[100:102]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file.write_text(json.dumps(text))
    return path


def relabelled(folder: Folder) -> Path:
    """A whole checkpoint, in a run folder, that says it was trained with another tokenizer."""
    run = folder.folder / "relabelled"
    path = run / "checkpoints" / "tokens-6144"
    if not run.exists():
        shutil.copytree(Path(checkpoint(folder, "straight", SIX_STEPS)), path)
        shutil.copy(folder.run("straight") / "config.yaml", run)
        state = json.loads((path / "state.json").read_text())
        state["run"]["tokenizer"] = "another"
        data = json.dumps(state).encode()
        (path / "state.json").write_bytes(data)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["state.json"] = {"bytes": len(data), "xxh3_64": xxhash.xxh3_64_hexdigest(data)}
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_what_fits_but_differs_is_said(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    phase = STABLE.format(tokens="2K", warmup="0")
    start = checkpoint(folder, "straight", SIX_STEPS)
    config = folder.config("said", [phase], "model.norm.eps=1e-6", start=start)
    with caplog.at_level(logging.WARNING):
        assert read_origin(config) is not None
    assert f"model.norm.eps: 1e-06 here, 1e-05 in {start}" in caplog.text
    (folder.folder / "empty" / "checkpoints").mkdir(parents=True)
    config = folder.config("said", [phase], start=str(folder.folder / "empty"))
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        read_origin(config)
