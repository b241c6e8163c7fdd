"""Which model is meant, and a folder of it that `transformers` loads.

| written | is |
|---|---|
| runs/NAME | a run's newest checkpoint |
| runs/NAME@tokens-N, ...@tokens-N-ema | its checkpoint or export of that name |
| .../checkpoints/tokens-N | a checkpoint |
| FOLDER | an export, or any folder with a config.json |
| hf:ORG/NAME, hf:ORG/NAME@REVISION | a model of the Hugging Face hub, of an architecture that is here |
| hf+code:ORG/NAME, ...@REVISION | one that brings Python code, which is run: say so only of those you trust |
| any of these, then @random | its architecture and tokenizer, with fresh weights |
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evals.interface import Model
from flexbert.hf.verify import PARITY_FILE
from flexbert_core.durable import new_folder
from flexbert_core.folders import what_it_is
from flexbert_core.schema import ConfigError, expand_user, named
from recipe.hub import HUB, of_hub

_HUB_WITH_CODE = "hf+code:"
_RANDOM = "@random"
_ABOUT = {".md", ".gitattributes", ".png", PARITY_FILE}  # files that say something about a model and are no part of it


def resolve(sources: Sequence[str], scratch: Path) -> list[Model]:
    """The models, with labels that tell them apart. scratch: for exports of checkpoints that have none.

    Raises ConfigError naming a source that is nothing of the table, or is given twice.
    """
    models = [_resolve(source, scratch) for source in sources]
    for number, model in enumerate(models):
        if any(other.source == model.source for other in models[:number]):
            raise ConfigError(f"{sources[number]}: is given twice")
    return _told_apart(models)


def _resolve(source: str, scratch: Path) -> Model:
    if source.startswith((HUB, _HUB_WITH_CODE)):
        prefix, _, name = source.removesuffix(_RANDOM).partition(":")
        folder, label, again, tokens = _of_hub(name, f"{prefix}:" == _HUB_WITH_CODE), name, f"{prefix}:{name}", None
    else:
        try:
            place = expand_user(source)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        folder, label, again, tokens = _of_folder(
            place if Path(place).exists() else place.removesuffix(_RANDOM), scratch
        )
    model = Model(again, label, folder, digest_of(folder), tokens)
    return _randomized(model, scratch) if source.endswith(_RANDOM) and not Path(source).exists() else model


def _of_folder(place: str, scratch: Path) -> tuple[Path, str, str, int | None]:
    """Folder, label, source again, tokens."""
    path, at, which = Path(place), "", ""
    if not path.exists() and "@" in place:
        rest, at, which = place.rpartition("@")
        path = Path(rest)
    if not path.is_dir():
        raise ConfigError(
            f"{place}: no such folder: give a run, a checkpoint, an export or a folder with a config.json; a model of "
            "the Hugging Face hub is written hf:ORG/NAME"
        )
    if (path / "checkpoints").is_dir():
        return _of_run(path, which, scratch)
    if at:
        raise ConfigError(f"{place}: {path} is no run, so @{which} says nothing: give the folder alone, or @random")
    if (path / "manifest.json").is_file() and (path.parent.parent / "config.yaml").is_file():
        return _of_checkpoint(path, scratch)
    if not (path / "config.json").is_file():
        kind = what_it_is(path)
        if kind == "a run":
            raise ConfigError(f"{path}: has no checkpoint yet")
        fault = "has no config.json, and is no run or checkpoint" if kind is None else f"this is {kind}, no model"
        raise ConfigError(f"{path}: {fault}: give a run, a checkpoint, an export or a folder with a config.json")
    if (run := _run_of_export(path)) is not None:
        return path, f"{run.name}@{path.name}", f"{run}@{path.name}", _tokens(path.name)
    name = path.resolve().name
    return path, path.resolve().parent.name if name == "model" else name, str(path), None


def _run_of_export(path: Path) -> Path | None:
    inside = path.parent.name == "exports" and (path.parent.parent / "config.yaml").is_file()
    return path.parent.parent if inside and re.fullmatch(r"tokens-\d+(-ema)?", path.name) else None


def _of_run(run: Path, which: str, scratch: Path) -> tuple[Path, str, str, int | None]:
    from training.checkpoints.files import list_checkpoints

    checkpoints = {path.name: path for path in list_checkpoints(run / "checkpoints")}
    exports = {
        path.name: path for path in sorted((run / "exports").glob("tokens-*")) if (path / "config.json").is_file()
    }
    there = checkpoints | exports
    if which in ("", "newest"):
        plain = [name for name in there if not name.endswith("-ema")]
        if not plain:
            raise ConfigError(f"{run}: has no checkpoint yet")
        which = max(plain, key=_tokens)
    if which not in there:
        names = ", ".join(sorted(there, key=_tokens)) or "none yet"
        raise ConfigError(f"{run}@{which}: no such checkpoint or export; there are: {names}")
    if which in exports:
        return exports[which], f"{run.resolve().name}@{which}", f"{run}@{which}", _tokens(which)
    return _of_checkpoint(checkpoints[which], scratch)


def _of_checkpoint(path: Path, scratch: Path) -> tuple[Path, str, str, int | None]:
    """Its export, written if the run has none of it."""
    from safetensors.torch import load_file

    from training.checkpoint_source import WEIGHTS, model_of, read_source, write_export

    run, tokens = path.parent.parent, _tokens(path.name)
    in_run = path.parent.name == "checkpoints"  # else it waits somewhere else in the run's folder
    label, again = f"{run.resolve().name}@{path.name}", f"{run}@{path.name}" if in_run else str(path)
    export = run / "exports" / path.name
    if in_run and (export / "config.json").is_file():
        return export, label, again, tokens
    source = read_source(path)
    export = scratch / "exports" / f"{run.resolve().name}-{path.name}-{_hash((path / 'manifest.json').read_bytes())}"
    if not export.is_dir():
        with named(path):
            write_export(source, model_of(source, load_file(path / WEIGHTS)), export, None)
    return export, label, again, tokens


def _of_hub(name: str, with_code: bool) -> Path:
    """Raises ConfigError for a model whose code would run without having been asked for."""
    folder = of_hub(name, with_code)
    for file in () if with_code else (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file() and "auto_map" in json.loads(file.read_text(encoding="utf-8")):
            raise ConfigError(
                f"{HUB}{name}: brings Python code ({file.name}: auto_map): {_HUB_WITH_CODE}{name} runs it, if you "
                "trust it"
            )
    return folder


def _randomized(model: Model, scratch: Path) -> Model:
    from flexbert import build, from_hf, to_hf

    folder = scratch / "random" / model.digest
    if not folder.is_dir():
        with named(model.source + _RANDOM):
            fresh = build(from_hf(model.folder, "encoder", trust_remote_code=True).config, seed=0)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with new_folder(folder) as beside:
                to_hf(fresh, model.folder, beside / "export")
                for file in (beside / "export").iterdir():
                    file.rename(beside / file.name)
                (beside / "export").rmdir()
    return replace(
        model,
        source=model.source + _RANDOM,
        label=model.label + _RANDOM,
        folder=folder,
        digest=digest_of(folder),
        tokens=None if model.tokens is None else 0,
    )


def digest_of(folder: Path) -> str:
    """Of the names and bytes of a folder's files, but for those about the model."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix in _ABOUT or file.name in _ABOUT:
            continue
        digest.update(f"{file.relative_to(folder)}\n".encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def plain(name: str) -> str:
    """For a file's or folder's name."""
    return re.sub(r"[^A-Za-z0-9@._'-]+", "-", name)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _tokens(name: str) -> int:
    return int(name.removeprefix("tokens-").removesuffix("-ema"))


def _told_apart(models: list[Model]) -> list[Model]:
    """With the folder's parent in labels that come twice, and a mark where that does not help."""
    counts = Counter(plain(model.label) for model in models)
    labels: list[str] = []
    for model in models:
        label = model.label
        if counts[plain(label)] > 1:
            label = f"{model.folder.resolve().parent.name}/{label}"
        while plain(label) in map(plain, labels):
            label += "'"
        labels.append(label)
    return [replace(model, label=label, name=model.label) for model, label in zip(models, labels, strict=True)]
