"""A run in one picture: loss, learning rate, batch size, RoPE theta and sequence length against tokens."""

import logging
from pathlib import Path
from typing import Any

from callbacks.step_log import read_lines
from flexbert_core.schema import ConfigError
from recipe.phases import PhasePlan
from training.folder import RunFolder

log = logging.getLogger(__name__)
_PANELS = ("loss\n(nats per masked token)", "learning rate", "rows per step", "RoPE theta", "slots per row")


def report(path: Path, picture: Path | None) -> Path:
    """Draw the curves of a run, live or dead, to `picture`, by default RUN/curves.png. Returns where.

    Raises ConfigError when `path` is no run folder, or has trained no step yet, or the picture cannot be written there.
    """
    folder = RunFolder(path)
    plan, picture = PhasePlan(folder.recorded_config()), picture or folder.curves
    try:
        drawn = _draw(folder.metrics, picture, plan)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output: {picture}: {error}: give a .png, .pdf or .svg in a folder that exists") from None
    if not drawn:
        raise ConfigError(f"{path}: nothing to draw: metrics.jsonl has no line with a loss of training yet")
    return picture


def draw_curves(metrics: Path, picture: Path, plan: PhasePlan) -> None:
    """At a run's end: the picture, or a line that says why there is none."""
    if not _draw(metrics, picture, plan):
        log.warning(
            "%s: not drawn: no line of metrics.jsonl has a loss of training; a lower trainer.log_interval gives some",
            picture,
        )


def draw_until(metrics: Path, picture: Path, plan: PhasePlan, tokens: int) -> bool:
    """The picture of a checkpoint: what was logged up to its tokens. False, and no picture, when that is no loss."""
    return _draw(metrics, picture, plan, tokens)


def _draw(metrics: Path, picture: Path, plan: PhasePlan, until: int | None = None) -> bool:
    """Five panels over one axis of tokens (slots): training and held-out loss, then what the phases set; phases shaded.

    All from the lines of metrics.jsonl, so from what was trained and not from what was planned. False, and no picture,
    when none of them has a loss.
    """
    lines = [line for line in read_lines(metrics) if until is None or line["tokens"] <= until]
    train = [line for line in lines if line.get("loss") is not None]
    if not train:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    held_out = [line for line in lines if "validation" in line]
    figure, axes = plt.subplots(
        len(_PANELS), figsize=(8, 9.5), dpi=110, sharex=True, gridspec_kw={"height_ratios": [3, 1, 1, 1, 1]}
    )
    for axis, label in zip(axes, _PANELS, strict=True):
        axis.set_ylabel(label, fontsize=9)
        axis.grid(alpha=0.3)
        for number, phase in enumerate(plan.phases):
            axis.axvspan(phase.first_token, phase.end_token, color="0.5", alpha=0.05 + 0.08 * (number % 2), lw=0)
    total = plan.phases[-1].end_token
    narrow = any(phase.end_token - phase.first_token < total / 8 for phase in plan.phases)
    for number, phase in enumerate(plan.phases):
        middle, top = (phase.first_token + phase.end_token) / 2, axes[0].get_xaxis_transform()
        height = 0.94 if narrow and number % 2 else 0.985  # names of narrow neighbours would lie on one another
        axes[0].text(middle, height, phase.name, transform=top, ha="center", va="top", fontsize=9)
    _draw_loss(axes[0], train, held_out)
    tokens = [line["tokens"] for line in train]
    steps: dict[str, Any] = {"drawstyle": "steps-pre", "lw": 1.5}  # a line speaks of the steps up to its tokens
    axes[1].plot(tokens, [line["lr"] for line in train], lw=1.5)
    axes[2].plot(tokens, [line["global_batch_size"] for line in train], **steps)
    for name, style in (("global", "-"), ("local", "--")):
        thetas = [line.get("rope_theta", {}).get(name) for line in train]
        if any(thetas):
            axes[3].plot(tokens, thetas, style, label=f"{name} layers", **steps)
    axes[4].plot(tokens, [line["max_seq_len"] for line in train], **steps)
    if axes[3].lines:
        axes[3].set_yscale("log")
        axes[3].legend(loc="upper left", fontsize=8)
    else:
        axes[3].text(
            0.5, 0.5, "the model has no rotary positions", transform=axes[3].transAxes, ha="center", va="center"
        )
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[1].yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes[1].set_ylim(bottom=0)
    for axis, key in ((axes[2], "global_batch_size"), (axes[4], "max_seq_len")):
        values = sorted({line[key] for line in train})
        axis.set_ylim(0, 1.15 * values[-1])
        if len(values) < 5:
            axis.set_yticks(values)
    axes[4].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[4].set_xlabel("tokens")
    figure.align_ylabels()
    figure.tight_layout()
    beside = picture.with_name(f".unfinished-{picture.name}")
    figure.savefig(beside)
    plt.close(figure)
    beside.replace(picture)
    return True


def _draw_loss(axis: Any, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    axis.plot([line["tokens"] for line in train], [line["loss"] for line in train], lw=1, label="training")
    if held_out:
        points = [(line["tokens"], line["validation"]["loss"]) for line in held_out]  # None: a gap
        axis.plot(*zip(*points, strict=True), "o-", ms=4, label="held-out")
    axis.legend(loc="lower left", fontsize=9)
