"""A run folder, live or dead, as statistics and the report page read it. Writes nothing."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args
from zipfile import BadZipFile

import numpy as np
import yaml

from callbacks.step_log import read_lines
from flexbert_core.folders import no_run
from flexbert_core.schema import ConfigError
from sweeps.results import DocumentLosses, RunResult, State
from training.folder import RunFolder

DOCUMENTS = "held_out_documents.npz"
_STATES: Mapping[str, State] = {
    "training": "running",
    "finished": "finished",
    "checkpoints gone": "failed",
    "diverged": "failed",
    "stopped": "interrupted",
    "not started": "waiting",
}
assert set(_STATES.values()) <= set(get_args(State))


def read_run(folder: Path, arm: str = "", seed: int | None = None) -> RunResult:
    """A run as it stands. arm: by default the run's name. seed: by default the one that its run file says.

    Raises ConfigError when it is no run folder, or one of its files is damaged.
    """
    run = RunFolder(folder)
    config = _config(folder)
    lines = list(read_lines(run.metrics))
    summary = run.finished()
    return RunResult(
        folder=folder,
        arm=arm or str(config.get("name", folder.name)),
        seed=int(config.get("seed", 0)) if seed is None else seed,
        state=_STATES[run.state(trained=any("loss" in line for line in lines))],
        config=config,
        lines=lines,
        summary=summary or {},
        documents=_documents(folder / DOCUMENTS),
        scores=list(read_lines(folder / "evaluations.jsonl")),
    )


def _config(folder: Path) -> Mapping[str, Any]:
    """config.yaml as it was recorded. It is not validated: a page on 150 runs takes no minute."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(no_run(folder))
    try:
        node = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        node = None
    if not isinstance(node, dict):
        raise ConfigError(f"{file}: damaged: the same `train` command writes it again")
    return node


def _documents(file: Path) -> DocumentLosses | None:
    """Raises ConfigError for a file that does not hold what it should."""
    if not file.exists():
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            names, sums, counts = (arrays[name] for name in ("documents", "sums", "counts"))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise ConfigError(f"{file}: damaged ({error}): remove it, and evaluate the run again") from None
    if not (names.shape == sums.shape == counts.shape) or names.ndim != 1 or len(set(names.tolist())) != len(names):
        raise ConfigError(f"{file}: damaged: documents, sums and counts differ in length, or a name is there twice")
    return DocumentLosses(names.tolist(), sums.astype(np.float64), counts.astype(np.int64))
