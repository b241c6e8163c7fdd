"""A run file, and what becomes of it by a change."""

from pathlib import Path

RUN = """
name: demo
seed: 17
model: modernbert-tiny
data:
  tokenizer: datasets/demo/tokenizer
  streams: {prose: {path: datasets/demo/prose}}
phases:
  - name: stable
    tokens: 2M
    max_seq_len: 512
    global_batch_size: 8
    lr: 3e-3
    warmup: 100K
  - name: extension
    tokens: 400K
    max_seq_len: 2048
    global_batch_size: 4
    lr: 2e-3
    rope_theta: {global_layers: 160000}
  - name: decay
    tokens: 600K
    schedule: one_minus_sqrt
optimizer: stableadamw
"""


def edited(tmp_path: Path, old: str, new: str) -> Path:
    assert old in RUN
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace(old, new, 1))
    return file
