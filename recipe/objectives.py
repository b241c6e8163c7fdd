"""What the objectives of a run's phases have to do with the rest of its file."""

from typing import Any

from data.feed.masking import MASKINGS, MaskingConfig, is_causal
from recipe.slots import OBJECTIVES


def own_masking(objective: Any) -> MaskingConfig | None:
    """The masking that an objective, by its config, brings along; None: it trains on any but such."""
    name = getattr(OBJECTIVES.entries[objective.name], "masking", None)
    parsed: Any = None if name is None else MASKINGS.parse(name)
    return parsed


def check_objectives(run: Any) -> None:
    """run: a RunConfig, whose schema asks. Raises ValueError `key: what is wrong: fix` for an objective that cannot
    train what the file says, and for a masking that its phase's objective does not read, or that no phase uses."""
    default: Any = OBJECTIVES.parse(type(run).model_fields["objective"].default)
    first = run.phases[0].objective
    # A recorded config has the default, too, whatever the file said.
    if first is not None and run.objective not in (default, first):
        raise ValueError(
            f"objective: {run.objective.name!r} is of no phase, phases[0].objective says {first.name!r}: leave one out"
        )
    objective, place, uses_masking = run.objective, "objective", False
    masking, key = run.masking, "masking"
    # Phases take over the run's masking until one names another.
    is_of_run, uses_that_of_run = True, False
    for number, phase in enumerate(run.phases):
        if phase.objective is not None:
            objective, place = phase.objective, f"phases[{number}].objective"
        own = own_masking(objective)
        if own is not None and phase.masking is not None:
            raise ValueError(
                f"phases[{number}].masking: objective {objective.name!r} has targets of its own ({own.name}): leave it "
                "out"
            )
        if phase.masking is not None:
            masking, key = phase.masking, f"phases[{number}].masking"
            is_of_run = is_of_run and masking.name == run.masking.name
        uses_masking = uses_masking or own is None
        uses_that_of_run = uses_that_of_run or (own is None and is_of_run)
        if own is None and is_causal(masking):
            raise ValueError(f"{key}: {masking.name!r} is brought along by objective clm: name that, and no masking")
        if (check := getattr(OBJECTIVES.entries[objective.name], "check", None)) is not None:
            try:
                check(objective, run)
            except ValueError as error:
                raise ValueError(f"{place}: {objective.name}: {error}") from None
    usual: Any = MASKINGS.parse(type(run).model_fields["masking"].default)
    if run.masking == usual:
        return
    if not uses_masking:
        raise ValueError("masking: the objectives of all phases have targets of their own: leave it out")
    if not uses_that_of_run:
        raise ValueError(
            f"masking: {run.masking.name!r} is used by no phase: those with targets to mask name another: leave it out"
        )
