"""Whole runs: start, kill, resume, many processes, damage, export. Real Composer, real shards, real processes."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from commands.inspect_step import inspect_step
from data.feed.batches import SEEN
from data.feed.loader import build_loader
from flexbert import from_hf
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.ranks import Ranks
from tests.helpers.runs import (
    STEPS,
    command,
    final_weights,
    metrics,
    prepare_dataset,
    run,
    start,
    wait_for_step,
    write_config,
)
from tests.helpers.servers import Bucket, run_moto, s3_environment
from training.checkpoints.files import list_checkpoints, newest_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_dataset(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A folder with an uninterrupted run in runs/small."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(command("train", str(write_config(folder, dataset))))
    assert done.returncode == 0, done.stderr
    assert "masked accuracy" in done.stdout
    return folder


def test_the_run_folder_holds_everything(straight: Path) -> None:
    folder = straight / "runs" / "small"
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "ledger.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "exports",
        "tensorboard",
        "summary.json",
    } <= names
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((folder / "tensorboard").rglob("events.out.tfevents.*"))
    assert not list(folder.rglob(".unfinished-*"))
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"].startswith("2.7.0")
    # the steps' tokens by hand: 40 of 8 x 128, then 24 of 4 x 512
    ends = [40 * 1024, 40 * 1024 + 12 * 2048, 40 * 1024 + 24 * 2048]
    assert sorted(path.name for path in (folder / "exports").iterdir()) == sorted(f"tokens-{end}" for end in ends)
    kept = {path.name for path in list_checkpoints(folder / "checkpoints")}
    assert {f"tokens-{end}" for end in ends} <= kept
    assert len(kept) == 3 + 2


def test_the_summary_agrees_with_the_metrics(straight: Path) -> None:
    folder = straight / "runs" / "small"
    summary = json.loads((folder / "summary.json").read_text())
    losses = metrics(straight)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert sum(list(losses.values())[-5:]) < sum(list(losses.values())[:5]) - 2.5  # it learns
    assert summary["tokens"] == metrics(straight, "real_tokens")[STEPS] == sum(summary["stream_tokens"].values())
    assert summary["packing_efficiency"] == summary["tokens"] / (40 * 1024 + 24 * 2048)
    assert summary["tokens_per_second"] > 0
    assert summary["seconds"] > 0
    assert Path(summary["export"]).is_dir()
    validation = summary["validation"]
    assert validation == metrics(straight, "validation")[STEPS]
    assert validation["masked_accuracy"] > validation["unigram_accuracy"] > 0
    streams = validation["streams"].values()
    masked = sum(stream["masked_tokens"] for stream in streams)
    assert validation["loss"] == pytest.approx(sum(s["loss"] * s["masked_tokens"] for s in streams) / masked)
    assert validation["masked_tokens"] == masked
    phases = metrics(straight, "phase")
    assert [phases[step] for step in (1, 40, 41, 52, 53, STEPS)] == ["stable"] * 2 + ["extension"] * 2 + ["decay"] * 2
    rates = metrics(straight, "lr")
    assert rates[1] == pytest.approx(2e-3 * 1024 / 5000)
    assert rates[40] == rates[52] == rates[53] == 2e-3
    assert rates[STEPS] == pytest.approx(2e-3 * (0.001 + 0.999 * (1 - (11 / 12) ** 0.5)))


def test_any_step_can_be_replayed(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `inspect RUN --step N` prints is the loader's batch of that step, and names the documents it is made of."""
    folder = straight / "runs" / "small"
    config = load_run_config(folder / "config.yaml")
    loader = build_loader(PhasePlan(config).loader_config(config))
    batches = dict(enumerate(loader, 1))
    streams = dict(zip(config.data.streams, loader.dataset.streams, strict=True))
    manifest = loader.dataset.streams[0].manifest
    for step in (1, 30, 41, 53, STEPS):
        inspect_step(folder, step, 0, True, Console())
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        ids, labels = [], []
        for line in lines:
            ids += [manifest.cls_token_id, *line["input_ids"], manifest.sep_token_id]
            labels += [-100, *line["labels"], -100]
            stream = streams[line["stream"]]
            shard = [info.file for info in stream.manifest.shards].index(line["shard"])
            tokens = stream.document(shard, line["document"], line["start"], line["stop"])
            both = zip(line["input_ids"], line["labels"], strict=True)
            assert [token if label == -100 else label for token, label in both] == tokens.tolist()
            if step > 52 and line["stream"] == "email-code":
                assert line["length"] >= 100
        assert ids == batches[step]["input_ids"].tolist()
        assert labels == batches[step]["labels"].tolist()
        assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    last = json.loads((folder / "ledger.jsonl").read_text().splitlines()[-1])
    seen = np.sum([batch["seen"] for batch in batches.values()], axis=0)
    assert last["step"] == STEPS
    assert last["streams"] == {
        name: dict(zip(SEEN, row.tolist(), strict=True)) for name, row in zip(streams, seen, strict=True)
    }
    shown = run(command("inspect", str(folder), "--step", "41", "--rows", "1"))
    assert shown.returncode == 0, shown.stderr
    assert "the first 1 below" in shown.stdout
    assert "⟦" in shown.stdout
    wrong = run(command("inspect", str(folder), "--step", "65"))
    assert (wrong.returncode, wrong.stderr.strip()) == (2, f"error: --step: 65: {folder} has steps 1 to {STEPS}")


