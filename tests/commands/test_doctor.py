"""`main.py doctor`: what is fine is called fine, and each fault that is planted is found, with what to do."""

import functools
import platform
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from torch import Tensor
from typer.testing import CliRunner

from commands import doctor
from commands.sizes import disk_need
from data.tokenizer import fingerprint
from flexbert import parity
from flexbert.accounting import count_parameters
from flexbert.kernels.attention import KERNELS
from main import app
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.ranks import Ranks
from tests.helpers.servers import BUCKET, Bucket, free_port
from tests.helpers.synthetic import documents, write_stream
from tests.helpers.tiny import ROW, ROWS, write_config
from tests.helpers.tokenizer import tokenizer_of

RUN = """
name: small
runs: {folder}/runs
model: {{preset: modernbert-tiny, vocab_size: 512}}
data:
  tokenizer: {folder}/tokenizer
  cache: {folder}/cache
  cache_limit: 100mb
  download_retries: 0
  streams: {{near: {{path: {folder}/near}}}}
phases: [{{name: only, tokens: 1M, max_seq_len: 128, global_batch_size: 4, lr: 1e-3}}]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run file that fits this machine; its stream and tokenizer are there."""
    tokenizer_of(512).save_pretrained(tmp_path / "tokenizer")
    for split in ("train", "validation"):
        write_stream(tmp_path / "near", split, documents(0, 50, 50), tokenizer=fingerprint(tmp_path / "tokenizer"))
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(folder=tmp_path))
    return file


def checks(config: Path, *overrides: str) -> tuple[bool, dict[str, list[str]], str]:
    """(nothing failed, cells by the name of the check, all that was printed)."""
    console = Console(record=True, width=10_000, quiet=False, force_terminal=False)
    fine = doctor.doctor(load_run_config(config, overrides), console)
    text = console.export_text()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return fine, {row[0]: row[1:] for row in rows}, text


def test_a_machine_that_fits_is_fine(config: Path) -> None:
    fine, rows, text = checks(config)
    assert fine, text
    stack = doctor.stack_in_use()
    assert rows["stack"] == ["ok", f"{stack.name} ({stack.pins}), torch {torch.__version__}", ""]
    assert rows[stack.pins][0] == rows["Python"][0] == "ok"
    assert rows["attention: sdpa"][0] == "ok"
    assert "differs from eager by" in rows["attention: sdpa"][1]
    assert rows["stream near"][0] == rows["tokenizer"][0] == rows["run folder"][0] == "ok"
    assert not (config.parent / "runs").exists()
    assert "nothing stands against training" in text


def test_faults_of_the_run_file_are_found(config: Path, tmp_path: Path) -> None:
    missing = f"data.streams.far.path={tmp_path}/far"
    fine, rows, _ = checks(config, missing, "runs=/proc/nowhere", "model.vocab_size=576")
    assert not fine
    assert rows["stream far"][0] == "FAIL"
    assert "no such stream folder" in rows["stream far"][1] + rows["stream far"][2]
    assert rows["stream near"][0] == "ok"
    assert rows["run folder"][0] == "FAIL"
    assert rows["vocabulary"][0] == "FAIL"
    assert "model.vocab_size=512" in rows["vocabulary"][2]
    fine, rows, _ = checks(config, "model.attention.backend=flash2", "data.cache_limit=100tb")
    assert not fine
    assert rows["attention: flash2"][0] == "FAIL"
    assert "sdpa" in rows["attention: flash2"][2]


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flex"])
def test_the_kernel_of_the_initial_layers_is_checked(config: Path, backend: str) -> None:
    initial = f"model.initial_layers={{count: 1, attention: {{name: multihead, backend: {backend}}}}}"
    fine, rows, _ = checks(config, initial)
    state, _, fix = rows[f"attention: {backend}"]
    if state != "ok":  # where the machine has no such kernel
        assert not fine
        assert (state, fix) == ("FAIL", "model.initial_layers.attention.backend: auto, or sdpa")


