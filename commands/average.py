"""Averages of checkpoints, as exports: the newest of a run (arXiv 2209.14981), milestones, or any of one architecture.

Weights are summed in float64, tensor by tensor over all checkpoints, and rounded to float32 once: memory holds one
model, however many there are.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from flexbert_core.schema import ConfigError, parse_count
from training.checkpoint_source import WEIGHTS, CheckpointSource, model_of, read_source, write_export
from training.checkpoints.files import checkpoint_name, list_checkpoints
from training.objectives.phases import PARTS


def average(
    sources: Sequence[Path],
    output: Path,
    last: int | None,
    tokens: str | None,
    weights: str | None,
    console: Console,
) -> None:
    """Write the weighted mean of checkpoints to `output`, a folder that transformers loads, with a card that says so.

    sources: one run's folder, with `last` or `tokens` (comma-separated) to say which of its checkpoints; or two or more
    checkpoints. weights: comma-separated, one for each in the order of `tokens` or `sources`, with `last` oldest first;
    of any sum; None: alike.
    Raises ConfigError, naming the option, for what does not fit; RunError for a damaged checkpoint. Then nothing is
    written.
    """
    if output.exists():
        raise ConfigError(f"--output: {output}: exists: choose another folder, or remove it")
    paths = _choose(sources, last, tokens)
    shares = _parse_weights(weights, len(paths))
    read = [read_source(path) for path in paths]
    _check_alike(read)
    newest = max(read, key=lambda source: source.tokens)
    model = model_of(newest, weighted_mean([path / WEIGHTS for path in paths], shares))
    parts = ", ".join(
        f"{source.run.name}/{checkpoint_name(source.tokens)} ({share:.4g})"
        for source, share in zip(read, shares, strict=True)
    )
    note = f"These weights are an average of those of {len(paths)} checkpoints, with their shares: {parts}."
    write_export(newest, model, output, note)
    console.print(f"{output}: the average of {parts}", soft_wrap=True)


def weighted_mean(files: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """sum(share * weights) of safetensors files, in float64, rounded to float32. What objectives have trained beside
    the model is left out. Raises ConfigError, naming the file, where names or shapes differ."""
    with ExitStack() as stack:
        opened: list[Any] = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        shapes = [
            {name: one.get_slice(name).get_shape() for name in one.keys() if not name.startswith(PARTS)}  # noqa: SIM118
            for one in opened
        ]
        for file, there in zip(files[1:], shapes[1:], strict=True):
            differ = sorted(name for name in there.keys() | shapes[0].keys() if there.get(name) != shapes[0].get(name))
            if differ:
                raise ConfigError(
                    f"{file}: {differ[0]} is {there.get(differ[0], 'not there')}, in {files[0]} it is "
                    f"{shapes[0].get(differ[0], 'not there')}: only checkpoints of one architecture have an average"
                )
        mean = {}
        for name in shapes[0]:
            total = torch.zeros(shapes[0][name], dtype=torch.float64)
            for file, share in zip(opened, shares, strict=True):
                total.add_(file.get_tensor(name), alpha=share)
            mean[name] = total.float()
    return mean


def _choose(sources: Sequence[Path], last: int | None, tokens: str | None) -> list[Path]:
    """The checkpoints' folders."""
    for source in sources:
        if not source.is_dir():
            raise ConfigError(f"{source}: no such folder: give a run (runs/NAME) or its checkpoints/tokens-N")
    runs = [source for source in sources if (source / "checkpoints").is_dir()]
    if not runs:
        if last is not None or tokens is not None:
            raise ConfigError(f"--{'last' if last is not None else 'tokens'}: chooses from a run, not from checkpoints")
        chosen = list(sources)
    elif len(sources) > 1:
        raise ConfigError(f"{runs[0]}: is a run among {len(sources)} folders: give one run, or checkpoints only")
    else:
        chosen = _choose_of_run(runs[0], last, tokens)
    resolved = [path.resolve() for path in chosen]
    twice = [path for number, path in enumerate(chosen) if path.resolve() in resolved[:number]]
    if twice:
        raise ConfigError(f"{twice[0]}: is given twice: use --weights to count it more")
    if len(chosen) < 2:
        raise ConfigError(f"{chosen[0]}: is one checkpoint: an average needs two or more")
    return chosen


def _choose_of_run(run: Path, last: int | None, tokens: str | None) -> list[Path]:
    there = list_checkpoints(run / "checkpoints")
    if (last is None) == (tokens is None):
        raise ConfigError(f"{run}: is a run: give either --last K or --tokens N1,N2 to choose from its checkpoints")
    if last is not None:
        if not 2 <= last <= len(there):
            raise ConfigError(f"--last: {last}: give 2 to {len(there)}, so many checkpoints are in {run}")
        return there[-last:]
    chosen = []
    for part in str(tokens).split(","):
        try:
            path = run / "checkpoints" / checkpoint_name(parse_count(part))
        except ValueError as error:
            raise ConfigError(f"--tokens: {error}") from None
        if path not in there:
            names = ", ".join(path.name.removeprefix("tokens-") for path in there)
            raise ConfigError(f"--tokens: {part}: no such checkpoint in {run}, it has: {names}")
        chosen.append(path)
    return chosen


def _parse_weights(weights: str | None, count: int) -> list[float]:
    """One share for each checkpoint; together 1."""
    if weights is None:
        return [1 / count] * count
    try:
        values = [float(part) for part in weights.split(",")]
    except ValueError:
        raise ConfigError(f"--weights: {weights}: expected numbers such as 1,2,1") from None
    if len(values) != count:
        raise ConfigError(f"--weights: {len(values)} for {count} checkpoints: give one for each")
    if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
        raise ConfigError(f"--weights: {weights}: must be 0 or more, and not all 0")
    return [value / sum(values) for value in values]


def _check_alike(sources: Sequence[CheckpointSource]) -> None:
    """Raise ConfigError naming what differs when they are not of one architecture and tokenizer."""
    first = sources[0]
    for source in sources[1:]:
        ours, theirs = source.model.to_dict(), first.model.to_dict()
        for key in ours:
            if key not in ("init", "loss") and ours[key] != theirs[key]:
                raise ConfigError(
                    f"{source.path}: model.{key} is {ours[key]}, in {first.path} it is {theirs[key]}: only checkpoints "
                    "of one architecture, with the same RoPE theta, have an average"
                )
        if source.tokenizer != first.tokenizer:
            raise ConfigError(f"{source.path}: another tokenizer than {first.path}: their tokens have other meanings")
