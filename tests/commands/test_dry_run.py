"""The plan of a small model has digits."""

import io
from pathlib import Path

import pytest

from commands.dry_run import dry_run
from flexbert_core.schema import ConfigError, plain_console
from recipe.config import load_run_config
from tests.helpers.tiny import write_config
from tests.helpers.users import as_nobody
from training.effects import ranks


def test_small_numbers_are_told_in_small_units(tmp_path: Path, tiny_data: Path) -> None:
    out = io.StringIO()
    config = load_run_config(write_config(tmp_path, tiny_data, 2))
    dry_run(config, plain_console(file=out, width=200), ranks(), None, None, None)
    (flops,) = (line for line in out.getvalue().splitlines() if "FLOPs per token" in line)
    assert " M" in flops
    assert " G" not in flops
    assert "MB each" in out.getvalue()
    assert "MB in all" in out.getvalue()
    assert "0.00 " not in out.getvalue()


def test_a_dataset_of_another_user_is_one_line(open_folder: Path, tiny_data: Path) -> None:
    config = load_run_config(write_config(open_folder, tiny_data, 2))
    dry_run(config, plain_console(file=io.StringIO()), ranks(), None, None, None)  # imports what it needs
    tiny_data.chmod(0)
    try:
        with (
            as_nobody(),
            pytest.raises(ConfigError, match=r"^data.streams.full.path: [^\n]*stream.json: Permission den"),
        ):
            dry_run(config, plain_console(file=io.StringIO()), ranks(), None, None, None)
    finally:
        tiny_data.chmod(0o755)
