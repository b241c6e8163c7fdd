"""Files of configs/eval/: which one is meant, and what it says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evals.interface import EVALS, Eval, EvalConfig
from flexbert_core.composing import load_node
from flexbert_core.schema import ConfigError, did_you_mean, explain
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
    """Those of one evaluation: `key=value` goes to each, `NAME.key=value` to the named one."""
    mine = []
    for override in overrides:
        first = next((other for other in names if override.startswith(f"{other}.")), None)
        if first is None:
            mine.append(override)
        elif first == name:
            mine.append(override.removeprefix(f"{name}."))
    return mine


def load_eval_config(file: Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Raises ConfigError, one line per fault."""

    def ready(node: dict[str, Any]) -> dict[str, Any]:
        return import_components(node, file)

    node = load_node(file, overrides, ready)
    try:
        config: Any = EVALS.parse(node)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(f"{file}: {line}" for line in explain(error)))) from None
    except ValueError as error:
        raise ConfigError(f"{file}: name: {error}") from None
    return config


def build_eval(config: EvalConfig, name: str) -> Eval:
    """The evaluation. Raises ConfigError for what it cannot do here."""
    from flexbert_core.schema import named

    with named(name):
        return EVALS.build(config)
