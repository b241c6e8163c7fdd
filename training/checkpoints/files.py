"""Checkpoints: written whole or not at all, verified by hash when read, never unpickled: tensors are read as
safetensors, everything else as JSON, and no other file in the folder is looked into.

checkpoints/tokens-N/ holds model.safetensors, optimizer.safetensors, state.json (step, loader cursors, counters) and
manifest.json (size and xxh3_64 of each file); with an average of the weights also ema.safetensors, with tensors in the
state of callbacks or algorithms parts.safetensors. N counts tokens
(slots) trained.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexbert_core.durable import new_folder, write_file
from flexbert_core.schema import RunError
from ranks import from_rank_0, on_any_rank
from training.checkpoints.sharded import cut_like, load_weights, unshared, whole

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_EMA = "ema.safetensors"
_PARTS = "parts.safetensors"
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory. state: what `write_checkpoint` was given."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    optimizer_scalars: dict[str, Any]
    state: dict[str, Any]
    ema: dict[str, Tensor]
    parts: dict[str, Tensor]


def checkpoint_name(tokens: int) -> str:
    return f"tokens-{tokens}"


def tokens_of(path: Path) -> int:
    """The token count in a checkpoint's or export's name."""
    return int(path.name.removeprefix("tokens-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under a `checkpoints` folder, oldest first; whole by construction, not yet verified."""
    return sorted((path for path in folder.glob("tokens-*") if re.fullmatch(r"tokens-\d+", path.name)), key=tokens_of)


@dataclass(frozen=True)
class Snapshot:
    """Copies in host memory of what a checkpoint holds: training may go on while they are written."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    optimizer_scalars: dict[str, Any]
    ema: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None = None,
    parts: Mapping[str, Tensor] | None = None,
    *,
    wanted: bool = True,
) -> Snapshot:
    """Cost: one copy of parameters, optimizer state and `ema` (averaged weights by name) to host memory, where wanted;
    elsewhere the result is empty. parts: tensors in the state of callbacks and algorithms, copies already.

    Of a sharded model (FSDP2) a collective, tensor by tensor: a rank that does not want it holds one whole tensor.
    """
    weights = {name: _copy(part, wanted) for name, part in unshared(model).items()}
    tensors, scalars = _flatten_optimizer(model, optimizer)
    states = {name: _copy(part, wanted) for name, part in tensors.items()}
    averaged = {name: _copy(part, wanted) for name, part in (ema or {}).items()}
    return Snapshot(weights, states, scalars, averaged, dict(parts or {})) if wanted else Snapshot({}, {}, {})


def write_checkpoint(path: Path, snapshot: Snapshot, state: dict[str, Any]) -> None:
    """Write a checkpoint; it appears under `path` only when every byte is on disk. state: JSON values.

    Raises RunError (a full disk, ...) with nothing left behind and older checkpoints untouched.
    """
    try:
        with new_folder(path) as folder:
            save_file(snapshot.model, folder / "model.safetensors")
            save_file(snapshot.optimizer, folder / "optimizer.safetensors")
            for name, tensors in ((_EMA, snapshot.ema), (_PARTS, snapshot.parts)):
                if tensors:
                    save_file(tensors, folder / name)
            scalars = snapshot.optimizer_scalars
            write_file(folder / "state.json", json.dumps({"optimizer": scalars, "run": state}, indent=1))
            files = {file.name: _digest(file) for file in sorted(folder.iterdir())}
            write_file(folder / MANIFEST, json.dumps({"schema_version": SCHEMA_VERSION, "files": files}, indent=1))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: checkpoint could not be written: {error}; older ones are whole") from error


def verify_checkpoint(path: Path, names: Iterable[str] | None = None) -> set[str]:
    """Compare the files of a checkpoint, or those of these names, with their hashes. Returns the names of all.

    Raises RunError naming the file that is missing or damaged. Cost: reads them once, a part at a time.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, version = dict(manifest["files"]), manifest["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{path / MANIFEST}: missing or damaged checkpoint manifest") from None
    if version != SCHEMA_VERSION:
        raise RunError(f"{path}: checkpoint format {version}, this FlexBERT reads {SCHEMA_VERSION}")
    for name in sorted({*_FILES, *files} if names is None else names):
        expected, found = files.get(name), _digest(path / name) if (path / name).is_file() else None
        if found != expected or found is None:
            raise RunError(f"{path / name}: damaged checkpoint file: expected {expected}, found {found}")
    return set(files)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises RunError naming the file that is missing or damaged."""
    files = verify_checkpoint(path)
    try:
        state = json.loads((path / "state.json").read_text())
        model, optimizer = (load_file(path / name) for name in _FILES[:2])
        ema, parts = (load_file(path / name) if name in files else {} for name in (_EMA, _PARTS))
        return Checkpoint(path, model, optimizer, state["optimizer"], state["run"], ema, parts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        # whole by its hashes, but not written by write_checkpoint
        raise RunError(f"{path}: no checkpoint of FlexBERT's format: {error}") from None


def newest_checkpoint(folder: Path, accept: Callable[[dict[str, Any]], bool] = lambda state: True) -> Checkpoint | None:
    """The newest whole checkpoint whose state is accepted; damaged ones are skipped with a loud line. None when there
    is none at all. A collective: all ranks get the same one, which each of them could read whole.

    Raises RunError when there are checkpoints and none is of use: starting over silently would hide the loss.
    """
    paths = [Path(path) for path in from_rank_0([str(path) for path in list_checkpoints(folder)])]
    for path in reversed(paths):
        checkpoint, problem = None, f"{path}: another rank could not read it"
        try:
            checkpoint = load_checkpoint(path)
        except RunError as error:
            problem = str(error)
        if on_any_rank(checkpoint is None):
            log.warning("SKIPPING DAMAGED CHECKPOINT %s", problem)
        elif checkpoint is not None and accept(checkpoint.state):
            return checkpoint
    if paths:
        raise RunError(f"{folder}: none of the {len(paths)} checkpoints is whole: remove {folder.parent} to start over")
    return None


def newest_whole(folder: Path) -> int:
    """Tokens of the newest checkpoint that is whole by its hashes; -1: there is none."""
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except RunError:
            continue
        return tokens_of(path)
    return -1


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint into a model and its optimizer, in place. Raises RunError when shapes or names differ."""
    try:
        load_weights(model, checkpoint.model)
        optimizer.load_state_dict(_unflatten_optimizer(checkpoint, model, optimizer))
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"{checkpoint.path}: does not fit this model and optimizer: {str(error).splitlines()[0]}"
        ) from None


