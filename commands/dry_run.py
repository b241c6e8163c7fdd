"""`train CONFIG --dry-run`: the run on paper. First what the run file alone decides, then what needs the data."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from commands.sizes import disk_need
from data.feed.loader import LoaderConfig, MixtureDataset, check_tokenizer, open_streams
from data.feed.mixture import MixtureOrder
from data.store.shards import Stream
from data.store.transfer import is_url
from flexbert.accounting import attention_weights_memory, flops_per_token, memory_estimate
from flexbert_core.schema import ConfigError
from recipe.config import PhaseConfig, RunConfig
from recipe.phases import Phase, PhasePlan
from recipe.slots import PARALLELISMS
from training.begun import as_begun
from training.branching import read_origin
from training.checkpoints.files import list_checkpoints
from training.evaluations import build_evaluations
from training.folder import RunFolder
from training.growing import check_source
from training.parts import build_objective
from training.report import describe_model
from training.vocabulary import check_vocabulary


def dry_run(
    config: RunConfig,
    console: Console,
    world_size: int = 1,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
) -> None:
    """Print the resolved run: model, phases with steps, FLOPs and memory, checkpoints, mixture. Writes nothing.

    world_size: the ranks whose memory is told.
    tokens_per_second: of all ranks, for the hours; price_per_hour: of all machines, for the cost. What the run file
    alone decides is printed even where data or starting weights are absent.
    Raises ConfigError, a line for each reason, when a real start would; RunError for damaged shards.
    """
    folder = RunFolder(config.folder)
    config = as_begun(config, folder)
    plan = PhasePlan(config)
    loader = plan.loader_config(config)
    console.print(f"{config.name}: {describe_model(config)} -> {config.folder}", soft_wrap=True)
    table = Table("phase", *(phase.name for phase in plan.phases))
    columns = [
        _phase_facts(config, plan, phase, given, world_size) | _price(phase.tokens, tokens_per_second, price_per_hour)
        for phase, given in zip(plan.phases, config.phases, strict=True)
    ]
    for fact in columns[0]:
        table.add_row(fact, *(column[fact] for column in columns))
    console.print(table)
    _print_totals(config, plan, console, _price(plan.total_tokens, tokens_per_second, price_per_hour))

    faults: list[str] = []
    streams, start = list[Stream](), None
    with _collected(faults):
        folder.check_config(config)
        folder.check_checkpoints()
    with _collected(faults):
        streams = _print_mixture(config, plan, loader, console)
    with _collected(faults):
        build_objective(config, plan)
    if streams:
        with _collected(faults):
            MixtureDataset(loader, 0, 1).check_maskings()
        with _collected(faults):
            build_evaluations(config, plan, streams)
    # A run that goes on needs neither its origin nor what it has grown from.
    if not list_checkpoints(folder.checkpoints):
        with _collected(faults):
            if config.origin is None:
                check_source(config.model)
        readable = False
        with _collected(faults):
            start = read_origin(config)
            readable = True
        if streams and readable:
            with _collected(faults):
                check_vocabulary(config, streams, start and start.rows)
            with _collected(faults):
                if start is not None:
                    fingerprints = {
                        name: stream.fingerprint for name, stream in zip(config.data.streams, streams, strict=True)
                    }
                    start.check_data(config, fingerprints, streams[0].manifest.tokenizer_fingerprint)
    if faults:
        raise ConfigError("\n".join(faults))


@contextmanager
def _collected(faults: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        faults.append(str(error))


def _phase_facts(
    config: RunConfig, plan: PhasePlan, phase: Phase, given: PhaseConfig, world_size: int
) -> dict[str, str]:
    rows = phase.global_batch_size // world_size
    microbatch = config.trainer.microbatch_size
    rows = min(microbatch, rows) if isinstance(microbatch, int) else rows
    flops = flops_per_token(config.model, phase.max_seq_len, phase.masking.rate)
    half = config.trainer.precision == "amp_bf16" or (config.trainer.precision == "auto" and torch.cuda.is_available())
    shards = world_size if PARALLELISMS.build(config.trainer.parallelism, world_size=world_size).shards else 1
    averages = int(config.ema is not None)
    tokens, activation_bytes = rows * phase.max_seq_len, 2 if half else 4
    memory = memory_estimate(config.model, tokens, phase.masking.rate, activation_bytes, shards, averages)
    scores = attention_weights_memory(config.model, phase.max_seq_len, activation_bytes) * tokens
    more = f", {scores / 2**30:.2f} GiB more for dropped attention weights without flash-attn" if scores else ""
    ranks = f"{world_size} ranks, {'sharded' if shards > 1 else 'each whole'}" if world_size > 1 else "1 rank"
    steps = [segment.tokens_per_step for segment in phase.segments]
    return {
        "tokens": f"{phase.tokens:,}",
        "steps": f"{phase.steps:,}",
        "rows x length": f"{_span(phase.segments[0].rows, phase.segments[-1].rows, '{}')} x {phase.max_seq_len}",
        "tokens per step": _span(steps[0], steps[-1], "{:,}"),
        "batch sizes": f"{len(steps)}, over {given.batch_size_warmup.tokens:,}" if given.batch_size_warmup else "1",
        "learning rate": f"{phase.peak_lr:g} {given.schedule.name}",
        "warmup tokens": f"{phase.warmup:,}",
        "RoPE theta, global": f"{phase.theta_global or 'as the model'}",
        "RoPE theta, local": f"{phase.theta_local or 'as the model'}",
        "masking rate": f"{phase.masking.rate:g}",
        "checkpoints": f"{plan.checkpoints(phase, config.checkpoint.interval):,}",
        "FLOPs per token": f"{flops / 1e9:.3f} G",
        "FLOPs": f"{flops * phase.tokens:.3e}",
        "memory per rank": f"{memory / 2**30:.2f} GiB in microbatches of {rows}{more}; {ranks}",
    }


def _span(first: int, last: int, form: str) -> str:
    return form.format(last) if first == last else f"{form.format(first)} to {form.format(last)}"


def _price(tokens: int, tokens_per_second: float | None, price_per_hour: float | None) -> dict[str, str]:
    """Time and cost of so many tokens, as far as they can be told."""
    if tokens_per_second is None:
        return {}
    hours = tokens / tokens_per_second / 3600
    return {"hours": f"{hours:,.1f}"} | ({} if price_per_hour is None else {"cost": f"{hours * price_per_hour:,.2f}"})


def _print_totals(config: RunConfig, plan: PhasePlan, console: Console, price: dict[str, str]) -> None:
    need, options = disk_need(config, plan), config.checkpoint
    flops = sum(
        flops_per_token(config.model, phase.max_seq_len, phase.masking.rate) * phase.tokens for phase in plan.phases
    )
    milestones = ", ".join(f"{phase.end_token:,}" for phase in plan.phases)
    said = "".join(f", {name} {value}" for name, value in price.items())
    often = f", one for ever every {options.keep_every:,} tokens" if options.keep_every is not None else ""
    best = f", the best {options.keep_best} too" if options.keep_best else ""
    more = "; step 0 and every checkpoint kept for ever are exported too" if config.exports_permanent else ""
    console.print(
        f"total: {plan.total_tokens:,} tokens (slots) in {plan.total_steps:,} steps; {config.lanes} lanes; "
        f"{flops:.3e} FLOPs{said}\n"
        f"checkpoints every {options.interval:,} tokens, {options.keep} kept{often}{best}; "
        f"milestones (kept, evaluated, exported) at {milestones}{more}; {need.checkpoint / 1e9:,.2f} GB each, "
        f"{need.total / 1e9:,.1f} GB in all, {need.exports} exports among them",
    )


def _print_mixture(config: RunConfig, plan: PhasePlan, loader: LoaderConfig, console: Console) -> list[Stream]:
    absent = [name for name, stream in config.data.streams.items() if not _is_there(stream.path)]
    if absent:
        console.print(
            f"mixture: unknown, {len(absent)} of {len(config.data.streams)} streams are absent: {', '.join(absent)}",
            soft_wrap=True,
        )
    streams = open_streams(config.data, "train")
    check_tokenizer(config.data, streams)
    order = MixtureOrder(streams, config.data, config.seed, loader.lanes)
    weights, passes = [], dict.fromkeys(config.data.streams, 0.0)
    for phase in plan.phases:
        shares = config.data.streams if phase.streams is None else phase.streams
        held = order.mixture(shares, phase.long_documents or config.data.long_documents, phase.max_seq_len)
        weights.append([tokens / order.block_tokens for tokens in held.tokens])
        shown, weight = order.shown_tokens(held), dict(zip(order.names, weights[-1], strict=True))
        for name in shown:
            passes[name] += weight[name] * phase.tokens / max(shown[name], 1)
    mixture = Table("stream", "documents", "tokens", *(f"in {phase.name}" for phase in plan.phases), "passes")
    for number, (name, stream) in enumerate(zip(config.data.streams, streams, strict=True)):
        cells = [f"{stream.manifest.documents:,}", f"{stream.manifest.tokens:,}"]
        cells += [f"{weight[number]:.1%}" for weight in weights]
        mixture.add_row(name, *cells, f"{passes[name]:.2f}")
    console.print(mixture)
    console.print(f"blocks of about {order.block_tokens:,.0f} tokens")
    remote = [stream for stream in streams if is_url(stream.path)]
    if remote:
        console.print(_describe_cache(config, remote, loader.lanes))
    return streams


def _is_there(path: str) -> bool:
    return is_url(path) or Path(path).is_dir()


def _describe_cache(config: RunConfig, remote: list[Stream], lanes: int) -> str:
    data, shards = config.data, [shard.bytes for stream in remote for shard in stream.manifest.shards]
    mixed = min(len(shards), lanes * len(remote) * (data.shuffle_shards or len(shards)))
    working_set = sum(shards) / len(shards) * mixed
    line = (
        f"remote: {len(remote)} of {len(data.streams)} streams, {sum(shards) / 1e9:,.1f} GB; cache {data.cache} of "
        f"{data.cache_limit / 1e9:,.1f} GB; all lanes together mix {working_set / 1e9:,.1f} GB at a time"
    )
    if working_set > data.cache_limit:
        line += ": set data.shuffle_shards lower, or shards are fetched many times"
    return line
