"""Runs that go on with a run file that says the same in other words, and those that older versions began."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from flexbert_core.schema import ConfigError
from recipe.config import load_run_config, read_recorded_config
from tests.helpers.tiny import ROW, ROWS, forget_after, write_config
from training.trainer import train

STEPS = 6
FALLING = {"name": "linear", "final": 0.1}


def phases(**keys: Any) -> list[dict[str, Any]]:
    only = {"name": "all", "tokens": STEPS * ROWS * ROW, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
    return [only | keys]


def go(file: Path, *overrides: str) -> bytes:
    """The weights at the end."""
    config = load_run_config(file, overrides)
    train(config, Console(quiet=True))
    return (config.folder / "checkpoints" / f"tokens-{STEPS * ROWS * ROW}" / "model.safetensors").read_bytes()


def stopped(straight: Path, folder: Path, data: Path, *streams: str, **changes: Any) -> Path:
    """The run file of a copy of a run that was killed half way, with other words in the file."""
    shutil.copytree(straight.parent / "run", folder / "run")
    forget_after(folder, STEPS // 2)
    return write_config(folder, data, STEPS, *streams, **changes)


def rewrite(folder: Path, change: Any) -> None:
    """Edit a run's config.yaml."""
    file = folder / "run" / "config.yaml"
    node = yaml.safe_load(file.read_text())
    change(node)
    file.write_text(yaml.safe_dump(node, sort_keys=False))


def test_the_order_of_streams_says_nothing(tiny_data: Path, tmp_path: Path) -> None:
    straight = write_config(tmp_path / "straight", tiny_data, STEPS, "full", "sparse", "empty")
    weights = go(straight)
    for number, order in enumerate((("empty", "sparse", "full"), ("sparse", "full", "empty"))):
        file = stopped(straight, tmp_path / str(number), tiny_data, *order)
        assert list(load_run_config(file).data.streams) == list(order)
        assert go(file) == weights
        recorded = read_recorded_config(tmp_path / str(number) / "run" / "config.yaml")
        assert list(recorded.data.streams) == ["full", "sparse", "empty"]


def test_without_its_record_another_order_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    straight = write_config(tmp_path / "straight", tiny_data, STEPS, "full", "sparse")
    go(straight)
    file = stopped(straight, tmp_path / "other", tiny_data, "sparse", "full")
    (tmp_path / "other" / "run" / "config.yaml").unlink()
    with pytest.raises(
        ConfigError, match=r"data\.streams: sparse, full: .* in the order full, sparse: give them in that"
    ):
        go(file)


@pytest.mark.parametrize(
    "name", ["linear", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cosine", "one_minus_sqrt"))]
)
def test_a_run_of_the_old_rule_goes_on_by_it(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Up to commit 38751cb lr fell from the phase's start on, and config.yaml did not say so."""
    falling, warmup = {"name": name, "final": 0.1}, 3 * ROWS * ROW
    old = phases(warmup=warmup, schedule=falling | {"falls_from": "start"})
    straight = write_config(tmp_path / "straight", tiny_data, STEPS, phases=old)
    weights = go(straight)
    new = write_config(tmp_path / "new", tiny_data, STEPS, phases=phases(warmup=warmup, schedule=falling))
    assert go(new) != weights
    file = stopped(straight, tmp_path / "old", tiny_data, phases=phases(warmup=warmup, schedule=falling))
    rewrite(tmp_path / "old", lambda node: node["phases"][0]["schedule"].pop("falls_from"))
    caplog.set_level(logging.WARNING)
    assert go(file) == weights
    said = "phases.0.schedule: falls from the phase's start, as this run was begun: falls_from=start says so"
    assert [record.getMessage() for record in caplog.records].count(said) == 1
    # What it now has recorded holds for the next time, too; and the other rule, asked for, is refused.
    assert read_recorded_config(tmp_path / "old" / "run" / "config.yaml").phases[0].schedule.falls_from == "start"
    asked = stopped(straight, tmp_path / "asked", tiny_data, phases=phases(warmup=warmup, schedule=falling))
    with pytest.raises(ConfigError, match=r"phases\.0\.schedule\.falls_from was 'start', now 'warmup'"):
        go(asked, "phases.0.schedule.falls_from=warmup")


def test_an_old_record_without_a_warmup_says_the_same_as_ever(tiny_data: Path, tmp_path: Path) -> None:
    straight = write_config(tmp_path / "straight", tiny_data, STEPS, phases=phases(schedule=FALLING))
    weights = go(straight)
    file = stopped(straight, tmp_path / "old", tiny_data, phases=phases(schedule=FALLING))
    rewrite(tmp_path / "old", lambda node: node["phases"][0]["schedule"].pop("falls_from"))
    assert go(file) == weights


@pytest.mark.slow
def test_an_old_record_of_a_branch_loads(tiny_data: Path, tmp_path: Path) -> None:
    """`data: continue` stood there as the default, whether it held or not."""
    go(write_config(tmp_path / "origin", tiny_data, STEPS))
    start = {"checkpoint": str(tmp_path / "origin" / "run"), "weights_only": True}
    for number, origin in enumerate((start, {**start, "weights_only": False})):
        folder, given = tmp_path / str(number), {"from": origin if number == 0 else start["checkpoint"]}
        straight = write_config(folder / "straight", tiny_data, STEPS, **given)
        weights = go(straight)
        file = stopped(straight, folder / "old", tiny_data, **given)
        rewrite(folder / "old", lambda node, origin=origin: node["from"].update(origin, data="continue"))
        assert go(file) == weights


@pytest.mark.slow
def test_an_old_record_with_an_objective_of_no_phase_loads(tiny_data: Path, tmp_path: Path) -> None:
    """The run's, where the first phase has its own. The file that says so is refused now."""
    straight = write_config(tmp_path / "straight", tiny_data, STEPS, phases=phases(objective="mlm"))
    weights = go(straight)
    file = stopped(straight, tmp_path / "old", tiny_data, phases=phases(objective="mlm"))
    rewrite(tmp_path / "old", lambda node: node.update(objective={"name": "diffusion"}))
    assert go(file) == weights
    with pytest.raises(ConfigError, match=r"objective: 'diffusion' is of no phase, phases\[0\]\.objective says 'mlm'"):
        go(file, "objective=diffusion")
