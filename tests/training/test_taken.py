"""What a run was given is used or said: of runs of a second."""

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from commands.inspect_step import inspect_step
from commands.launch import SlurmOptions, launch_slurm, parse_sbatch
from flexbert_core.schema import ConfigError, RunError
from recipe.config import load_run_config
from tests.helpers.runs import ROOT
from tests.helpers.tiny import ROW, ROWS, write_config
from training.checkpoints.files import list_checkpoints
from training.checkpoints.retention import facts_of
from training.trainer import train

EMA = {"decay": 0.6}
PER_STEP = ROWS * ROW


def go(file: Path, *overrides: str, console: Console | None = None) -> Path:
    """The run's folder."""
    config = load_run_config(file, overrides)
    train(config, console or Console(quiet=True))
    return config.folder


def said(file: Path, *overrides: str) -> str:
    console = Console(record=True, quiet=True, width=10_000)
    console.quiet = False
    with console.capture() as capture:
        go(file, *overrides, console=console)
    return " ".join(capture.get().split())


def last(run: Path, name: str) -> Any:
    return load_file(list_checkpoints(run / "checkpoints")[-1] / name)


def branch(folder: Path, data: Path, origin: Any, steps: int, **changes: Any) -> Path:
    return write_config(folder, data, steps, **{"from": origin}, **changes)


