"""`main.py decay`: what goes on in the branch as it did in the run, wherever the run stood."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from callbacks.step_log import read_lines
from commands.decay import decay_config
from recipe.config import load_run_config
from tests.helpers.in_process import PER_STEP, go, invoke, last
from tests.helpers.tiny import ROW, ROWS, write_config

FIRST: dict[str, Any] = {
    "name": "first",
    "tokens": 2 * PER_STEP,
    "max_seq_len": ROW,
    "global_batch_size": ROWS,
    "lr": 1e-2,
}


def decay(run: Path, steps: int, *arguments: str) -> Path:
    """The branch's folder."""
    before = {*run.parent.iterdir()}
    invoke("decay", str(run), "--tokens", str(steps * PER_STEP), *arguments)
    (branch,) = {*run.parent.iterdir()} - before
    return branch


def test_a_warmup_rises_and_then_lr_falls(tiny_data: Path, tmp_path: Path) -> None:
    run = go(write_config(tmp_path / "Läufe 😀", tiny_data, 1, "full", phases=[FIRST]))
    branch = decay(run, 8, "--schedule", "linear", f"phases.0.warmup={4 * PER_STEP}", "phases.0.schedule.final=0")
    rates = [line["lr"] for line in read_lines(branch / "metrics.jsonl") if "lr" in line]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.slow
def test_lanes_and_held_out_rows_are_the_runs(tiny_data: Path, tmp_path: Path) -> None:
    """After rows of twice the length, in batches of more: the branch begins with the loss that the run ended with."""
    longer = {"name": "longer", "tokens": 4 * PER_STEP, "max_seq_len": 2 * ROW, "global_batch_size": 2 * ROWS}
    phases = [{**FIRST, "global_batch_size": ROWS // 2}, longer]
    changes: dict[str, Any] = {"phases": phases, "data": {"lanes": None}, "evaluations": ["held_out_documents"]}
    run = go(write_config(tmp_path, tiny_data, 1, "full", **changes))
    branch = decay(run, 4)
    ended, begins = (json.loads((each / "summary.json").read_text()) for each in (run, branch))
    assert begins["validation_before"]["loss"] == pytest.approx(ended["validation"]["loss"], rel=1e-6)
    config = load_run_config(branch / "config.yaml")
    assert (config.lanes, config.evaluations[0].max_seq_len) == (ROWS // 2, ROW)


@pytest.mark.parametrize("name", ["stableadamw", pytest.param("decoupled_adamw", marks=pytest.mark.slow)])
def test_weights_decay_on_as_they_did(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """From a quarter of the peak. Against the same branch with a decay that does not know of peaks: weight_decay * lr,
    with the run's weight_decay over the run's peak."""
    groups = [{"match": "encoder.embedding.*", "weight_decay": 0.2}]
    falling = {"name": "linear", "final": 0.001}
    phases = [{**FIRST, "tokens": 4 * PER_STEP, "schedule": falling}]
    optimizer = {"name": name, "weight_decay": 0.1, "groups": groups}
    run = go(write_config(tmp_path / "a", tiny_data, 1, "full", phases=phases, optimizer=optimizer))
    branch = decay(run, 3, "--schedule", "constant")
    lr = 1e-2 * (0.001 + 0.999 / 4)
    assert "optimizer.weight_decay: 0.025075 in place of 0.1" in caplog.text
    plain = {"name": "stableadamw", "decouple_lr": False} if name == "stableadamw" else {"name": "adamw"}
    over_peak = [{**groups[0], "weight_decay": 20.0}]
    own = {**FIRST, "tokens": 3 * PER_STEP, "lr": lr}
    changes: dict[str, Any] = {"phases": [own], "optimizer": {**plain, "weight_decay": 10.0, "groups": over_peak}}
    state = run / "checkpoints" / f"tokens-{4 * PER_STEP}"
    if name != "stableadamw":  # of the other's name, which is all that differs
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("name: decoupled_adamw", "name: adamw"))
    written = go(write_config(tmp_path / "b", tiny_data, 1, "full", **{"from": str(state)}, **changes))
    before, ours, theirs = (
        load_file(state / "model.safetensors"),
        last(branch, "model.safetensors"),
        last(written, "model.safetensors"),
    )
    for weight, tensor in ours.items():
        moved = (tensor - before[weight]).abs().max()
        torch.testing.assert_close(tensor, theirs[weight], rtol=0, atol=float(1e-3 * moved))
    caplog.clear()
    own_decay = decay_config(run, PER_STEP, None, None, "linear", ["optimizer.weight_decay=0.3"], 1)
    assert own_decay.optimizer.weight_decay == 0.3
    assert "in place of" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clm", "diffusion"])
def test_a_phase_with_targets_of_its_own_decays(tiny_data: Path, tmp_path: Path, objective: str) -> None:
    """Even where an earlier phase reads a masking of the run's own."""
    phases = [FIRST, {"name": "own", "tokens": PER_STEP, "objective": objective}]
    run = go(write_config(tmp_path / "a", tiny_data, 1, "full", phases=phases, masking={"rate": 0.2}))
    branch = decay(run, 2)
    own = {**FIRST, "objective": objective, "schedule": "one_minus_sqrt"}
    start = str(run / "checkpoints" / f"tokens-{3 * PER_STEP}")
    written = go(write_config(tmp_path / "b", tiny_data, 1, "full", phases=[own], **{"from": start}))
    ours, theirs = last(branch, "model.safetensors"), last(written, "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