def _digest(file: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_64()
    with file.open("rb") as handle:
        while part := handle.read(1 << 24):
            digest.update(part)
        return {"bytes": handle.tell(), "xxh3_64": digest.hexdigest()}


def _copy(tensor: Tensor, wanted: bool) -> Tensor:
    """In host memory, contiguous, of its own; of nothing where it is not wanted."""
    gathered = whole(tensor.detach())
    return gathered.to("cpu", copy=True, memory_format=torch.contiguous_format) if wanted else torch.empty(0)


def _flatten_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state keyed by parameter name: tensors, as they are, for safetensors; the rest for JSON."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {"state": {}, "groups": []}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"state/{names[parameter]}/{key}"] = value
            else:
                scalars["state"].setdefault(names[parameter], {})[key] = value
    for number, group in enumerate(optimizer.param_groups):
        plain = {"params": [names[parameter] for parameter in group["params"]]}
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group/{number}/{key}"] = value
            elif key != "params":
                plain[key] = value
        scalars["groups"].append(plain)
    return tensors, scalars


def _unflatten_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The dict that torch's Optimizer.load_state_dict takes: state by position of the parameter over all groups."""
    groups = checkpoint.optimizer_scalars["groups"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    current = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if current != [group["params"] for group in groups]:
        raise ValueError("the optimizer's parameter groups differ")
    position = {name: number for number, name in enumerate(name for group in current for name in group)}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {
        position[name]: dict(rest) for name, rest in checkpoint.optimizer_scalars["state"].items()
    }
    param_groups: list[dict[str, Any]] = [
        {**group, "params": [position[name] for name in group["params"]]} for group in groups
    ]
    for key, tensor in checkpoint.optimizer.items():
        kind, owner, name = (
            key.split("/", 2) if key.startswith("group/") else ("state", *key[len("state/") :].rsplit("/", 1))
        )
        if kind == "group":
            param_groups[int(owner)][name] = tensor
        else:
            # A state of the parameter's shape belongs to its elements, and is cut with them.
            parameter = parameters[owner]
            of_elements = tensor.shape == parameter.shape
            state.setdefault(position[owner], {})[name] = cut_like(tensor, parameter) if of_elements else tensor
    return {"state": state, "param_groups": param_groups}
