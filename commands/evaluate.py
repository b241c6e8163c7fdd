"""`main.py eval`: evaluations of models, and one table of all of them."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from evals.config import build_eval, eval_files, load_eval_file, overrides_of
from evals.driver import evaluate, one_line, run_group
from evals.models import resolve
from evals.results import ScoreTable, write_results
from flexbert_core.durable import write_file
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, RunError

_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*=")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Models and overrides."""
    overrides = [each for each in arguments if _OVERRIDE.match(each) and not Path(each).exists()]
    return [each for each in arguments if each not in overrides], overrides


def run_eval(
    names: str,
    arguments: Sequence[str],
    output: Path,
    console: Console,
    group: str | None = None,
    label: str | None = None,
) -> bool:
    """Evaluate and print the table, which is also OUTPUT/table.md and .csv. Whether all went well.

    group, label: of a job: it computes one group of cells of one model. Raises ConfigError, before anything is
    computed, for names, models and overrides that are nothing.
    """
    sources, overrides = split(arguments)
    if not sources:
        raise ConfigError("eval: no model: give a run (runs/NAME), an export, or another folder with a config.json")
    files = eval_files(names)
    for override in overrides:
        first = override.split("=", 1)[0].split(".", 1)
        if len(files) > 1 and first[0] not in (*files, "executor"):
            raise ConfigError(
                f"{override}: of several evaluations say which one it is for: NAME.key=value, "
                f"{did_you_mean(first[0], files)}"
            )
    configs = {name: load_eval_file(file, overrides_of(name, list(files), overrides)) for name, file in files.items()}
    evaluations = {name: build_eval(config.evaluation, name) for name, config in configs.items()}
    models = resolve(sources, output / ".models")
    if group is not None:
        (name,) = files
        (model,) = models
        named = model if label is None else type(model)(**{**vars(model), "label": label})
        return run_group(name, evaluations[name], named, output, group, console)
    table, fine, lines = ScoreTable(), True, []
    for name, config in configs.items():
        again = [str(files[name]), *overrides_of(name, list(files), overrides)]
        outcomes = evaluate(name, config, evaluations[name], models, output, again, console)
        for outcome in outcomes:
            write_results(outcome, config.evaluation)
            table.add(name, outcome.task.model.label, outcome.scores, list(outcome.failed))
            fine = fine and not outcome.failed
        whole = {outcome.task.model.label: outcome.results for outcome in outcomes if outcome.scores is not None}
        if whole:
            try:
                lines += [f"{name}: {line}" for line in evaluations[name].compare(whole, output / name)]
            except Exception as error:  # it costs no scores
                fine = _warn(f"{name}: models are not compared: {one_line(error)}", console)
    for name, evaluation in evaluations.items():
        try:
            rows = evaluation.scores_without_model()
        except Exception as error:
            fine = _warn(f"{name}: no rows without a model: {one_line(error)}", console)
            continue
        for row, scores in rows.items():
            table.add(name, row, scores)
    try:
        write_file(output / "table.md", table.markdown() + "".join(f"\n- {line}" for line in lines))
        write_file(output / "table.csv", table.csv())
    except OSError as error:
        raise RunError(f"{error.filename or output}: {error.strerror}") from None
    table.print(console)
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print(
        f"{output}/table.md, {output}/table.csv; NAME/MODEL/results.json has each score's parts", soft_wrap=True
    )
    return fine


def _warn(message: str, console: Console) -> bool:
    """That something failed, which stops nothing. False."""
    console.print(f"warning: {message}", soft_wrap=True)
    return False