def test_every_export_is_what_transformers_loads(straight: Path, dataset: Path) -> None:
    thetas = []
    for export in sorted((straight / "runs" / "small" / "exports").iterdir(), key=lambda path: int(path.name[7:])):
        model = AutoModelForMaskedLM.from_pretrained(export).eval()
        thetas.append(model.config.global_rope_theta)
        tokenizer = AutoTokenizer.from_pretrained(export)
        ids = tokenizer("def encode(self, value):\n    return value", return_tensors="pt")
        with torch.no_grad():
            theirs = model(**ids).logits[0]
            ours = (
                from_hf(export)
                .eval()(ids["input_ids"][0], torch.tensor([0, theirs.shape[0]], dtype=torch.int32), theirs.shape[0])
                .logits
            )
        assert ours is not None
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert "masked accuracy" in (export / "README.md").read_text()
    assert thetas == [10000, 160000, 160000]
    fill = pipeline("fill-mask", model=str(export), device="cpu")
    assert len(fill("import [MASK]")) == 5  # pyright: ignore[reportArgumentType]


def test_a_finished_run_says_so(straight: Path) -> None:
    before = final_weights(straight)
    done = run(command("train", str(straight / "train.yaml")))
    assert done.returncode == 0
    assert "this run is finished" in done.stdout
    assert final_weights(straight) == before


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_at_random_moments_changes_nothing(straight: Path, dataset: Path, tmp_path: Path, seed: int) -> None:
    """Kills after random steps plus a random moment, so also while a checkpoint, an evaluation or an export is written;
    once the newest checkpoint is truncated besides."""
    config = write_config(tmp_path / "killed", dataset)
    folder, rng = tmp_path / "killed", random.Random(seed)
    for kill in range(4):
        process = start(config)
        wait_for_step(folder, max(metrics(folder), default=0) + rng.randrange(1, 16), process)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if kill == 2:
            newest = list_checkpoints(folder / "runs" / "small" / "checkpoints")[-1] / "model.safetensors"
            os.truncate(newest, newest.stat().st_size // 2)
    done = run(command("train", str(config)))
    assert done.returncode == 0, done.stderr
    assert final_weights(folder) == final_weights(straight)
    assert metrics(folder) == metrics(straight)
    ours, theirs = (json.loads((path / "runs/small/summary.json").read_text()) for path in (folder, straight))
    for key in ("tokens", "packing_efficiency", "validation", "stream_tokens", "steps"):
        assert ours[key] == theirs[key]


def test_two_processes_train_the_same(ranks: Ranks, straight: Path, dataset: Path, tmp_path: Path) -> None:
    ranks.train(2, str(write_config(tmp_path / "two", dataset)))
    ours, theirs = metrics(tmp_path / "two"), metrics(straight)
    assert sorted(ours) == list(range(1, STEPS + 1))
    assert [ours[step] for step in ours] == pytest.approx([theirs[step] for step in ours], rel=2e-4)
    assert [ours[step] for step in range(1, 11)] == pytest.approx([theirs[step] for step in range(1, 11)], rel=1e-5)
    assert metrics(tmp_path / "two", "real_tokens") == metrics(straight, "real_tokens")
    left, right = (json.loads((path / "runs/small/summary.json").read_text()) for path in (tmp_path / "two", straight))
    assert left["validation"]["loss"] == pytest.approx(right["validation"]["loss"], rel=1e-3)
    assert left["validation"]["masked_tokens"] == right["validation"]["masked_tokens"]


@pytest.mark.slow
def test_how_a_step_is_computed_changes_only_rounding(dataset: Path, tmp_path: Path) -> None:
    """Microbatches of any size, blocks computed again in backward. Compiled blocks: tests/training/test_compiled.py."""
    losses = []
    for number, ways in enumerate(("=8", "=3 activation_checkpointing=2", "=1")):
        settings = [f"trainer.{way}" for way in f"microbatch_size{ways}".split()]
        config = write_config(tmp_path / str(number), dataset)
        settings += ["phases.0.tokens=8K", "phases.0.warmup=1K", "phases.1.tokens=8K", "phases.2.tokens=8K"]
        settings += ["phases.1.max_seq_len=256"]
        done = run(command("train", str(config), *settings), timeout=600)
        assert done.returncode == 0, done.stderr
        losses.append(list(metrics(tmp_path / str(number)).values()))
    assert len(losses[0]) == 3 * 8
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], rel=2e-4)


