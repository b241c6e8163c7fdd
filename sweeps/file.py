"""The schema of a sweep file: the only place for its defaults, ranges and help text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from flexbert_core.composing import load_node
from flexbert_core.schema import Schema, UserPath, or_text, validate
from jobs.base import JOBS
from recipe.origin import Origin, named_origin
from recipe.slots import EVALUATIONS

ARM = r"^[A-Za-z0-9][A-Za-z0-9_.=,+-]*$"
SEED = "{seed}"
Equal = Literal["parameters", "flops", "tokens", "hours"]


class Range(Schema):
    """Numbers to draw from, between two bounds."""

    low: float = Field(description="the smallest")
    high: float = Field(description="the largest")
    log: bool = Field(default=False, description="evenly in the logarithm")
    integer: bool = Field(default=False, description="whole numbers, the bounds among them")

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not under high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: low {self.low:g} is not over 0")
        if self.integer:
            for name, bound in (("low", self.low), ("high", self.high)):
                if not bound.is_integer():
                    raise ValueError(f"integer: {name} {bound:g} is not whole: give a whole number")
        return self

    def value(self, drawn: float) -> float:
        """As a config takes it: whole, or of four digits, and never beyond a bound."""
        if self.integer:
            return round(drawn)
        return min(max(float(f"{drawn:.4g}"), self.low), self.high)


def _as_range(node: Any) -> Any:
    """So that what is wrong with a range is said of it alone, and not that it is no list, too."""
    return Range.model_validate(node) if isinstance(node, dict) else node


Values = Annotated[Range | list[Any], BeforeValidator(_as_range)]


class Random(Schema):
    """Arms drawn at random."""

    arms: int = Field(ge=1, le=1000, description="how many; raised later, the first ones stay what they are")
    seed: int = Field(default=0, ge=0, description="of the draws")
    values: dict[str, Values] = Field(min_length=1, description="by config path: a range, or a list to choose from")


class Search(Schema):
    """Arms that Optuna's TPE proposes, one after the other; the best is an arm of the sweep, search-N."""

    trials: int = Field(ge=2, le=1000, description="how many; may be raised later")
    values: dict[str, Values] = Field(min_length=1, description="by config path: a range, or a list to choose from")
    batch: int = Field(
        default=1, ge=1, description="trials that are proposed together, so that as many can be trained at a time"
    )
    seed: int = Field(default=0, ge=0, description="of the proposals")
    train_seed: int = Field(
        default=1000,
        ge=0,
        description="of the trials' runs; none of `seeds`, which the best is then trained with; a `branch_from` with "
        "{seed} needs a checkpoint of it, too",
    )

    @model_validator(mode="after")
    def _check(self) -> "Search":
        for path, values in self.values.items():
            if not isinstance(values, Range) and len(values) < 2:
                raise ValueError(f"values.{path}: {len(values)} to choose from: give two or more, or say it in `set`")
        return self


class Stop(Schema):
    """Successive halving: arms are paused at rungs, and the best by held-out loss, the mean over seeds, go on."""

    rungs: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default=[0.25, 0.5],
        min_length=1,
        description="shares of each arm's budget at which arms are stopped, rising; none lies inside a warmup",
    )
    reduction: float = Field(
        default=2.0, gt=1, description="of so many arms that come to a rung one goes on, rounded up"
    )
    survivors: int = Field(default=1, ge=1, description="arms that go on at least, beside the baseline")

    @model_validator(mode="after")
    def _check(self) -> "Stop":
        if self.rungs != sorted(set(self.rungs)):
            raise ValueError(f"rungs: {self.rungs} do not rise: put them in order, each once")
        return self


