"""min_length over the phases of a run, and in the config that an older run recorded; passes as --dry-run tells them."""

import io
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from commands.dry_run import dry_run
from data.tokenizer import fingerprint
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from tests.helpers.synthetic import write_stream
from tests.helpers.synthetic_runs import run_config, tokenizer_of
from training.folder import RunFolder

PHASE = {"tokens": "8K", "max_seq_len": 64, "global_batch_size": 8, "lr": 1e-3}


def config_of(folder: Path, mixtures: list[dict | None], **streams: dict) -> RunConfig:
    """A phase for each mixture. streams: what the data say of each."""
    paths = {name: {"path": str(folder / name), **share} for name, share in streams.items()}
    phases = [
        {"name": f"p{number}", **PHASE, **({} if mixture is None else {"streams": mixture})}
        for number, mixture in enumerate(mixtures)
    ]
    data = {"tokenizer": str(folder / "tokenizer"), "streams": paths, "num_workers": 0}
    return run_config(folder, folder, "run", data=data, phases=phases)


def test_a_phase_that_does_not_say_min_length_keeps_it(tmp_path: Path) -> None:
    mixtures = [None, {"a": {}, "b": {}}, {"a": {"min_length": 5}}, {"b": {}, "a": {}}, None, {"a": {"min_length": 0}}]
    plan = PhasePlan(config_of(tmp_path, mixtures, a={"min_length": 30}, b={"min_length": 7}))
    found = [phase.streams and {name: s.min_length for name, s in phase.streams.items()} for phase in plan.phases]
    assert found == [None, {"a": 30, "b": 7}, {"a": 5}, {"b": 7, "a": 5}, {"b": 7, "a": 5}, {"a": 0}]


def record(folder: Path, config: RunConfig) -> RunFolder:
    """As older runs did: every min_length that was not said is 0."""
    node = config.model_dump(mode="json")
    for shares in (node["data"]["streams"], *(phase["streams"] or {} for phase in node["phases"])):
        for share in shares.values():
            share["min_length"] = share["min_length"] or 0
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(node)))
    return RunFolder(folder)


def test_a_config_recorded_before_goes_on_where_it_means_the_same(tmp_path: Path) -> None:
    config = config_of(tmp_path, [None, {"a": {}, "b": {}}], a={}, b={})
    record(tmp_path / "same", config).check_config(config)
    config = config_of(tmp_path, [None, {"a": {}, "b": {}}], a={"min_length": 30}, b={})
    folder = record(tmp_path / "other", config)
    with pytest.raises(ConfigError, match=r"phases.1.streams.a.min_length was 0, now 30: undo that"):
        folder.check_config(config, phases_too=True)
    assert folder.check_config(config) == ["phases.1.streams.a.min_length was 0, now 30"]  # it has not begun
    folder.check_config(config_of(tmp_path, [None, {"a": {"min_length": 0}, "b": {}}], a={"min_length": 30}, b={}))


@pytest.mark.parametrize(
    ("least", "long_documents", "shown"),
    [
        (20, "split", 50 * 20 + 100 * 100),
        (0, "truncate", 200 * 10 + 50 * 20 + 100 * 62),
        (11, "truncate", 50 * 20 + 100 * 62),
        (0, "split", 200 * 10 + 50 * 20 + 100 * 100),
    ],
)
def test_passes_are_of_what_is_shown(tmp_path: Path, least: int, long_documents: str, shown: int) -> None:
    """Streams of one repeat are seen equally often: the run's slots over what one pass of both shows."""
    tokenizer_of(512).save_pretrained(tmp_path / "tokenizer")
    made_by = fingerprint(tmp_path / "tokenizer")
    write_stream(tmp_path / "a", "train", [np.full(n, 7) for n in [10] * 200 + [20] * 50], tokenizer=made_by)
    write_stream(tmp_path / "b", "train", [np.full(100, 7)] * 100, tokenizer=made_by)
    for name in "ab":
        write_stream(tmp_path / name, "validation", [np.full(20, 7)], tokenizer=made_by)
    config = config_of(tmp_path, [None, None], a={"min_length": least}, b={})
    config = config.model_copy(update={"data": config.data.model_copy(update={"long_documents": long_documents})})
    console = Console(width=10_000, record=True, file=io.StringIO())
    dry_run(config, console)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    passes = {row[0]: float(row[-1]) for row in rows if row and row[0] in ("a", "b")}
    expected = PhasePlan(config).total_tokens / shown
    assert passes == pytest.approx(dict.fromkeys("ab", expected), abs=0.006)
