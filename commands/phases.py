"""`main.py phases RUN`: what a run has trained, what is to come, and what of it may still change."""

from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from commands.status import read_status
from recipe.phases import Phase, PhasePlan
from training.folder import RunFolder


def show_phases(path: Path, console: Console) -> None:
    """Print a column for each phase. Raises ConfigError when `path` is no run folder."""
    config = RunFolder(path).recorded_config()
    plan, status = PhasePlan(config), read_status(path)
    step, speed = status["step"], (status["metrics"] or {}).get("tokens_per_second")
    columns = [_facts(plan, phase, step, speed) for phase in plan.phases]
    table = Table("phase", *(phase.name for phase in plan.phases))
    for fact in columns[0]:
        table.add_row(fact, *(column[fact] for column in columns))
    console.print(table)
    console.print(
        f"{path}: {status['state']}, step {step:,} of {plan.total_steps:,}, {plan.tokens_before(step):,} of "
        f"{plan.total_tokens:,} tokens",
        soft_wrap=True,
    )
    for steps in config.trainer.skip_steps:
        console.print(f"left out: steps {steps}")
    if any(step <= phase.first_step for phase in plan.phases[1:]):  # the first is settled when the run begins
        console.print("a phase that has not begun may be changed in the run file, left out, or added behind the last")
    else:
        console.print("another phase may be added behind the last in the run file")


def _facts(plan: PhasePlan, phase: Phase, step: int, speed: float | None) -> dict[str, str]:
    done = min(max(step - phase.first_step, 0), phase.steps)
    state = f"{done / phase.steps:.0%}" if 0 < done < phase.steps else "done" if done else "to come"
    left = plan.tokens_before(phase.end_step) - plan.tokens_before(phase.first_step + done)
    last = phase.end_step - 1
    streams = phase.streams
    return {
        "state": state,
        "still takes": f"{timedelta(seconds=round(left / speed))}" if speed and left else "",
        "tokens": f"{phase.first_token:,} to {phase.end_token:,}",
        "steps": f"{phase.first_step + 1:,} to {phase.end_step:,}",
        "rows x length": f"{phase.global_batch_size} x {phase.max_seq_len}",
        "learning rate": f"{phase.lr(phase.first_step):.3g} to {phase.lr(last):.3g}, peak {phase.peak_lr:g}",
        "objective": phase.objective.name,
        "masking rate": "none: next tokens" if phase.is_causal else phase.masking.describe(),
        "streams": "as data.streams" if streams is None else ", ".join(streams),
        "RoPE theta": f"{phase.theta_global or 'as the model'}, local {phase.theta_local or 'as the model'}",
    }