def test_a_branch_goes_on_with_the_average(tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that repeats the rest of its origin's phases ends with the same average, to the last bit."""
    caplog.set_level(logging.WARNING)
    straight = go(write_config(tmp_path / "straight", tiny_data, 6, ema=EMA))
    half = str(straight / "checkpoints" / f"tokens-{3 * PER_STEP}")
    same = go(branch(tmp_path / "same", tiny_data, half, 3, ema=EMA))
    assert "moving average" not in caplog.text
    ours, theirs = last(same, "ema.safetensors"), last(straight, "ema.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    card = (same / "exports" / f"tokens-{3 * PER_STEP}-ema" / "README.md").read_text()
    assert "6 updates" in card
    go(branch(tmp_path / "without", tiny_data, half, 1))
    assert f"from: {half}: has a moving average of the weights, which is left out: this run has no `ema`" in caplog.text
    weights_only = {"checkpoint": half, "weights_only": True}
    go(branch(tmp_path / "anew", tiny_data, weights_only, 1, ema=EMA))
    assert f"from: {half}: with weights_only the moving average of the weights begins anew" in caplog.text
    plain = go(write_config(tmp_path / "plain", tiny_data, 1))
    go(branch(tmp_path / "first", tiny_data, str(plain), 1, ema=EMA))
    assert "has no moving average of the weights: this one's begins anew" in caplog.text


def test_contradicting_keys_of_from_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    run = go(write_config(tmp_path / "run", tiny_data, 1))
    export = str(run / "exports" / f"tokens-{PER_STEP}")
    wrong = [
        ({"checkpoint": str(run), "weights_only": True, "data": "continue"}, "data: continue cannot hold with weights_only"),
        ({"checkpoint": export, "weights_only": True, "data": "continue"}, "data: continue cannot hold with weights_only"),
        ({"checkpoint": export, "weights_only": False}, f"from: {export}: weights_only: false cannot hold"),
        ({"checkpoint": export, "data": "continue"}, f"from: {export}: data: continue cannot hold"),
    ]  # fmt: skip
    for number, (origin, line) in enumerate(wrong):
        with pytest.raises(ConfigError) as error:
            go(branch(tmp_path / str(number), tiny_data, origin, 1))
        assert line in str(error.value)
        assert "\n" not in str(error.value)
    for number, origin in enumerate(({"checkpoint": export, "weights_only": True}, {"checkpoint": export, "data": "restart"})):  # fmt: skip
        assert go(branch(tmp_path / f"fine{number}", tiny_data, origin, 1)).is_dir()


def test_the_card_says_where_the_weights_come_from(tiny_data: Path, tmp_path: Path) -> None:
    first = go(write_config(tmp_path / "first", tiny_data, 2))
    second = go(branch(tmp_path / "second", tiny_data, str(first), 1))
    third = go(branch(tmp_path / "third", tiny_data, str(second), 1))
    export = third / "exports" / f"tokens-{PER_STEP}"
    hugging = go(branch(tmp_path / "hugging", tiny_data, str(export), 1))
    cards = {
        run: (run / "exports" / f"tokens-{steps * PER_STEP}" / "README.md").read_text()
        for run, steps in ((first, 2), (second, 1), (third, 1), (hugging, 1))
    }
    one = f"{PER_STEP:,} of {PER_STEP:,} planned tokens of: full, sparse, empty"
    assert "\nTrained on 512 of 512 planned tokens" in cards[first]
    for run, origin, before in ((second, first, 2), (third, second, 3)):
        where = list_checkpoints(origin / "checkpoints")[-1]
        line = f"Started from the weights of `{where}` (the run run, which had trained on {before * PER_STEP:,} tokens)"
        assert f"\n{line}; then trained on {one}: {(before + 1) * PER_STEP:,} tokens with those before.\n" in cards[run]
    assert (
        f"\nStarted from the weights of `{export}` (a Hugging Face folder); then trained on {one}.\n" in cards[hugging]
    )


def run_snippet(card: str, folder: Path) -> list[Any]:
    """What the card's Python code gives, of the folder."""
    code = card.split("```python\n")[1].split("```")[0].replace("PATH/TO/THIS/FOLDER", str(folder))
    names: dict[str, Any] = {}
    exec(code.replace("print(", "found = ("), names)
    return names["found"]


def test_the_cards_snippet_runs(tiny_data: Path, tmp_path: Path) -> None:
    """Also of an export with its own code, and of a tokenizer whose mask is not called [MASK]."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for file in (data / "tokenizer").iterdir():
        file.write_text(file.read_text().replace("[MASK]", "<mask>"))
    fingerprints(data)
    for number, (folder, mlp) in enumerate(((tiny_data, "glu"), (data, "glu"), (tiny_data, "mlp"))):
        extra = {"model": {"norm": "rmsnorm"}} if mlp == "mlp" else {}
        run = go(write_config(tmp_path / str(number), folder, 1, **extra))
        export = run / "exports" / f"tokens-{PER_STEP}"
        card = (export / "README.md").read_text()
        own = (export / "modeling_flexbert.py").exists()
        assert own == (mlp == "mlp") == ("trust_remote_code=True" in card)
        assert f"brown {'<mask>' if folder == data else '[MASK]'} jumps" in card
        assert len(run_snippet(card, export)) == 5
        assert AutoTokenizer.from_pretrained(export).mask_token in card
        AutoModelForMaskedLM.from_pretrained(export, trust_remote_code=own)


def fingerprints(data: Path) -> None:
    """The streams' manifests name their tokenizer again."""
    from data.tokenizer import fingerprint

    for file in data.glob("*/*/stream.json"):
        manifest = json.loads(file.read_text())
        manifest["tokenizer_fingerprint"] = fingerprint(data / "tokenizer")
        file.write_text(json.dumps(manifest))


def test_a_stream_without_a_masked_token_has_no_loss(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    run = go(write_config(tmp_path, tiny_data, 2, "full", "empty", evaluation={"max_rows": 4, "interval": PER_STEP}))
    validation = json.loads((run / "summary.json").read_text())["validation"]
    nothing = {"loss": None, "masked_accuracy": None, "unigram_accuracy": None, "masked_tokens": 0}
    assert validation["streams"]["empty"] == nothing
    assert validation["loss"] == validation["streams"]["full"]["loss"] > 1
    assert caplog.text.count("evaluation: no token of stream empty is masked, so it has no loss: raise") == 1
    with pytest.raises(ConfigError, match="evaluation: no token of the held-out text would be masked: raise"):
        go(write_config(tmp_path / "none", tiny_data, 2, "empty"))
    with pytest.raises(ConfigError, match="no token of the held-out text would be masked"):
        go(write_config(tmp_path / "rare", tiny_data, 2, evaluation={"masking": {"rate": 1e-6}}))
    assert not (tmp_path / "none" / "run").exists()


@pytest.mark.parametrize(
    ("loss", "expected"), [("1.5", 1.5), ("0.0", None), ("NaN", None), ("Infinity", None), ("null", None)]
)
def test_only_a_loss_counts_as_best(loss: str, expected: float | None) -> None:
    assert facts_of(f'{{"run": {{"step": 3, "validation_loss": {loss}}}}}') == (3, expected)


def test_a_finished_run_copies_its_checkpoint_when_asked(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    run = go(file)
    assert said(file).endswith("this run is finished (2 steps); nothing to do")
    remote = tmp_path / "remote"
    line = f"tokens-{2 * PER_STEP} is copied to file://{remote}/run"
    for _ in range(2):
        assert said(file, f"checkpoint.remote=file://{remote}").endswith(f"this run is finished (2 steps); {line}")
    copied, here = (folder / f"tokens-{2 * PER_STEP}" for folder in (remote / "run", run / "checkpoints"))
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in here.iterdir()
    }
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match="not copied"):
        go(file, f"checkpoint.remote=file://{tmp_path}/taken", "data.download_retries=0")


def test_an_export_that_is_gone_is_written_again(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    run = go(file)
    export = run / "exports" / f"tokens-{2 * PER_STEP}"
    names = ("model.safetensors", "tokenizer.json", "README.md")
    before = [(export / name).read_bytes() for name in names]
    shutil.rmtree(run / "exports")
    assert "nothing to do" not in said(file)
    assert f"{export}: is gone: it is written again from the last checkpoint" in caplog.text
    assert [(export / name).read_bytes() for name in names] == before
    shutil.rmtree(run / "exports")
    shutil.rmtree(run / "checkpoints")
    assert train(load_run_config(file), Console(quiet=True))["export"] is None


def test_a_skipped_step_says_so(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger's line is as callbacks.ledger writes it for a rollback."""
    run = go(write_config(tmp_path, tiny_data, 6))
    with (run / "ledger.jsonl").open("a") as ledger:
        spike = {"step": 4, "loss": 9.0, "mean": 2.0, "sigma": 0.1}
        ledger.write(json.dumps({"step": 2, "skip": [3, 4], "spike": spike}) + "\n")
    for step in (2, 3, 4, 5):
        inspect_step(run, step, 1, False, Console(width=200))
        skipped = "this step was skipped (loss spike in step 4)" in capsys.readouterr().out
        assert skipped == (step in (3, 4))
        inspect_step(run, step, 1, True, Console())
        for line in capsys.readouterr().out.splitlines():
            assert json.loads(line)["skipped_for_spike_in_step"] == (4 if step in (3, 4) else None)


def test_no_picture_is_said(tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = go(write_config(tmp_path, tiny_data, 2, trainer={"log_interval": 100}))
    drawn = (run / "curves.png").exists()
    assert drawn != (f"{run / 'curves.png'}: not drawn: no line of metrics.jsonl has a loss" in caplog.text)


def script(file: Path, **options: Any) -> str:
    both: dict[str, Any] = {"nodes": 1, "gpus_per_node": 2, **options}
    return launch_slurm(file, (), SlurmOptions(**both), True)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["qos="], "--sbatch: qos=: has no value: give one, or say --sbatch qos"),
        (["exclusive", "comment=a", "comment=b"], "--sbatch: comment: is given twice: sbatch takes one"),
        (["--mem=", "x"], "--sbatch: --mem=: has no value: give one, or say --sbatch mem"),
        (["=3"], "--sbatch: '=3': expected an option of sbatch, such as qos=high or exclusive"),
    ],
)
def test_options_of_sbatch_are_used_or_refused(given: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_sbatch(given)
    assert str(error.value) == line
    assert parse_sbatch(["qos=high", "exclusive", "comment=a=b"]) == {"qos": "high", "exclusive": "", "comment": "a=b"}


def test_the_job_is_as_it_was_asked_for(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "real", tiny_data, 2)
    for options, line in (
        ({"sbatch": {"chdir": "/scratch"}}, "--sbatch: chdir: leave it out: the job script decides it"),
        ({"partition": ""}, "--partition: is empty: give one, or leave it out"),
        ({"account": " "}, "--account: is empty: give one, or leave it out"),
    ):
        with pytest.raises(ConfigError) as error:
            script(file, **options)
        assert str(error.value) == line
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    text = script(link, cpus_per_node=64)
    assert f" train {link}" in text
    # The script itself, up to srun, which prints what it is told.
    (tmp_path / "srun").write_text('#!/bin/sh\necho "cpus: $SRUN_CPUS_PER_TASK"\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "scontrol").symlink_to("/bin/true")
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "x"}
    for cpus in ({"SLURM_CPUS_PER_TASK": "64"}, {}):
        variables = {**os.environ, **job, **cpus, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash"], input=text, env=variables, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.stdout == f"cpus: {cpus.get('SLURM_CPUS_PER_TASK', '')}\n", done.stderr
