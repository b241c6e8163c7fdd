"""What a phase's masking, and an evaluation's, take over key by key."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from flexbert_core.schema import ConfigError
from recipe.config import RunConfig, load_run_config, read_recorded_config
from recipe.phases import PhasePlan
from tests.helpers.tiny import ROW, ROWS, write_config


def config_of(folder: Path, data: Path, maskings: list[Any], **sections: Any) -> RunConfig:
    """A run with a phase for each masking; None: the phase does not speak of it."""
    shape = {"tokens": ROWS * ROW, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
    phases = [
        {"name": f"p{number}", **shape, **({} if masking is None else {"masking": masking})}
        for number, masking in enumerate(maskings)
    ]
    return load_run_config(write_config(folder, data, 1, phases=phases, **sections))


def resolved(config: RunConfig) -> list[tuple[float, float, float]]:
    maskings: list[Any] = [phase.masking for phase in PhasePlan(config).phases]
    return [(masking.rate, masking.mask_fraction, masking.random_fraction) for masking in maskings]


@pytest.mark.parametrize(
    ("run", "maskings", "expected"),
    [
        ({"mask_fraction": 1.0, "random_fraction": 0.0}, [{"rate": 0.15}], [(0.15, 1.0, 0.0)]),
        (
            {"rate": 0.4, "mask_fraction": 0.5},
            [None, {"random_fraction": 0.5}, {"rate": 0.2}, None],
            [(0.4, 0.5, 0.1), (0.4, 0.5, 0.5), (0.2, 0.5, 0.5), (0.2, 0.5, 0.5)],
        ),
        (None, [{"rate": 0.5, "mask_fraction": 0.9}, {"random_fraction": 0.0}], [(0.5, 0.9, 0.1), (0.5, 0.9, 0.0)]),
        (None, [None, {"mask_fraction": 0.7}], [(0.3, 0.8, 0.1), (0.3, 0.7, 0.1)]),
    ],
)
def test_masking_is_inherited_key_by_key(
    tiny_data: Path, tmp_path: Path, run: Any, maskings: list[Any], expected: list[tuple[float, float, float]]
) -> None:
    config = config_of(tmp_path, tiny_data, maskings, **({"masking": run} if run else {}))
    assert resolved(config) == expected
    recorded = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), recorded)
    assert read_recorded_config(recorded) == config
    assert resolved(read_recorded_config(recorded)) == expected
    assert RunConfig.model_validate(config.model_dump()) == config


MOVING = {"rate": 0.3, "rate_schedule": {"to": 0.1}}


@pytest.mark.parametrize(
    ("run", "maskings", "expected"),
    [
        (MOVING, [None, None], ["0.3 to 0.1 linear", "0.1"]),
        (MOVING, [{"mask_fraction": 0.5}, None, {"mask_fraction": 0.6}], ["0.3 to 0.1 linear", "0.1", "0.1"]),
        (None, [None, MOVING, {"rate_schedule": {"to": 0.2, "shape": "cosine"}}, {"rate": 0.4}], ["0.3", "0.3 to 0.1 linear", "0.1 to 0.2 cosine", "0.4"]),
        (None, [MOVING, {"name": "words"}, {"name": "spans", **MOVING}], ["0.3 to 0.1 linear", "0.3", "0.3 to 0.1 linear"]),
    ],
)  # fmt: skip
def test_a_rate_schedule_is_of_one_phase(
    tiny_data: Path, tmp_path: Path, run: Any, maskings: list[Any], expected: list[str]
) -> None:
    """The phase behind it goes on with the rate that it came to."""
    config = config_of(tmp_path, tiny_data, maskings, **({"masking": run} if run else {}))
    assert [phase.masking.describe() for phase in PhasePlan(config).phases] == expected
    again = RunConfig.model_validate(config.model_dump())
    assert [phase.masking.describe() for phase in PhasePlan(again).phases] == expected


def test_a_masking_of_no_phase_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    words, spans = {"name": "words", "rate": 0.2}, {"name": "spans"}
    for phases in ([spans], [spans, words]):  # the second is told in whole by its phase
        with pytest.raises(
            ConfigError,
            match=r"masking: 'words' is used by no phase: those with targets to mask name another: leave it out$",
        ):
            config_of(tmp_path, tiny_data, phases, masking=words)
    assert config_of(tmp_path, tiny_data, [None, spans], masking=words).masking.rate == 0.2


def test_held_out_text_has_one_rate(tiny_data: Path, tmp_path: Path) -> None:
    for sections in (
        {"evaluation": {"masking": MOVING}},
        {"evaluations": [{"name": "held_out", "masking": MOVING}]},
        {"evaluations": [{"name": "held_out_documents", "masking": MOVING}]},
    ):
        with pytest.raises(ConfigError, match=r"masking: rate_schedule: is for phases; [^\n]*set it to null$"):
            config_of(tmp_path, tiny_data, [None], **sections)


def test_a_record_of_the_old_rule_keeps_its_values(tiny_data: Path, tmp_path: Path) -> None:
    """It held every key of the phase, whatever the run's section said."""
    old = {"rate": 0.15, "mask_fraction": 0.8, "random_fraction": 0.1}
    config = config_of(tmp_path, tiny_data, [old], masking={"rate": 0.3, "mask_fraction": 1.0, "random_fraction": 0.0})
    assert resolved(config) == [(0.15, 0.8, 0.1)]


@pytest.mark.parametrize(
    ("run", "masking", "line"),
    [
        ({"mask_fraction": 1.0, "random_fraction": 0.0}, {"random_fraction": 0.2}, "phases[0].masking: mask_fraction + random_fraction must be at most 1"),
        ({}, {"rat": 0.2}, "phases[0].masking: unknown key 'rat', did you mean 'rate'?"),
        ({}, 3, "phases[0].masking: "),
        ({"rat": 0.2}, {"rate": 0.2}, "masking: unknown key 'rat', did you mean 'rate'?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_one_line(
    tiny_data: Path, tmp_path: Path, run: Any, masking: Any, line: str
) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, tiny_data, [masking], masking=run)
    (only,) = str(error.value).splitlines()
    assert only.startswith(f"{tmp_path / 'train.yaml'}: {line}")


@pytest.mark.parametrize(
    ("masking", "expected"),
    [({"mask_fraction": 1.0, "random_fraction": 0.0}, (0.15, 1.0)), ({"random_fraction": 0.0}, (0.15, 0.8)), ({"rate": 0.4}, (0.4, 0.8))],
)  # fmt: skip
def test_evaluation_keeps_its_own_rate(
    tiny_data: Path, tmp_path: Path, masking: dict[str, float], expected: tuple[float, float]
) -> None:
    found = config_of(tmp_path, tiny_data, [None], evaluation={"masking": masking}).evaluation.masking
    assert (found.rate, found.mask_fraction) == expected