def test_a_kernel_that_computes_otherwise_is_found(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sees one token too far to the left of its windows, which no shape or range would show."""
    right = KERNELS["sdpa"]

    def wrong(q: Tensor, k: Tensor, v: Tensor, plan: Any, window: tuple[int, int], *rest: Any) -> Tensor:
        return right(q, k, v, plan, window if window == (-1, -1) else (window[0] + 1, window[1] + 1), *rest)

    assert parity.disagreement("sdpa", "cpu").error < 1e-5
    monkeypatch.setitem(KERNELS, "sdpa", wrong)
    fine, rows, _ = checks(config)
    assert not fine
    assert rows["attention: sdpa"][0] == "FAIL"


def test_other_versions_are_found(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("# pins\n-c constraints.txt\nnumpy==0.1\nno-such-package==1.0\ntyper\n")
    (tmp_path / "requirements-gpu.txt").write_text("flash-attn==2.8.3\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    fine, rows, _ = checks(config)
    assert not fine
    state, found, fix = rows["requirements.txt"]
    assert state == "FAIL"
    assert "numpy 2" in found
    assert "no-such-package missing" in found
    assert "typer" not in found
    assert "install -r requirements.txt" in fix
    assert rows["requirements-gpu.txt"][0] == "-"


def test_the_stack_that_pins_the_installed_torch_is_the_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version("torch").split("+")[0]
    (tmp_path / "requirements.txt").write_text("torch==0.1\n")
    (tmp_path / "requirements-next.txt").write_text(f"torch=={installed}\nnumpy==0.1\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(platform, "python_version", lambda: "3.11.9")
    _, rows, _ = checks(config)
    assert rows["stack"][1].startswith("next (requirements-next.txt)")
    assert rows["Python"] == ["FAIL", "3.11.9", "make .venv-next anew with Python 3.12 or 3.13: make setup-next"]
    assert rows["requirements-next.txt"][0] == "FAIL"
    assert "install --no-deps -r requirements-next.txt" in rows["requirements-next.txt"][2]
    assert "requirements.txt" not in rows


def test_remote_streams_are_reached_or_not(config: Path, tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    shutil.copytree(tmp_path / "near", tmp_path / "served" / "far")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/far"
        fine, rows, text = checks(config, f"data.streams.far.path={url}")
        assert fine, text
        assert "remote, answered in" in rows["stream far"][1]
        assert rows["shard cache"][0] == "ok"
        _, rows, _ = checks(config, f"data.streams.far.path={url}", "data.cache_limit=100tb")
        assert rows["shard cache"][0] == "FAIL"
    finally:
        server.shutdown()
        server.server_close()
    fine, rows, _ = checks(config, f"data.streams.far.path=http://127.0.0.1:{free_port()}/far")
    assert not fine
    assert rows["stream far"][0] == "FAIL"


def test_disk_room_is_that_of_all_that_is_kept(config: Path, tmp_path: Path) -> None:
    """A step is 512 tokens, the phase 1954 steps: one in two ends a stretch of 1024 tokens, and the last is the end."""
    parameters = count_parameters(load_run_config(config).model)
    for overrides, checkpoints, numbers in (
        ((), 1 + 2 + 1, 3),
        (("checkpoint.keep_every=1024",), 977 + 2 + 1, 3),
        (("checkpoint.keep_every=1024", "checkpoint.keep=7", "checkpoint.keep_best=5"), 977 + 7 + 5 + 1, 3),
        (("checkpoint.keep_every=1024", "ema={decay: 0.9}"), 977 + 2 + 1, 4),
    ):
        loaded = load_run_config(config, overrides)
        need = disk_need(loaded, PhasePlan(loaded))
        assert need.checkpoint == 4 * numbers * parameters
        assert need.total == checkpoints * need.checkpoint + (numbers - 2) * 4 * parameters
        assert f"; about {need.total / 1e9:,.1f} GB for" in checks(config, *overrides)[1]["disk"][1]
    there = tmp_path / "runs/small/checkpoints/tokens-5"
    there.mkdir(parents=True)
    with (there / "model.safetensors").open("wb") as file:
        file.truncate(3 * 10**9)
    assert "of which 3.0 are there" in checks(config)[1]["disk"][1]


def test_disk_room_is_what_a_run_leaves(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    kept = {"keep": 2, "keep_every": 4 * ROWS * ROW}
    file = write_config(tmp_path, tiny_data, 11, checkpoint=kept, ema={"decay": 0.9})
    ranks.train(1, str(file))
    loaded = load_run_config(file)
    need = disk_need(loaded, PhasePlan(loaded))
    checkpoints, exports = (list((loaded.folder / part).iterdir()) for part in ("checkpoints", "exports"))
    # of 4, 8 and the end at 11 steps for ever, of 9 and 10 as the newest; room for one more while it is written
    assert len(checkpoints) == need.permanent + need.passing - 1 == 5
    assert len(exports) == need.exports == 2
    for folders, size in ((checkpoints, need.checkpoint), (exports, need.export)):
        for folder in folders:
            tensors = sum(sum(t.nbytes for t in load_file(part).values()) for part in folder.glob("*.safetensors"))
            assert tensors == pytest.approx(size, rel=0.02)  # with the optimizer's counters


def test_a_place_for_copies_is_tried(config: Path, s3: str, bucket: Bucket, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    fine, rows, text = checks(config, f"checkpoint.remote={url}")
    assert fine, text
    assert rows["remote checkpoints"] == ["ok", f"{url}/small: can be written, holds 0 checkpoints", ""]
    assert "Contents" not in bucket.client.list_objects_v2(Bucket=BUCKET, Prefix=tmp_path.name)
    fine, rows, _ = checks(config, "checkpoint.remote=s3://no-such-bucket/x")
    assert not fine
    assert rows["remote checkpoints"][0] == "FAIL"
    assert "there is no bucket 'no-such-bucket'" in rows["remote checkpoints"][1]
    assert "remote checkpoints" not in checks(config)[1]


def test_exit_codes(config: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["doctor", str(config)]).exit_code == 0
    assert CliRunner().invoke(app, ["doctor", str(config), "runs=/proc/nowhere"]).exit_code == 1
    assert CliRunner().invoke(app, ["doctor", str(tmp_path / "nothing.yaml")]).exit_code == 2
