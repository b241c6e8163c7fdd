"""A live run is steered: phases to come change, steps are left out, a decay branches off; what is trained stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from callbacks.step_log import read_lines
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.in_process import PER_STEP, go, invoke, said
from tests.helpers.tiny import ROW, ROWS, write_config
from training.checkpoints.files import list_checkpoints
from training.folder import RunFolder

TWO = [
    {"name": "first", "tokens": 4 * PER_STEP, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2},
    {"name": "second", "tokens": 4 * PER_STEP, "lr": 5e-3},
]


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_data, tmp_path / "data")


def config_of(folder: Path, source: Path, phases: list[dict[str, Any]], /, **changes: Any) -> Path:
    return write_config(folder, source, 1, "full", phases=phases, **changes)


def weights(run: Path, steps: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"tokens-{steps * PER_STEP}" / "model.safetensors")


def stopped_after(run: Path, steps: int) -> None:
    """As a kill just after the checkpoint of so many steps leaves it."""
    for path in list_checkpoints(run / "checkpoints"):
        if int(path.name.split("-")[1]) > steps * PER_STEP:
            shutil.rmtree(path)
    shutil.rmtree(run / "exports")
    (run / "summary.json").unlink()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_phase_to_come_changes_and_the_run_is_as_if_it_had_always_been_so(
    data: Path, tmp_path: Path, stop: int
) -> None:
    """Stopped inside the first phase, or where it ends. The new second phase has other lr, batch and a phase behind."""
    run = go(config_of(tmp_path / "a", data, TWO))
    stopped_after(run, stop)
    changed = [TWO[0], {**TWO[1], "lr": 2e-3, "global_batch_size": ROWS // 2, "tokens": 2 * PER_STEP}]
    changed += [{"name": "third", "tokens": PER_STEP, "lr": 1e-3}]
    told = said(config_of(tmp_path / "a", data, changed))
    assert "to come: phases.1.lr was 0.005, now 0.002" in told
    assert "phases.2.name was not set, now 'third'" in told
    straight = go(config_of(tmp_path / "b", data, changed, data={"lanes": 4}))
    assert same(weights(run, 7), weights(straight, 7))
    assert [line["lr"] for line in read_lines(run / "metrics.jsonl") if "lr" in line] == [
        line["lr"] for line in read_lines(straight / "metrics.jsonl") if "lr" in line
    ]


@pytest.mark.slow
def test_a_phase_to_come_may_be_left_out(data: Path, tmp_path: Path) -> None:
    run = go(config_of(tmp_path / "a", data, TWO))
    stopped_after(run, 3)
    go(config_of(tmp_path / "a", data, TWO[:1]))
    assert list_checkpoints(run / "checkpoints")[-1].name == f"tokens-{4 * PER_STEP}"


def test_a_begun_phase_is_refused_with_the_reason(data: Path, tmp_path: Path) -> None:
    run = go(config_of(tmp_path / "a", data, TWO))
    stopped_after(run, 5)
    for phases, key in (
        ([TWO[0], {**TWO[1], "lr": 2e-3}], "phases.1.lr was 0.005, now 0.002"),
        ([{**TWO[0], "warmup": PER_STEP}, TWO[1]], f"phases.0.warmup was 0, now {PER_STEP}"),
    ):
        with pytest.raises(ConfigError) as refused:
            go(config_of(tmp_path / "a", data, phases))
        assert key in str(refused.value)
        assert "it stands at step 5, in phases[1], second" in str(refused.value)
    with pytest.raises(ConfigError, match=r"phases\.2\.objective\.name was 'mlm', now 'clm'"):
        go(config_of(tmp_path / "a", data, [*TWO, {"name": "third", "tokens": PER_STEP, "objective": "clm"}]))
    with pytest.raises(ConfigError, match="from: .* has begun without it, and would not read it"):
        go(config_of(tmp_path / "a", data, TWO, **{"from": str(data)}))


def test_what_differs_in_phases_is_what_they_mean(data: Path, tmp_path: Path) -> None:
    """A new name hides nothing else, and an objective that is said is the one that would be inherited."""
    detects = {**TWO[1], "objective": {"name": "rtd", "weight": 20.0}}
    third = {"name": "third", "tokens": PER_STEP, "objective": "mlm"}
    for number, (before, now, differs) in enumerate(
        [
            (TWO, [TWO[0], {**TWO[1], "name": "other", "lr": 1e-3}], {"phases.1.name", "phases.1.lr"}),
            (TWO, [TWO[0], {**TWO[1], "objective": "mlm"}], set[str]()),
            ([{**TWO[0], "objective": "mlm"}, TWO[1]], TWO, set[str]()),
            ([*TWO, third], [*TWO[:1], third], {"phases.1.name", "phases.1.tokens", "phases.1.lr"}),
            (TWO[:1], [TWO[0], third], {f"phases.1.{key}" for key in ("name", "tokens", "warmup", "schedule.name")}),
            ([TWO[0], detects], [TWO[0], {**detects, "name": "other", "objective": {"name": "rtd"}}], None),
            ([TWO[0], detects], TWO[:1], None),
            (TWO, [TWO[0], detects], None),
        ]
    ):
        begun = load_run_config(config_of(tmp_path / str(number), data, before))
        folder = RunFolder(begun.folder)
        folder.open(begun)
        folder.close()
        (folder.checkpoints / f"tokens-{PER_STEP}").mkdir()
        config = load_run_config(config_of(tmp_path / str(number), data, now))
        if differs is None:
            with pytest.raises(ConfigError, match=r"phases\.1\.objective\.(weight|name) was "):
                folder.check_config(config)
        else:
            assert {line.split(" was ")[0] for line in folder.check_config(config)} >= differs, number


@pytest.mark.slow
def test_a_phase_added_to_a_finished_run_is_as_if_it_had_always_been_there(data: Path, tmp_path: Path) -> None:
    ema = {"ema": {"decay": 0.6}}
    run = go(config_of(tmp_path / "a", data, TWO[:1], **ema))
    assert "this run is finished (4 steps)" in said(config_of(tmp_path / "a", data, TWO[:1], **ema))
    file = config_of(tmp_path / "a", data, TWO, **ema)
    assert "another phase may be added" in invoke("phases", str(run))
    invoke("train", str(file), "--until", str(6 * PER_STEP))
    assert not (run / "summary.json").exists()
    assert "resuming after step 6, 8 steps" in said(file)
    straight = go(config_of(tmp_path / "b", data, TWO, **ema))
    for folder, name in (("checkpoints", "model"), ("checkpoints", "optimizer"), ("checkpoints", "ema"), ("exports", "model")):  # fmt: skip
        ours, theirs = (each / folder / f"tokens-{8 * PER_STEP}" / f"{name}.safetensors" for each in (run, straight))
        assert ours.read_bytes() == theirs.read_bytes(), (folder, name)
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (run, straight))
    for key in ("steps", "tokens", "validation", "stream_tokens", "streams"):
        assert ours[key] == theirs[key], key
    assert Path(ours["export"]).name == f"tokens-{8 * PER_STEP}"
    exports = [sorted(path.name for path in (each / "exports").iterdir()) for each in (run, straight)]
    assert exports[0] == exports[1]


def test_left_out_steps_change_nothing_and_the_rest_goes_on(data: Path, tmp_path: Path) -> None:
    """Weights stay in steps 2, 3 and 6; the rows of the others are those that they always were."""
    run = go(config_of(tmp_path / "a", data, TWO, trainer={"log_interval": 1, "skip_steps": ["2-3", 6]}))
    plain = go(config_of(tmp_path / "b", data, TWO))
    for step in range(1, 9):
        before, after = (weights(run, number) if number else None for number in (step - 1, step))
        if before is not None and after is not None:
            assert same(before, after) == (step in (2, 3, 6)), step
    assert same(weights(run, 1), weights(plain, 1))
    ours, theirs = (list(read_lines(folder / "ledger.jsonl")) for folder in (run, plain))
    assert "this step is left out (trainer.skip_steps)" in invoke("inspect", str(run), "--step", "3")
    assert "left out" not in invoke("inspect", str(run), "--step", "4")
    assert [line["lanes"] for line in ours] == [line["lanes"] for line in theirs]
    losses = {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line}
    assert {step for step, loss in losses.items() if loss is None or loss != loss} == {2, 3, 6}


@pytest.mark.slow
def test_steps_to_come_are_left_out_of_a_stopped_run(data: Path, tmp_path: Path) -> None:
    run = go(config_of(tmp_path / "a", data, TWO))
    stopped_after(run, 4)
    file = config_of(tmp_path / "a", data, TWO)
    for steps, what in (("3-5", "step 3 of .* has been trained already"), ("9", "the run ends with step 8")):
        with pytest.raises(ConfigError, match=what):
            go(file, f"trainer.skip_steps=[{steps}]")
    go(file, "trainer.skip_steps=[5-6]")
    assert same(weights(run, 4), weights(run, 6))
    straight = go(config_of(tmp_path / "b", data, TWO, trainer={"log_interval": 1, "skip_steps": ["5-6"]}))
    assert same(weights(run, 8), weights(straight, 8))
    stopped_after(run, 6)
    with pytest.raises(ConfigError, match="step 5 of .* has been left out already"):
        go(file)


@pytest.mark.parametrize("steps", ["5-3", "0", "a", "1-", "-1", "1.5"])
def test_what_is_no_range_of_steps_is_refused(data: Path, tmp_path: Path, steps: str) -> None:
    file = config_of(tmp_path, data, TWO)
    with pytest.raises(ConfigError, match=r"trainer\.skip_steps"):
        load_run_config(file, [f"trainer.skip_steps=[{steps}]"])


def test_a_decay_is_the_branch_that_one_would_write(data: Path, tmp_path: Path) -> None:
    """From a checkpoint of the second phase, with the masking rate half way through its schedule."""
    phases = [
        TWO[0],
        {**TWO[1], "masking": {"rate": 0.3, "rate_schedule": {"to": 0.1}}, "rope_theta": {"global_layers": 20000}},
    ]
    run = go(config_of(tmp_path / "a", data, phases))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    tokens, start = 3 * PER_STEP, 7 * PER_STEP
    told = invoke("decay", str(run), "--tokens", str(tokens), "--from", str(start))
    branch = tmp_path / "a" / f"run-decay-{tokens}-from-{start}"
    assert str(branch) in told
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    own = {
        "name": "decay",
        "tokens": tokens,
        "max_seq_len": ROW,
        "global_batch_size": ROWS,
        "lr": 5e-3,
        "schedule": "one_minus_sqrt",
        "masking": {"rate": 0.3 - 0.2 * 2 / 4},
        "rope_theta": {"global_layers": 20000},
    }
    checkpoint = str(run / "checkpoints" / f"tokens-{start}")
    written = go(config_of(tmp_path / "b", data, [own], **{"from": checkpoint}))
    assert same(weights(branch, 3), weights(written, 3))
    assert "this run is finished" in invoke("decay", str(run), "--tokens", str(tokens), "--from", str(start))


@pytest.mark.slow
def test_a_decay_without_from_starts_at_the_newest_and_goes_on(data: Path, tmp_path: Path) -> None:
    run = go(config_of(tmp_path / "a", data, TWO))
    stopped_after(run, 5)
    invoke("decay", str(run), "--tokens", str(2 * PER_STEP))
    branch = tmp_path / "a" / f"run-decay-{2 * PER_STEP}-from-{5 * PER_STEP}"
    whole = weights(branch, 2)
    stopped_after(branch, 1)
    go(config_of(tmp_path / "a", data, TWO))  # the run goes on meanwhile: its newest checkpoint is another
    told = invoke("decay", str(run), "--tokens", str(2 * PER_STEP))
    assert "resuming after step 1" in told
    assert same(weights(branch, 2), whole)
    invoke("decay", str(run), "--tokens", str(2 * PER_STEP))
    assert (tmp_path / "a" / f"run-decay-{2 * PER_STEP}-from-{8 * PER_STEP}" / "summary.json").exists()


def test_what_cannot_decay_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = go(config_of(tmp_path / "a", data, TWO))
    tokens = str(2 * PER_STEP)
    told = invoke("decay", str(run), "--tokens", tokens, "--from", "77", code=2)
    assert f"--from: {run} has no checkpoint at 77 tokens; it has {PER_STEP}, {2 * PER_STEP}," in told
    long = invoke("decay", str(run), "--tokens", tokens, "--name", "a" * 300, code=2)
    assert "config.yaml: name: String should have at most 200 characters" in long
    assert "this is a dataset, no run folder: give runs/NAME" in invoke("decay", str(data), "--tokens", tokens, code=2)
    assert "unknown schedule 'sqrt'" in invoke("decay", str(run), "--tokens", tokens, "--schedule", "sqrt", code=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = invoke("decay", str(run), "--tokens", tokens, code=2)
    assert f"--from: is needed with 2 processes: the newest is --from {8 * PER_STEP}" in told


@pytest.mark.slow
def test_a_moved_run_decays_beside_itself_and_by_the_weights_of_its_tokens(data: Path, tmp_path: Path) -> None:
    """A mixture in tokens makes up the run's budget: of the decay its shares stay."""
    streams = {"full": {"tokens": 6 * PER_STEP}, "sparse": {"tokens": 2 * PER_STEP}}
    config_of(tmp_path / "a", data, TWO, data={"streams": {"sparse": {"path": str(data / "sparse")}}})
    shares = [f"data.streams.{name}.tokens={share['tokens']}" for name, share in streams.items()]
    go(tmp_path / "a" / "train.yaml", *shares)
    run = Path(shutil.move(tmp_path / "a" / "run", tmp_path / "moved"))
    invoke("decay", str(run), "--tokens", str(2 * PER_STEP))
    branch = tmp_path / f"moved-decay-{2 * PER_STEP}-from-{8 * PER_STEP}"
    (phase,) = load_run_config(branch / "config.yaml").phases
    assert {name: share.weight for name, share in (phase.streams or {}).items()} == {
        "full": 6 * PER_STEP,
        "sparse": 2 * PER_STEP,
    }