def test_another_config_is_refused_on_resume(straight: Path) -> None:
    done = run(command("train", str(straight / "train.yaml"), "phases.2.lr=1e-4", "trainer.log_interval=5"))
    assert done.returncode == 2
    assert "phases.2.lr was not set, now 0.0001" in done.stderr
    assert "log_interval" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_dry_run_says_what_the_run_will_be(straight: Path) -> None:
    done = run(command("train", str(straight / "train.yaml"), "--dry-run", "name=other"))
    assert done.returncode == 0, done.stderr
    for word in ("40,960", "24,576", "64 steps", "async-code", "160000", "one_minus_sqrt", "6,000 tokens"):
        assert word in done.stdout, word
    assert not (straight / "runs" / "other").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_shard_stops_the_run_and_harms_no_checkpoint(dataset: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(dataset, tmp_path / "copy")
    config = write_config(tmp_path / "run", tmp_path / "copy", endless=True)
    process = start(config)
    wait_for_step(tmp_path / "run", 20, process)
    process.kill()
    process.wait()
    before = newest_checkpoint(tmp_path / "run/runs/small/checkpoints")
    assert before is not None
    shards = sorted((tmp_path / "copy" / "email-code" / "train").rglob("*.mds"))
    assert shards
    for shard in shards:
        data = bytearray(shard.read_bytes())
        if damage == "truncated":
            del data[-200:]
        else:
            data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    done = run(command("train", str(config)))
    assert done.returncode == 1, done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert any(str(shard) in line for shard in shards)
    assert "stream 'email-code'" in line
    assert "Traceback" not in done.stderr
    after = newest_checkpoint(tmp_path / "run/runs/small/checkpoints")
    assert after is not None
    assert after.state["step"] >= before.state["step"]


def test_other_shards_are_refused_on_resume(dataset: Path, tmp_path: Path) -> None:
    """The same files in another order are another dataset: a resumed run would repeat and lose documents."""
    shutil.copytree(dataset, tmp_path / "copy")
    config = write_config(tmp_path / "run", tmp_path / "copy", endless=True)
    process = start(config)
    wait_for_step(tmp_path / "run", 12, process)
    process.kill()
    process.wait()
    manifest = tmp_path / "copy" / "email-code" / "train" / "stream.json"
    content = json.loads(manifest.read_text())
    content["shards"].reverse()
    manifest.write_text(json.dumps(content))
    done = run(command("train", str(config)))
    assert done.returncode == 2
    assert "data.streams.email-code: its shards are not those that" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


WANDB = "loggers=[tensorboard,{name: wandb,project: test,mode: offline}]"


def test_wandb_offline(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run", dataset)
    short = ["phases.0.tokens=4K", "phases.0.warmup=0", "phases.1.tokens=2K", "phases.2.tokens=2K"]
    done = run(command("train", str(config), WANDB, *short))
    assert done.returncode == 0, done.stderr
    logged = list((tmp_path / "run" / "runs" / "small" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logged) == 1
    content = logged[0].read_bytes()
    assert b"train/loss" in content
    assert b"validation/streams/email-code/masked_accuracy" in content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_one_line(dataset: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the loader's worker, too."""
    config = write_config(tmp_path / "run", dataset, endless=True)
    process = start(config)
    wait_for_step(tmp_path / "run", 3, process)
    os.killpg(process.pid, number)
    assert process.wait(60) == 85
    saved = newest_checkpoint(tmp_path / "run" / "runs" / "small" / "checkpoints")
    assert saved is not None
    assert saved.state["step"] == max(metrics(tmp_path / "run"))
    assert process.errors().strip().splitlines() == [
        f"{number.name}: the run finishes its step, saves and ends"
        + ("; a second Ctrl-C ends it at once, unsaved" if number == signal.SIGINT else ""),
        "interrupted: the same command goes on from the newest checkpoint",
    ]


def test_two_processes_cannot_share_a_run_folder(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run", dataset, endless=True)
    process = start(config)
    wait_for_step(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGSTOP)
    try:
        done = run(command("train", str(config)))
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 1
    assert f"small: process {process.pid} is training this run" in done.stderr


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    config = write_config(tmp_path / "run", dataset)
    done = run(command("train", str(config), f"data.tokenizer={tmp_path / 'tokenizer'}"))
    assert done.returncode == 2
    assert "data.tokenizer: " in done.stderr
    done = run(command("train", str(config), "data.tokenizer=nowhere"))
    assert done.returncode == 2
    assert "data.tokenizer: nowhere: no such folder" in done.stderr
    done = run(command("train", str(config), "model.vocab_size=576"))
    assert done.returncode == 2
    assert "set model.vocab_size=512" in done.stderr
    assert not (tmp_path / "run" / "runs").exists()


def test_streams_on_s3_train_alike(straight: Path, dataset: Path, tmp_path: Path) -> None:
    """From a real S3 server, tokenizer too, with a cache that cannot hold it all: the same weights, to the last bit."""
    folder = tmp_path / "run"
    config = write_config(folder, dataset)
    with run_moto() as endpoint:
        url = Bucket(endpoint).upload(dataset, "small")
        text = config.read_text().replace(f": {dataset}/", f": {url}/")
        assert str(dataset) not in text
        limit = 4 * max(file.stat().st_size for file in dataset.rglob("*.mds"))
        remote = f"  cache: {tmp_path}/cache\n  cache_limit: {limit}\n"
        config.write_text(text.replace("  block_documents: 10\n", f"  block_documents: 10\n{remote}"))
        extra = {**s3_environment(endpoint), "XDG_CACHE_HOME": str(tmp_path / "home")}
        plan = run(command("train", str(config), "--dry-run"), extra=extra)
        done = run(command("train", str(config)), extra=extra)
        shown = run(command("inspect", url), extra=extra)
    assert f"remote: 2 of 2 streams, 0.0 GB; cache {tmp_path}/cache of" in plan.stdout
    assert done.returncode == 0, done.stderr
    assert shown.returncode == 0, shown.stderr
    for name in ("async-code/train", "async-code/validation", "email-code/train", "email-code/validation"):
        assert f"{name} " in shown.stdout
    assert shown.stdout.count("of the right size") == 4
    assert shown.stdout.count(f"{url}/tokenizer") == 4
    assert "not the one" not in shown.stdout
    assert metrics(folder) == metrics(straight)
    ours, theirs = final_weights(folder), final_weights(straight)
    assert {name: data for name, data in ours.items() if name.endswith("safetensors")} == {
        name: data for name, data in theirs.items() if name.endswith("safetensors")
    }
    assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir() if file.is_file()) <= limit