class SweepFile(Schema):
    """An ablation: one run file, arms that differ from its baseline in what they say, seeds. `grid` is crossed, `list`
    names arms, `random` draws them, `search` looks for a good one; all of them may stand together."""

    base: UserPath = Field(description="the run file that arms change; relative to this file")
    set: list[str] = Field(default=[], description="values for all arms, as on the command line: key.path=value")
    branch_from: Annotated[Origin, BeforeValidator(named_origin), or_text(".", "runs/stable-s{seed}")] | None = Field(
        default=None,
        description="a checkpoint that every arm starts from, such as decays of one stable run: `from` of each run "
        "file; {seed} in it stands for the run's seed",
    )
    folder: UserPath | None = Field(
        default=None,
        description="where the sweep lies; default: sweep-NAME in the run file's `runs`, NAME of this file",
    )
    baseline: str = Field(
        default="baseline",
        pattern=ARM,
        description="the arm that others are compared with; default: one that changes nothing",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0, 1, 2], min_length=1, description="each arm is trained once with each; more may be added later"
    )
    grid: dict[str, list[Any]] = Field(
        default={}, description="by config path its values; an arm for each combination, called key=value,..."
    )
    listed: dict[Annotated[str, Field(pattern=ARM)], dict[str, Any]] = Field(
        default={}, alias="list", description="arms by name: config paths and their values"
    )
    random: Random | None = Field(default=None, description="arms drawn at random, called random-N")
    search: Search | None = Field(
        default=None, description="arms that are looked for by their held-out loss; needs requirements-search.txt"
    )
    equal: Equal | None = Field(
        default=None,
        description="what every arm gets as much of as the baseline: parameters (model.intermediate_size is adjusted), "
        "or tokens, FLOPs or hours (the phases' budgets are adjusted)",
    )
    stop: Stop | None = Field(
        default=None, description="which arms are not trained to the end; {}: the defaults; absent: none is stopped"
    )
    slots_per_second: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="of arms, padding counted, as metrics.jsonl says of a run under this name: for equal hours, and "
        "for the hours of --dry-run",
    )
    noise: float | None = Field(
        default=None,
        gt=0,
        description="standard deviation of a paired difference of two arms over seeds, in nats, for --dry-run",
    )
    evaluations: list[Annotated[Any, *EVALUATIONS.slot()]] = Field(
        default=[], description="of each arm, beside the run file's, such as {name: eval, files: [glue-quick]}"
    )
    processes: int = Field(default=1, ge=1, description="of each run, started by `composer -n`")
    executor: Annotated[Any, *JOBS.slot()] = Field(default="local", description="where runs are trained")

    @model_validator(mode="after")
    def _check(self) -> "SweepFile":
        if len(set_of := dict.fromkeys(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: a value stands there twice: {self.seeds} has {len(set_of)} different ones")
        for path, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{path}: no values")
        if not (self.grid or self.listed or self.random or self.search):
            raise ValueError("no arms: give grid, list, random or search")
        if self.search is not None and self.search.train_seed in self.seeds:
            raise ValueError(
                f"search.train_seed: {self.search.train_seed} is one of seeds: give another, so that the choice is not "
                "judged by the runs that it was made by"
            )
        if len(self.seeds) > 1 and self.branch_from is not None and not self._branches_by_seed(self.branch_from):
            raise ValueError(
                "branch_from: one checkpoint goes on with its own seed only: write {seed} into its path, or give "
                "data: restart, or one seed"
            )
        if self.equal == "hours" and not self.slots_per_second:
            raise ValueError("equal: hours: needs slots_per_second of each arm: take those of metrics.jsonl")
        if self.equal == "hours" and self.search is not None:
            raise ValueError(
                "equal: hours: slots_per_second of a trial is not known before it is trained: search at equal tokens "
                "or flops"
            )
        return self

    @staticmethod
    def _branches_by_seed(origin: Origin) -> bool:
        return SEED in origin.checkpoint or origin.meaning[1] == "restart"

    def origin(self, seed: int) -> dict[str, Any] | None:
        """`from` of the runs with a seed."""
        if self.branch_from is None:
            return None
        checkpoint = self.branch_from.checkpoint.replace(SEED, str(seed))
        return {**self.branch_from.model_dump(mode="json", exclude_none=True), "checkpoint": checkpoint}


def load_sweep_file(file: str | Path, overrides: Sequence[str] = ()) -> SweepFile:
    """Raises ConfigError, one line per fault."""
    file = Path(file)
    return validate(SweepFile, load_node(file, overrides), file)
