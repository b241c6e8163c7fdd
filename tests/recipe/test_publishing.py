"""The section `publish`, and what is exported when."""

from pathlib import Path

import pytest

from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.tiny import ROW, ROWS, write_config

PER_STEP = ROWS * ROW


@pytest.mark.parametrize(
    ("publish", "words"),
    [
        ("{}", "publish: give exactly one of repo, folder, url, got none"),
        ("{repo: a/b, folder: c}", "publish: give exactly one of repo, folder, url, got repo and folder"),
        ("{repo: name}", "publish.repo: "),
        ("{repo: https://huggingface.co/a/b}", "publish.repo: "),
        ("{folder: s3://bucket/x}", "folder: s3://bucket/x: is a URL: say url: s3://bucket/x"),
        ("{url: /a/folder}", "expected a URL that can be written to"),
        ("{url: https://example.org/x}", "expected a URL that can be written to"),
        ("{repo: a/b, license: mit}", "unknown key 'license', did you mean 'licence'?"),
        ("{repo: a/b, token: hf_abc}", "unknown key 'token'"),
        ("{repo: a/b, language: [English]}", "publish.language[0]: "),
    ],
)
def test_a_wrong_target_never_starts(tiny_data: Path, tmp_path: Path, publish: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(write_config(tmp_path, tiny_data, 1), [f"publish={publish}"])
    assert words in str(error.value)


def test_what_is_exported_when(tiny_data: Path, tmp_path: Path) -> None:
    """Seven steps of 256 tokens; every 512 a checkpoint for ever."""
    file = write_config(tmp_path, tiny_data, 7, checkpoint={"keep_every": 2 * PER_STEP})

    def exported(*overrides: str) -> list[int]:
        config = load_run_config(file, overrides)
        plan = PhasePlan(config)
        return [
            step
            for step in range(plan.total_steps + 1)
            if plan.is_exported(step, config.checkpoint.keep_every, config.exports_permanent)
        ]

    assert exported() == [7]
    assert exported("checkpoint.exports=permanent") == [0, 2, 4, 6, 7]
    assert exported("publish.folder=x") == [0, 2, 4, 6, 7]
    assert exported("publish.folder=x", "checkpoint.exports=milestones") == [7]
    assert exported("publish.folder=x", "checkpoint.keep_every=null") == [0, 7]


def test_steps_of_tokens(tiny_data: Path, tmp_path: Path) -> None:
    plan = PhasePlan(load_run_config(write_config(tmp_path, tiny_data, 7)))
    assert [plan.step_of(step * PER_STEP) for step in range(8)] == list(range(8))
    assert [plan.step_of(tokens) for tokens in (1, PER_STEP + 1, 8 * PER_STEP)] == [None] * 3
