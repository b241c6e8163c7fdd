"""Keys and variables that cannot have an effect are refused, or said, by name."""

import logging
from pathlib import Path

import pytest

from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from tests.helpers.ranks import Ranks
from tests.helpers.tiny import ROW, ROWS, write_config
from training.effects import check_effects

GLOBAL = "model.attention={name: multihead, global_attn_every_n_layers: 1}"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["model.position=alibi", "phases.0.rope_theta.global_layers=160000"], "phases[0].rope_theta.global_layers: model.position is 'alibi', which has no theta: remove it, or use rope"),
        (["model.position=learned", "phases.0.rope_theta.local_layers=777"], "phases[0].rope_theta.local_layers: model.position is 'learned'"),
        (["checkpoint.keep_best=2"], "checkpoint.keep_best: without evaluation.interval only milestones are evaluated"),
    ],
)  # fmt: skip
def test_what_the_run_could_not_do_is_refused(tmp_path: Path, tiny_data: Path, changes: list[str], line: str) -> None:
    file = write_config(tmp_path, tiny_data, 2, "full")
    with pytest.raises(ConfigError) as caught:
        check_effects(load_run_config(file, changes), file)
    assert str(caught.value).startswith(f"{file}: {line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([GLOBAL, "phases.0.rope_theta.local_layers=777"], "phases[0].rope_theta.local_layers: no layer has a window"),
        (["ema={decay: 0.9, every: 1M}"], f"ema.every: 1000000 tokens are more than the run's {2 * ROWS * ROW}"),
    ],
)
def test_what_changes_nothing_is_said(
    tmp_path: Path, tiny_data: Path, changes: list[str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_config(tmp_path, tiny_data, 2, "full")
    with caplog.at_level(logging.WARNING):
        check_effects(load_run_config(file, changes), file)
    assert [record.getMessage().startswith(line) for record in caplog.records] == [True]


def test_what_has_an_effect_is_not_spoken_of(tmp_path: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_config(tmp_path, tiny_data, 2, "full")
    thetas = ["phases.0.rope_theta={global_layers: 160000, local_layers: 777}"]
    more = ["checkpoint.keep_best=1", "evaluation.interval=1K", "ema={decay: 0.9, every: 100}"]
    with caplog.at_level(logging.WARNING):
        check_effects(load_run_config(file, [*thetas, *more]), file)
    assert not caplog.records


@pytest.mark.parametrize(
    ("variables", "dry", "line"),
    [
        ({"WORLD_SIZE": "abc"}, True, "error: WORLD_SIZE=abc in the environment: expected a whole number, 1 or more: unset it"),
        ({"WORLD_SIZE": "0"}, True, "error: WORLD_SIZE=0 in the environment: expected a whole number, 1 or more: unset it"),
        ({"WORLD_SIZE": "2"}, False, "error: WORLD_SIZE=2 in the environment, but no RANK: start with `composer -n 2"),
    ],
)  # fmt: skip
def test_a_launchers_variables(
    ranks: Ranks, tmp_path: Path, tiny_data: Path, variables: dict[str, str], dry: bool, line: str
) -> None:
    file = write_config(tmp_path, tiny_data, 2, "full")
    codes, text = ranks.run(1, "train", str(file), *(["--dry-run"] if dry else []), extra=variables)
    assert codes == [2]
    assert text.splitlines()[-1].startswith(line)
    assert not (tmp_path / "run").exists()
