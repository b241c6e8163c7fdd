"""Files of configs/eval/: which one is meant, and what it says."""

import re
from collections.abc import Sequence
from pathlib import Path

from evals.interface import EVALS, Eval, EvalConfig, EvalFile
from evals.packages import require
from flexbert_core.composing import load_node
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, named, validate
from recipe.imports import import_components

FOLDER = Path(__file__).parent.parent / "configs" / "eval"


def named_files() -> dict[str, Path]:
    """The project's own files by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def eval_files(names: str) -> dict[str, Path]:
    """Files by their names, in the order given. names: `glue,my/own.yaml`. Raises ConfigError for one that is not
    there or whose name comes twice: results lie under it."""
    known, found = named_files(), {}
    for name in names.split(","):
        file = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else known.get(name)
        if file is None:
            raise ConfigError(f"eval: {name!r}: no such evaluation, {did_you_mean(name, known)}; a file ends in .yaml")
        if not file.is_file():
            raise ConfigError(f"eval: {file}: no such file; those of the project: {', '.join(known)}")
        if file.stem in found:
            raise ConfigError(f"eval: {name}: another evaluation is called {file.stem!r}, too: rename the file")
        found[file.stem] = file
    return found


def overrides_of(name: str, names: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Those of one evaluation, as its file's key paths.

    `key=value` goes to each, `NAME.key=value` to the named one; a key that is none of the file's own is the
    evaluation's.
    """
    mine = []
    for override in overrides:
        first = next((other for other in names if override.startswith(f"{other}.")), None)
        if first not in (None, name):
            continue
        own = override if first is None else override.removeprefix(f"{name}.")
        in_file = re.split(r"[.=]", own, maxsplit=1)[0] in EvalFile.model_fields
        mine.append(own if in_file else f"evaluation.{own}")
    return mine


def load_eval_file(file: str | Path, overrides: Sequence[str] = ()) -> EvalFile:
    """Raises ConfigError, one line per fault."""
    file = Path(file)
    return validate(EvalFile, import_components(load_node(file, overrides), file), file)


def build_eval(config: EvalConfig, name: str) -> Eval:
    """The evaluation. Raises ConfigError for what it cannot do here."""
    require(name, config.packages())
    with named(name):
        return EVALS.build(config)
