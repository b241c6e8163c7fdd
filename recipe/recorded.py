"""The config that a run has recorded, with what older versions left unsaid."""

from typing import Any

from recipe.schedules import falls


def as_recorded(node: dict[str, Any]) -> dict[str, Any]:
    """The node of a config.yaml, saying what those written up to commit 38751cb did not: a falling schedule fell from
    the phase's start on, beside the warmup; and `data: continue` stood beside `weights_only`, which it never meant. Up
    to 7fdd467 the run's objective stood beside that of the first phase, which made it one of no phase."""
    if "wandb" in node:  # a section of its own up to the same commit
        wandb = node.pop("wandb")
        node["loggers"] = ["tensorboard", *([{"name": "wandb", **wandb}] if wandb else [])]
    phases, origin = node.get("phases"), node.get("from")
    for phase in phases if isinstance(phases, list) else ():
        schedule = phase.get("schedule") if isinstance(phase, dict) else None
        if isinstance(schedule, dict) and falls(str(schedule.get("name"))) and phase.get("warmup"):
            schedule.setdefault("falls_from", "start")
    if isinstance(phases, list) and phases and isinstance(phases[0], dict) and phases[0].get("objective") is not None:
        node.pop("objective", None)
    if isinstance(origin, dict) and origin.get("weights_only"):
        origin.pop("data", None)
    return node
