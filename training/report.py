"""What a run tells people: the model card and the closing table."""

from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from callbacks.step_log import shown
from data.feed.loader import tokenizer_folder
from data.feed.masking import DEFAULT
from flexbert.accounting import count_parameters
from flexbert.hf.convert import carries_code, check_exportable
from flexbert.hf.parts import outside
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
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
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(config.data), local_files_only=True)
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
        *([f"The objective is `{config.objective.name}`.", ""] if config.objective.name != "mlm" else []),
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
        where = f"the run {origin['run']}" if origin["run"] else "a Hugging Face folder"
        before = f", which had trained on {origin['tokens']:,} tokens" if origin["tokens"] else ""
        return f"Started from the weights of `{origin['from']}` ({where}{before}); then t"
    if config.model.init.name == "grow":
        return f"Started from the weights of `{config.model.init.source}`, grown to this size; then t"
    return "T"


def _together(tokens: int, origin: dict[str, Any] | None) -> str:
    return (
        f": {origin['tokens'] + tokens:,} tokens with those before" if origin is not None and origin["tokens"] else ""
    )


def closing_table(config: RunConfig, summary: dict[str, Any], console: Console) -> None:
    """The figures of summary.json, where each artifact lies, and what to try next."""
    validation = summary["validation"]
    table = Table("stream", "tokens seen", "held-out loss", "masked accuracy", "baseline", title=f"{config.name}: done")
    for name, result in validation["streams"].items():
        seen = summary["stream_tokens"][name]
        table.add_row(
            name,
            f"{seen:,}",
            shown(result["loss"], ".3f"),
            shown(result["masked_accuracy"], ".1%"),
            shown(result["unigram_accuracy"], ".1%"),
        )
    table.add_section()
    table.add_row(
        "all",
        f"{summary['tokens']:,}",
        shown(validation["loss"], ".3f"),
        shown(validation["masked_accuracy"], ".1%"),
        shown(validation["unigram_accuracy"], ".1%"),
        style="bold",
    )
    console.print(table)
    accuracy, unigram = (validation[key] or 0.0 for key in ("masked_accuracy", "unigram_accuracy"))
    ratio = accuracy / max(unigram, 1e-9)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("baseline", f"the most frequent token, always; accuracy is {ratio:.2f}x that")
    facts.add_row("tokens/s", f"{summary['tokens_per_second']:,.0f}")
    facts.add_row("packing efficiency", f"{summary['packing_efficiency']:.2%}")
    facts.add_row("time", f"{summary['seconds']:.0f} s ({summary['train_seconds']:.0f} s of training steps)")
    facts.add_row("export", summary["export"] or _no_export(config))
    facts.add_row("checkpoints", str(config.folder / "checkpoints"))
    if (curves := config.folder / "curves.png").exists():
        facts.add_row("curves", str(curves))
    facts.add_row("metrics", f"{config.folder / 'metrics.jsonl'}, {config.folder / 'tensorboard'}")
    console.print(facts)


def _no_export(config: RunConfig) -> str:
    try:
        check_exportable(config.model)
    except ConfigError as error:
        return f"none: {error}"
    if outside(config.model):
        return "none: a part of imports failed in it, as a warning says, or it was removed"
    return "none: it was removed, and so were the checkpoints"


def _masking(phase: Phase) -> str:
    """The rate, and the name of a masking that is not the usual one."""
    name = phase.masking.name
    return f"{phase.masking.rate:g}" + (f" ({name})" if name != DEFAULT else "")
