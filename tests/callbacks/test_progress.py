"""What a run draws while it trains, on a terminal and elsewhere: nothing is cut off, whatever the width."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from callbacks import progress
from recipe.config import load_run_config
from tests.helpers.tiny import write_config
from training.trainer import train

STEPS = 12
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def drawn(data: Path, folder: Path, width: int, terminal: bool) -> list[list[str]]:
    """The progress lines of a run with two streams that have masked tokens, each with the lines below it."""
    out = io.StringIO()
    file = write_config(folder, data, STEPS, trainer={"log_interval": 1, "price_per_hour": 36.0, "peak_flops": 1e12})
    train(load_run_config(file), Console(file=out, width=width, force_terminal=terminal, color_system=None))
    blocks: list[list[str]] = []
    for line in re.split(r"[\r\n]+", _ESCAPES.sub("", out.getvalue())):
        if " tokens/s " in line:
            blocks.append([line])
        elif blocks and line.startswith(" " * 11) and "validation" not in line:
            blocks[-1].append(line)
    return blocks


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "terminal"])
@pytest.mark.parametrize("width", [80, 120])
def test_all_that_matters_is_drawn_within_the_width(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, terminal: bool
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    blocks = drawn(tiny_data, tmp_path, width, terminal)
    assert blocks
    block = blocks[-1]
    text = "\n".join(block)
    assert max(map(len, block)) <= width, text
    assert re.match(r"all +(step 12  |━)", block[0]), text
    number = r"[\d.]+(e-\d+)?"
    for name in ("loss", "lr", "accuracy", "grad", "update", "MFU", "wait", "cost"):
        assert re.search(rf"(^|  ){name} {number}", text, re.MULTILINE), name
    assert re.search(r" tokens/s  ETA [\d:-]+", block[0]), text
    assert re.fullmatch(rf" {{11}}loss by stream, to step \d+:  full {number}  sparse {number} *", block[-1]), text
    assert "…" not in text
    assert len(block) <= 4, text


def test_parts_are_wrapped_whole() -> None:
    parts = [f"{'x' * 20} {number}" for number in range(10)]
    lines = progress.wrapped(parts, 60)
    assert [part for line in lines for part in line.strip().split("  ")] == parts
    assert max(map(len, lines)) <= 60
    assert len(lines) == 5
    assert progress.wrapped(["a", "b" * 90, "c"], 60) == ["a", " " * 11 + "b" * 90, " " * 11 + "c"]
    assert progress.stream_losses({"streams": {"one": {"loss": 2.0}}}) == []
    unknown = {"step": 7, "streams": {"one": {"loss": None}, "two": {"loss": 2.0}, "three": {"loss": 3.0}}}
    assert progress.stream_losses(unknown) == ["loss by stream, to step 7:", "two 2.000", "three 3.000"]
