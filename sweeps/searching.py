"""`search` of a sweep file: arms that Optuna's TPE proposes (Bergstra et al. 2011, "Algorithms for hyper-parameter
optimization"), and the best of them as an arm of the sweep.

Trials are trained once, with a seed that the sweep's own runs do not have. The best of many is better by luck, too: so
its loss in the search says little, and the arm is trained again with the sweep's seeds, which the choice has not seen.

SWEEP/search.json holds every trial and is written whole. A trial is drawn from it alone: the sampler's generator is
keyed by the seed and the trial's number. So a search that was killed proposes what it would have proposed, and trains
no finished trial again. A batch is proposed before any of it is trained; TPE takes those without a loss for bad ones.
A failed trial is told to it as worse than the worst, since it leaves out those that Optuna calls failed, and would go
on searching where runs diverge.
"""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.keyed import torch_seed
from flexbert_core.durable import write_file
from flexbert_core.schema import ConfigError
from sweeps.file import Range, Search
from sweeps.results import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution  # pyright: ignore[reportMissingImports]

FILE = "search.json"
TRIAL = "search-"
"""How trials are called as arms; their number follows."""


def check_installed() -> None:
    """Raises ConfigError without the package."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "search: the package optuna is not installed: pip install -r requirements-search.txt, or draw arms by "
            "`random`"
        )


def name_of(number: int) -> str:
    """Of a trial as an arm."""
    return f"{TRIAL}{number}"


def propose(search: Search, trials: Sequence[Trial]) -> Trial:
    """The next trial, by the losses of those before."""
    import optuna  # pyright: ignore[reportMissingImports] (requirements-search.txt)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    number, space = len(trials), {path: _distribution(values) for path, values in search.values.items()}
    sampler = optuna.samplers.TPESampler(seed=torch_seed(search.seed, "search", number) % 2**32, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    # How much worse says nothing: TPE goes by ranks.
    bad = max((each.loss for each in trials if each.loss is not None), default=0.0) + 1
    for each in trials:
        state = optuna.trial.TrialState["RUNNING" if each.state == "running" else "COMPLETE"]
        value = bad if each.state == "failed" else each.loss
        made = optuna.trial.create_trial(state=state, params=dict(each.params), distributions=space, value=value)
        study.add_trial(made)
    params = study.ask(space).params
    return Trial(number, params, {path: _value(search.values[path], param) for path, param in params.items()})


def _distribution(values: Range | Sequence[Any]) -> "BaseDistribution":
    from optuna.distributions import (  # pyright: ignore[reportMissingImports]
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if not isinstance(values, Range):
        return CategoricalDistribution(range(len(values)))  # places, since values may be mappings
    if values.integer:
        return IntDistribution(round(values.low), round(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _value(values: Range | Sequence[Any], param: Any) -> Any:
    if not isinstance(values, Range):
        return values[param]
    return values.value(param)


def ends_of(search: Search) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two points of the space, for a look at its paths: all values the smallest, or first of a list, and the largest,
    or last."""
    first, last = dict[str, Any](), dict[str, Any]()
    for path, values in search.values.items():
        bounds = (values.low, values.high) if isinstance(values, Range) else (values[0], values[-1])
        whole = isinstance(values, Range) and values.integer
        first[path], last[path] = map(round, bounds) if whole else bounds
    return first, last


def told(trial: Trial, loss: float | None, why: str = "") -> Trial:
    """With what came of it. loss: None, or not finite, is a failure."""
    if loss is None or not math.isfinite(loss):
        return replace(trial, state="failed", why=why or "its loss is not finite")
    return replace(trial, state="finished", loss=loss)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The one of the lowest loss, the first of equal ones."""
    done = [(trial.loss, trial.number, trial) for trial in trials if trial.loss is not None]
    return min(done)[2] if done else None


def read_search(folder: Path, search: Search | None = None) -> list[Trial]:
    """The trials of a sweep's folder. search: as the file has it now.

    Raises ConfigError for a damaged file, and when trials were drawn from another space or with another seed.
    """
    file = folder / FILE
    if not file.exists():
        return []
    try:
        node = json.loads(file.read_text())
        trials = [Trial(**{**each, "died_at": tuple(each.get("died_at", ()))}) for each in node["trials"]]
        rule = node["rule"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(f"{file}: damaged: restore it, or remove it and the runs of trials to search anew") from None
    if search is not None and trials and rule != _rule(search):
        raise ConfigError(
            f"{file}: its trials were drawn from {rule}, `search` now says {_rule(search)}: undo that, or give the "
            "sweep another folder"
        )
    return trials


def write_search(folder: Path, search: Search, trials: Sequence[Trial]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    node = {"rule": _rule(search), "trials": [asdict(each) for each in trials]}
    write_file(folder / FILE, json.dumps(node, indent=1) + "\n")


def _rule(search: Search) -> Mapping[str, Any]:
    """What may not change while a search goes on: more trials may be asked for."""
    return search.model_dump(mode="json", exclude={"trials", "batch"})