def test_the_dry_run_of_a_decay_writes_nothing(data: Path, tmp_path: Path) -> None:
    run = go(config_of(tmp_path / "a", data, TWO))
    told = invoke("decay", str(run), "--tokens", str(2 * PER_STEP), "phases.0.lr=1e-3", "--dry-run")
    assert "0.001 one_minus_sqrt" in told
    assert not (tmp_path / "a" / f"run-decay-{2 * PER_STEP}-from-{8 * PER_STEP}").exists()


def test_phases_tell_what_was_and_what_is_to_come(data: Path, tmp_path: Path) -> None:
    run = go(config_of(tmp_path / "a", data, TWO, trainer={"log_interval": 1, "skip_steps": [7]}))
    finished = invoke("phases", str(run))
    assert "to come" not in finished
    assert "may be changed" not in finished
    begun = load_run_config(config_of(tmp_path / "b", data, TWO[:1]))
    RunFolder(begun.folder).open(begun)
    assert "may be changed" not in invoke("phases", str(begun.folder))  # its one phase is settled
    stopped_after(run, 2)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["step"] <= 2) + "\n")
    told = invoke("phases", str(run))
    cells = {
        row[0]: row[1:]
        for line in told.splitlines()
        if len(row := [cell.strip() for cell in line.split("│")[1:-1]]) == 3
    }
    assert cells["state"] == ["50%", "to come"]
    assert cells["steps"] == ["1 to 4", "5 to 8"]
    assert cells["tokens"] == [f"0 to {4 * PER_STEP:,}", f"{4 * PER_STEP:,} to {8 * PER_STEP:,}"]
    assert cells["learning rate"] == ["0.01 to 0.01, peak 0.01", "0.005 to 0.005, peak 0.005"]
    assert "left out: steps 7" in told
    assert "a phase that has not begun may be changed" in told


@pytest.mark.slow
def test_the_number_of_lanes_is_the_runs(data: Path, tmp_path: Path) -> None:
    """A batch to come that the default would give other lanes keeps those of the run, where it can."""
    config = load_run_config(config_of(tmp_path / "a", data, TWO, data={"lanes": None}))
    run = go(tmp_path / "a" / "train.yaml")
    stopped_after(run, 4)
    changed = [TWO[0], {**TWO[1], "global_batch_size": 2 * ROWS}]
    assert config.lanes == ROWS
    go(config_of(tmp_path / "a", data, changed, data={"lanes": None}))
    assert PhasePlan(load_run_config(run / "config.yaml")).total_tokens == 8 * PER_STEP
    stopped_after(run, 4)
    with pytest.raises(ConfigError, match=r"data\.lanes was 8, now 4"):
        go(config_of(tmp_path / "a", data, [TWO[0], {**TWO[1], "global_batch_size": 12}], data={"lanes": None}))
