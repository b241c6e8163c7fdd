"""Which checkpoints are kept, wherever they lie."""

import json
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from recipe.sections import CheckpointConfig

K = TypeVar("K")


class Facts(NamedTuple):
    """Of a checkpoint: its step, and the validation loss at it where it was evaluated."""

    step: int
    validation_loss: float | None


def facts_of(state: str | bytes) -> Facts:
    """From a checkpoint's state.json. Of a damaged one: step 0, no loss; and no loss where it is not finite, or 0: up
    to commit 38751cb that stood for an evaluation without a masked token."""
    try:
        run = json.loads(state)["run"]
        loss = run.get("validation_loss")
        return Facts(int(run["step"]), loss if loss and math.isfinite(loss) else None)
    except (ValueError, KeyError, TypeError):
        return Facts(0, None)


def surplus(
    checkpoints: Mapping[K, Facts], newest: K, config: CheckpointConfig, is_permanent: Callable[[int], bool]
) -> list[K]:
    """Those to remove of checkpoints, oldest first: all but the permanent ones, and of the others the newest `keep` and
    the `keep_best` of the lowest validation loss (of equal ones the newest).

    newest: just written. What is there of later steps was skipped as damaged or given up, and must not count as one of
    `keep`.
    """
    keys = list(checkpoints)
    later = keys[keys.index(newest) + 1 :]
    passing = [key for key in keys[: len(keys) - len(later)] if not is_permanent(checkpoints[key].step)]
    judged = [key for key in reversed(passing) if checkpoints[key].validation_loss is not None]
    best = sorted(judged, key=lambda key: checkpoints[key].validation_loss or 0.0)[: config.keep_best]
    return later + [key for key in passing[: -config.keep] if key not in best]
