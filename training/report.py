"""What a run tells people: the model card and the closing table."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from callbacks.step_log import shown
from data.feed.loader import tokenizer_folder
from data.feed.masking import DEFAULT
from flexbert.accounting import count_parameters
from flexbert.hf.convert import carries_code, check_exportable
from flexbert.hf.parts import outside
from flexbert.hf.tokenizer import load_tokenizer
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.hub import HUB
from recipe.phases import Phase, PhasePlan


def describe_model(config: RunConfig) -> str:
    model = config.model
    return f"{count_parameters(model):,} parameters ({model.num_hidden_layers} layers, width {model.hidden_size})"


def model_card(
    config: RunConfig,
    plan: PhasePlan,
    tokens: int,
    evaluation: dict[str, Any] | None,
    note: str | None = None,
    origin: dict[str, Any] | None = None,
) -> str:
    """README.md of an export: what it is, what it saw, how good it is, how to load it.

    note: how these weights were made from those of the run. origin: what origin.json holds, of a branch.
    """
    model = config.model
    tokenizer = load_tokenizer(tokenizer_folder(config.data))  # whichever transformers wrote it
    trust = ", trust_remote_code=True" if carries_code(model) else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: fill-mask",
        "---",
        f"# {config.name}, {tokens:,} tokens",
        "",
        f"A masked language model pretrained with FlexBERT: {describe_model(config)}, "
        f"{model.num_attention_heads} heads, up to {model.max_position_embeddings} positions.",
        "",
        f"{_beginning(config, origin)}rained on {tokens:,} of {plan.total_tokens:,} planned tokens of: "
        f"{', '.join(config.data.streams)}{_together(tokens, origin)}.",
        "",
        *([note, ""] if note else []),
        *_objectives(plan),
        "| phase | tokens | row length | rows per step | peak learning rate | masking rate |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {phase.name} | {min(tokens, phase.end_token) - phase.first_token:,} | {phase.max_seq_len} | "
        f"{phase.global_batch_size} | {phase.peak_lr:g} | {_masking(phase)} |"
        for phase in plan.phases
        if phase.first_token < tokens
    ]
    if evaluation is not None:
        lines += [
            "",
            f"Held-out text, {config.evaluation.masking.rate:.0%} masked: "
            f"loss {shown(evaluation['loss'], '.4f')} nats, "
            f"masked accuracy {shown(evaluation['masked_accuracy'], '.4f')} "
            f"(always answering the most frequent token: {shown(evaluation['unigram_accuracy'], '.4f')}).",
        ]
    lines += [
        "",
        "```python",
        "from transformers import pipeline",
        f'fill_mask = pipeline("fill-mask", model="PATH/TO/THIS/FOLDER"{trust})',
        f'print(fill_mask("The quick brown {tokenizer.mask_token} jumps."))',
        "```",
        "",
    ]
    return "\n".join(lines)


def _beginning(config: RunConfig, origin: dict[str, Any] | None) -> str:
    """Where the weights come from, up to the T of "Trained"."""
    if origin is not None:
        kind = "a model of the Hugging Face hub" if origin["from"].startswith(HUB) else "a Hugging Face folder"
        where = f"the run {origin['run']}" if origin["run"] else kind
        if new := origin.get("vocabulary", {}).get("new"):
            where += f"; {new:,} tokens are new"
        before = f", which had trained on {origin['tokens']:,} tokens" if origin["tokens"] else ""
        return f"Started from the weights of `{origin['from']}` ({where}{before}); then t"
    if config.model.init.name == "grow":
        return f"Started from the weights of `{config.model.init.source}`, grown to this size; then t"
    return "T"


def describe_tokens(vocabulary: dict[str, Any]) -> str:
    """Of origin.json's `vocabulary`: how many rows of the token table are the source's, and which are new."""
    said = f"{vocabulary['copied']:,} rows of the token table are the source's"
    if not vocabulary["new"]:
        return said
    first = ", ".join(map(repr, vocabulary["first"]))
    more = ", ..." if vocabulary["new"] > len(vocabulary["first"]) else ""
    return f"{said}, {vocabulary['new']:,} are new ({first}{more}) and start as {vocabulary['init']}"


def _together(tokens: int, origin: dict[str, Any] | None) -> str:
    return (
        f": {origin['tokens'] + tokens:,} tokens with those before" if origin is not None and origin["tokens"] else ""
    )


def closing_table(config: RunConfig, summary: dict[str, Any], console: Console) -> None:
    """The figures of summary.json, where each artifact lies, and what to try next."""
    validation, before = summary["validation"], summary.get("validation_before")
    columns = ["masked accuracy", "baseline"]
    losses = ["held-out loss"] if before is None else ["loss before", "loss after"]
    table = Table("stream", "tokens seen", *losses, *columns, title=f"{config.name}: done")
    for name, result in validation["streams"].items():
        first = None if before is None else before["streams"].get(name)
        table.add_row(name, f"{summary['stream_tokens'][name]:,}", *_scores(result, first))
    table.add_section()
    table.add_row("all", f"{summary['tokens']:,}", *_scores(validation, before), style="bold")
    console.print(table)
    accuracy, unigram = (validation[key] or 0.0 for key in ("masked_accuracy", "unigram_accuracy"))
    ratio = accuracy / max(unigram, 1e-9)
    files = config.folder / "checkpoints", config.folder / "metrics.jsonl", config.folder / "tensorboard"
    checkpoints, metrics, tensorboard = map(from_here, files)
    curves = config.folder / "curves.png"
    facts = {
        "baseline": f"the most frequent token, always; accuracy is {ratio:.2f}x that",
        "tokens/s": f"{summary['tokens_per_second']:,.0f} in training steps",
        "packing efficiency": f"{summary['packing_efficiency']:.2%}",
        "time": f"{summary['seconds']:.0f} s ({summary['train_seconds']:.0f} s of training steps)",
        "export": from_here(Path(summary["export"])) if summary["export"] else _no_export(config),
        "checkpoints": checkpoints,
        **({"curves": from_here(curves)} if curves.exists() else {}),
        "metrics": f"{metrics}, {tensorboard}",
    }
    for name, value in facts.items():
        console.print(f"{name:<20}{value}", soft_wrap=True)  # a table would cut long paths


def from_here(path: Path) -> Path:
    """Relative to the current folder, where it lies below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _scores(result: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """Cells of a row. before: of the weights that a branch started with."""
    first = [] if before is None else [shown(before["loss"], ".3f")]
    others = [shown(result[key], ".1%") for key in ("masked_accuracy", "unigram_accuracy")]
    return [*first, shown(result["loss"], ".3f"), *others]


def _no_export(config: RunConfig) -> str:
    try:
        check_exportable(config.model)
    except ConfigError as error:
        return f"none: {error}"
    if outside(config.model):
        return "none: a part of imports failed in it, as a warning says, or it was removed"
    return "none: it was removed, and so were the checkpoints"


def _objectives(plan: PhasePlan) -> list[str]:
    names = [phase.objective.name for phase in plan.phases]
    if set(names) == {"mlm"}:
        return []
    if len(set(names)) == 1:
        return [f"The objective is `{names[0]}`.", ""]
    told = (f"`{name}` in {phase.name}" for name, phase in zip(names, plan.phases, strict=True))
    return [f"The objectives are {', '.join(told)}.", ""]


def _masking(phase: Phase) -> str:
    """The rate, and the name of a masking that is not the usual one."""
    name = phase.masking.name
    return phase.masking.describe() + (f" ({name})" if name != DEFAULT else "")
