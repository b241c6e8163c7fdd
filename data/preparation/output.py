"""The output folder of `prepare`: whose it is, who works on it, and what the dataset in it was made from.

OUTPUT/prepare.json    the config, without `output` and `executor`
OUTPUT/sources.json    the files of each stream: path, bytes, and a mark that tells the content
OUTPUT/.work           what a resumed run needs
"""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.preparation.config import CONFIG_FILE, PrepareConfig
from data.preparation.sources import SOURCES, Listing
from data.preparation.sources.local import sample
from data.preparation.sources.text import shown
from data.store.manifest import MANIFEST
from data.store.transfer import is_url
from flexbert_core.durable import UNFINISHED, lock, write_file
from flexbert_core.schema import ConfigError, RunError

WORK = ".work"
SOURCES_FILE = "sources.json"
_NAMED = 3  # files that a message names
_OF_A_CLAIM = {WORK, UNFINISHED + CONFIG_FILE}  # what is there before CONFIG_FILE is


def claim(config: PrepareConfig, output: Path) -> bool:
    """Write the config into the output folder, or see that the same one is there; gives whether it was.

    Raises ConfigError when the folder is somebody else's, or cannot be made, RunError when the disk is full.
    """
    wanted = config.model_dump(mode="json", exclude={"output", "executor"})
    file = output / CONFIG_FILE
    try:
        if file.exists():
            differences = _differences(_load_config(file), wanted)
            if differences:
                raise ConfigError(
                    f"{config._file}: output: {output} was prepared with another config ({'; '.join(differences)}): "
                    "choose another output, or delete that folder"
                )
            return True
        if output.exists() and (
            not output.is_dir() or not _OF_A_CLAIM.issuperset(path.name for path in output.iterdir())
        ):
            raise ConfigError(
                f"{config._file}: output: {output} exists and is no dataset of ours: choose another folder"
            )
        (output / WORK).mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(wanted, indent=1).encode())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{shown(str(output))}: {error.strerror}") from None
        raise ConfigError(f"{config._file}: output: {output}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise ConfigError(f"{config._file}: output: {output}: {error}") from None
    return False


def _load_config(file: Path) -> Any:
    """The config of a dataset, with what older versions did not write: keys that are new have their defaults."""
    try:
        node = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{file}: damaged: delete that folder, or choose another output") from None
    try:
        config = PrepareConfig.model_validate({**node, "output": "."})
    except (ValidationError, TypeError):  # of a version with other keys: what differs is said
        return node
    return config.model_dump(mode="json", exclude={"output", "executor"})


def _differences(found: Any, wanted: Any, key: str = "") -> list[str]:
    if key == "streams" and set(found) == set(wanted) and list(found) != list(wanted):
        # the order of the streams decides which copy of a document is the first
        return [f"{key}: the order was {', '.join(found)}, is {', '.join(wanted)}"]
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [
            name
            for name in {**found, **wanted}
            if found.get(name) != wanted.get(name) or isinstance(found.get(name), dict)
        ]
        return [
            line
            for name in keys
            for line in _differences(found.get(name), wanted.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if found == wanted else [f"{key} was {_shown(found)}, is {_shown(wanted)}"]


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Nobody else prepares this folder meanwhile. Raises RunError when somebody does."""
    work = output / WORK
    work.mkdir(exist_ok=True)
    handle = lock(work / "lock", output, "preparing this folder")
    try:
        yield
    finally:
        handle.close()


def finished(config: PrepareConfig, output: Path) -> bool:
    """Whether every split of every stream is there."""
    return all((output / name / split / MANIFEST).exists() for name in config.streams for split in config.splits(name))


def clean(work: Path) -> None:
    """Remove what only an unfinished run needs; the log stays."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", "prepare.log"):
            path.unlink()


def remove_all(config: PrepareConfig, output: Path) -> None:
    """Remove all that a run has made, but for the claim."""
    for name in ("tokenizer", *config.streams):
        shutil.rmtree(output / name, ignore_errors=True)
    clean(output / WORK)


def find(config: PrepareConfig, name: str) -> tuple[Any, Listing]:
    """The source of a stream, and what it holds. Raises ConfigError when there is nothing, or what it says at once."""
    source = SOURCES.build(config.streams[name].source)
    try:
        found = source.find()
        for fault in found.faults if config.streams[name].on_error == "fail" else []:
            if fault.error is not None:
                raise fault.error()
    except ConfigError as error:
        raise ConfigError(f"{config._file}: streams.{name}.source.{error}") from None
    return source, found


def record(listings: dict[str, Listing], config: PrepareConfig) -> dict[str, Any]:
    """What sources.json holds."""
    streams = {}
    for name, listing in listings.items():
        skipped = listing.left_out.copy()
        skipped.update(fault.reason for fault in listing.faults)
        streams[name] = {
            "files": [list(file) for file in listing.files],
            "read": len({unit.path for unit in listing.units}),
            "skipped": dict(sorted(skipped.items())),
        }
    return {"streams": streams, "tokenizer": _tokenizer_file(config), "added_tokens": _added_tokens_file(config)}


def _tokenizer_file(config: PrepareConfig) -> list[Any] | None:
    """Path, size and mark of the tokenizer.json that the config names, if it names one."""
    path = getattr(config.tokenizer, "path", None)
    for file in () if path is None else (Path(path), Path(path) / "tokenizer.json"):
        if file.is_file():
            return [str(file), *sample(str(file))[:2]]
    return None


def _added_tokens_file(config: PrepareConfig) -> list[Any] | None:
    """The same of the file with tokens to add."""
    file = getattr(config.tokenizer, "add", None)
    return None if file is None or not Path(file).is_file() else [file, *sample(file)[:2]]


def check_sources(config: PrepareConfig, output: Path) -> str:
    """What can be said about a finished dataset: "already prepared", and whether its sources could be looked at.

    Raises ConfigError, a line per stream, when its sources are no longer what it was made from.
    """
    file = output / SOURCES_FILE
    if not file.exists():
        return "already prepared, before prepare recorded what from: whether its sources have changed is not known"
    made = json.loads(file.read_text(encoding="utf-8"))
    lines, unknown = [], []
    for name, before in made["streams"].items():
        files = {path: (size, mark) for path, size, mark in before["files"]}
        if not files or getattr(config.streams[name].source, "hub", None) is not None:
            continue  # nothing recorded, or a hub's, which would be fetched for this
        try:
            now = {path: (size, mark) for path, size, mark in SOURCES.build(config.streams[name].source).find().files}
        except (ConfigError, RunError) as error:
            (unknown if any(map(is_url, files)) else lines).append(f"streams.{name}.source: {error}")
            continue
        if files != now:
            lines.append(f"streams.{name}.source: {_changes(files, now)}")
    if made["tokenizer"] is not None and _tokenizer_file(config) != made["tokenizer"]:
        lines.append(f"tokenizer.path: {shown(made['tokenizer'][0])} has changed")
    added = made.get("added_tokens")  # older versions had none
    if added is not None and _added_tokens_file(config) != added:
        lines.append(f"tokenizer.add: {shown(added[0])} has changed")
    if lines:
        fix = f"{output} holds the old ones, whole: to prepare the new ones delete it, or choose another output"
        raise ConfigError("\n".join(f"{config._file}: {line}: {fix}" for line in lines))
    return "already prepared" + "".join(f"; whether its sources have changed is not known: {line}" for line in unknown)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    kinds = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(path for path in before.keys() & now.keys() if before[path] != now[path]),
    }
    said = [
        f"{len(paths):,} {kind} ({', '.join(map(shown, paths[:_NAMED]))}{', ...' if len(paths) > _NAMED else ''})"
        for kind, paths in kinds.items()
        if paths
    ]
    return f"the files are no longer those that it was prepared from: {', '.join(said)}"
