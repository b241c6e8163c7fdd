"""What a run measures between its steps: the held-out loss, and the entries of slot `evaluations` beside it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from composer.core import Callback
from composer.loggers import Logger

from callbacks.ema import WeightAverage
from callbacks.step_log import flat, shown
from data.store.shards import Stream
from flexbert import FlexBertForMaskedLM
from flexbert_core.schema import RunError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import EVALUATIONS
from training.checkpoints.sharded import reshard
from training.compiling import eagerly
from training.held_out import HeldOut
from training.parts import build_parts, by_name


class Evaluation(Protocol):
    """What an entry offers; it is constructed with (config, run=RunConfig, plan=PhasePlan, streams=the opened training
    streams, folder=runs/NAME)."""

    def run(self, model: FlexBertForMaskedLM, step: int) -> Mapping[str, Any]:
        """Scores after `step` steps: numbers by name, in mappings where there are many; the same on every rank. None:
        there is no such number. The model is in evaluation mode, without gradients; where ranks hold parts of it
        (FSDP2) parts of the model are called inside `model.within`. A collective."""
        ...


def build_evaluations(
    config: RunConfig, plan: PhasePlan, streams: Sequence[Stream]
) -> tuple[HeldOut, dict[str, Evaluation]]:
    """The first one, and the others by name. streams: of training. Raises ConfigError for what cannot be measured."""
    facts = {"run": config, "plan": plan, "streams": streams, "folder": config.folder}
    held_out = HeldOut(config.evaluation, **facts)
    others = build_parts("evaluations", EVALUATIONS, config.evaluations, **facts)
    return held_out, by_name(list(zip([entry.name for entry in config.evaluations], others, strict=True)))


class Evaluations:
    """All of a run, for its weights and for their moving average."""

    def __init__(
        self,
        config: RunConfig,
        plan: PhasePlan,
        streams: Sequence[Stream],
        model: FlexBertForMaskedLM,
        ema: WeightAverage | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        say: Callable[[str], None],
    ) -> None:
        """streams: of training. Raises ConfigError for what cannot be measured."""
        self.held_out, self.others = build_evaluations(config, plan, streams)
        self.plan, self.interval, self.model = plan, config.evaluation.interval, model
        self.ema, self.autocast, self.say = ema, autocast, say
        self.callbacks = [evaluation for evaluation in self.others.values() if isinstance(evaluation, Callback)]
        """Those that hear the run's events, too."""
        self.latest: tuple[int, dict[str, Any]] | None = None
        """Step and result of this process's last held-out evaluation."""
        self.evaluated = 0
        """The step of the last evaluation, also of one before a restart."""

    def due(self, step: int) -> bool:
        """Whether to measure after so many steps."""
        return self.plan.is_milestone(step) or self.plan.crosses(step, self.interval)

    def run(self, step: int, logger: Logger) -> None:
        """Measure, log and say it. A collective."""
        result = self._measure(step, logger, "")
        self.latest, self.evaluated = (step, result), step
        averaged = ""
        if self.ema is not None and self.ema.updates:
            with self.ema.swapped_in():
                of_average = self._measure(step, logger, "_ema")
            averaged = f"; of the averaged weights: loss {shown(of_average['loss'], '.3f')}"
        self.say(
            f"           validation after {self.plan.tokens_before(step):,} tokens: "
            f"loss {shown(result['loss'], '.3f')}, "
            f"masked accuracy {shown(result['masked_accuracy'], '.1%')} "
            f"(most frequent token: {shown(result['unigram_accuracy'], '.1%')})"
            f"{_bound(result)}{averaged}"
        )

    def of_start(self, record: dict[str, Any], logger: Logger) -> dict[str, Any]:
        """Measure the weights that a branch starts with; its record with the held-out loss. A collective."""
        with eagerly():
            self.run(0, logger)
        assert self.latest is not None
        return {**record, "validation": self.latest[1]}

    @torch.no_grad()
    def _measure(self, step: int, logger: Logger, suffix: str) -> dict[str, Any]:
        was_training = self.model.training
        self.model.eval()
        with self.autocast():
            result = self.held_out.run(self.model, step)
            logger.log_metrics(flat(result, f"validation{suffix}"))
            for name, evaluation in self.others.items():
                scores = evaluation.run(self.model, step)
                _check(scores, name)
                logger.log_metrics(flat(scores, f"evaluations{suffix}/{name}"))
                if numbers := [f"{key} {shown(score, '.4g')}" for key, score in scores.items() if _is_number(score)]:
                    self.say(f"           {name}{suffix} after step {step:,}: {', '.join(numbers)}")
        reshard(self.model)
        self.model.train(was_training)
        return result

    def written(self, path: Path) -> None:
        """Tell those that evaluate checkpoints (`written(path)`) of a whole one, which may soon be removed."""
        for evaluation in self.others.values():
            if (tell := getattr(evaluation, "written", None)) is not None:
                tell(path)

    def finish(self, logger: Logger) -> None:
        """After the run's summary: let those end that go on beside it (`finish(logger)`)."""
        for evaluation in self.others.values():
            if (end := getattr(evaluation, "finish", None)) is not None:
                end(logger)

    def loss_at(self, step: int) -> float | None:
        """The held-out loss after so many steps, where this process has measured it last."""
        return self.latest[1]["loss"] if self.latest and self.latest[0] == step else None


def _bound(result: Mapping[str, Any]) -> str:
    return f"; negative log-likelihood at most {result['nll_bound']:.3f}" if "nll_bound" in result else ""


def _is_number(score: Any) -> bool:
    return score is None or (isinstance(score, int | float) and not isinstance(score, bool))


def _check(scores: Any, name: str) -> None:
    """Raises RunError for what is no scores: it would be left out without a word."""
    if not isinstance(scores, Mapping):
        raise RunError(f"evaluations: {name}: run() gives a {type(scores).__name__}: give numbers by name")
    for key, score in scores.items():
        if isinstance(score, Mapping):
            _check(score, f"{name}: {key}")
        elif not _is_number(score):
            raise RunError(f"evaluations: {name}: {key} is a {type(score).__name__}: give a plain number, or null")
