"""Real runs in real processes for the tests: a small dataset of this Python's own text, and the command line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.process import ROOT, command, environment
from tests.helpers.ranks import Forked, shared_ranks

PYTHON_LIBRARY = Path(os.__file__).parent

PREPARE = """
output: {output}
tokenizer: {{name: train, vocab_size: 512, sample_bytes: 200K}}
validation_fraction: 0.2
shard_bytes: 64K
streams:
  async-code:
    source: {{name: code, paths: ["{library}/asyncio", "{library}/multiprocessing", "{library}/json"]}}
  email-code:
    source: {{name: code, paths: ["{library}/email", "{library}/xml", "{library}/unittest"]}}
"""

TRAIN = """
name: small
runs: {runs}
model:
  preset: modernbert-tiny
  vocab_size: 512
  hidden_size: 64
  num_attention_heads: 2
  num_hidden_layers: 3
  intermediate_size: 64
  init: {{name: full_megatron, std: 0.06}}
  attention: {{name: multihead, global_attn_every_n_layers: 3, window_per_side: 16, out_dropout: 0.1}}
data:
  tokenizer: {dataset}/tokenizer
  streams:
    async-code: {{path: {dataset}/async-code}}
    email-code: {{path: {dataset}/email-code}}
  block_documents: 10
phases:
  - {{name: stable, tokens: 40K, max_seq_len: 128, global_batch_size: 8, lr: 2e-3, warmup: 5K}}
  - {{name: extension, tokens: 24K, max_seq_len: 512, global_batch_size: 4, rope_theta: {{global_layers: 160000}}}}
  - name: decay
    tokens: 24K
    schedule: one_minus_sqrt
    streams: {{async-code: {{weight: 3}}, email-code: {{weight: 1, min_length: 100}}}}
checkpoint: {{interval: 6K, keep: 2}}
evaluation: {{interval: 20K, max_rows: 8}}
trainer: {{log_interval: 1}}
"""
STEPS = 40 + 12 + 12


def launched(processes: int, *arguments: str) -> list[str]:
    """The same command with so many processes."""
    return [str(Path(sys.executable).parent / "composer"), "-n", str(processes), *command(*arguments)[1:]]


def rank(launcher: int, number: int) -> psutil.Process:
    """A rank of a launcher's process id."""
    children = psutil.Process(launcher).children()
    return next(child for child in children if child.environ().get("RANK") == str(number))


def run(
    arguments: list[str], timeout: float = 300, extra: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command to its end. One of main.py is a fork of a process that has imported all, unless it can not be (what an
    import does is then done anew)."""
    variables = environment() | (extra or {})
    if arguments[:2] == command() and shared_ranks().can_have(variables):
        return shared_ranks().command(arguments[2:], variables, timeout)
    return subprocess.run(
        arguments, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )


def train_alone(config: Path, *overrides: str) -> None:
    """`train CONFIG` to its end, with one thread as a job of one core has: more add up in another order."""
    done = run(command("train", str(config), *overrides))
    assert done.returncode == 0, done.stderr


def start(config: Path) -> Forked:
    """`train CONFIG` in the background."""
    return shared_ranks().start("train", str(config))


def prepare_dataset(folder: Path) -> Path:
    file = folder / "prepare.yaml"
    file.write_text(PREPARE.format(output=folder / "dataset", library=PYTHON_LIBRARY))
    done = run(command("prepare", str(file)))
    assert done.returncode == 0, done.stderr
    return folder / "dataset"


def write_config(folder: Path, dataset: Path, endless: bool = False) -> Path:
    """A run file whose runs folder is inside `folder`.

    endless: the first phase outlasts every test, on a machine of any speed: for runs that a test ends while they train.
    """
    folder.mkdir(exist_ok=True)
    file = folder / "train.yaml"
    text = TRAIN.format(runs=folder / "runs", dataset=dataset)
    file.write_text(text.replace("tokens: 40K", "tokens: 400M") if endless else text)
    return file


def metrics(folder: Path, key: str = "loss") -> dict[int, Any]:
    """By step."""
    file = folder / "runs" / "small" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return {line["step"]: line[key] for line in lines if key in line}


def final_weights(folder: Path) -> dict[str, bytes]:
    """The weight files at the end, of the last checkpoint and of every export, and the exports' model cards."""
    run_folder = folder / "runs" / "small"
    last = max((run_folder / "checkpoints").glob("tokens-*"), key=lambda path: int(path.name.split("-")[1]))
    files = [last / "model.safetensors", last / "optimizer.safetensors"]
    files += sorted((run_folder / "exports").glob("*/model.safetensors"))
    files += sorted((run_folder / "exports").glob("*/README.md"))
    return {str(file.relative_to(run_folder)): file.read_bytes() for file in files}


def wait_for_step(folder: Path, step: int, process: Forked, timeout: float = 120) -> None:
    start = time.monotonic()
    while process.poll() is None and max(metrics(folder), default=0) < step:
        assert time.monotonic() - start < timeout, "the run does not move"
        time.sleep(0.01)


GATE = str(ROOT / "tests" / "helpers" / "gate.py")  # a run file's `imports`: no module of ours may import it too


def wait_at_gate(folder: Path, ranks: int, launcher: int, timeout: float = 120) -> None:
    """Until so many ranks of a run wait at its gate (tests/helpers/gate.py); fails when their launcher ends before."""
    end = time.monotonic() + timeout
    while not all((folder / f"waiting-{rank}").exists() for rank in range(ranks)):
        assert psutil.pid_exists(launcher)
        assert psutil.Process(launcher).status() != psutil.STATUS_ZOMBIE, "the run ended before the gate"
        assert time.monotonic() < end, "the run does not come to the gate"
        time.sleep(0.01)


def open_gate(folder: Path) -> None:
    (folder / "go").touch()
