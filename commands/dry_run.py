"""`train CONFIG --dry-run`: the run on paper. First what the run file alone decides, then what needs the data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from commands.prediction import Target
from commands.sizes import disk_need, model_on_meta
from data.feed.loader import LoaderConfig, MixtureDataset, check_tokenizer, open_streams
from data.feed.mixture import MixtureOrder
from data.store.shards import Stream
from data.store.transfer import is_url
from flexbert.accounting import attention_weights_memory, count_parameters, memory_estimate
from flexbert_core.schema import ConfigError
from recipe.config import PhaseConfig, RunConfig
from recipe.cost import frozen_models, other_models, phase_flops_per_token, run_flops
from recipe.phases import Phase, PhasePlan
from recipe.slots import PARALLELISMS
from training.begun import as_begun
from training.branching import read_origin
from training.checkpoints.files import list_checkpoints
from training.evaluations import build_evaluations
from training.folder import RunFolder
from training.growing import check_source
from training.microbatches import Microbatches
from training.objectives.phases import build_objectives
from training.report import describe_model, describe_tokens
from training.states import more_states
from training.vocabulary import check_vocabulary


def dry_run(
    config: RunConfig,
    console: Console,
    world_size: int = 1,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
    target: Target | None = None,
) -> None:
    """Print the resolved run: model, phases with steps, FLOPs and memory, checkpoints, mixture. Writes nothing.

    world_size: the ranks whose memory is told.
    tokens_per_second: of all ranks, for the hours; price_per_hour: of all machines, for the cost. target: devices whose
    speed is predicted instead. What the run file
    alone decides is printed even where data or starting weights are absent.
    Raises ConfigError, a line for each reason, when a real start would; RunError for damaged shards.
    """
    folder = RunFolder(config.folder)
    config = as_begun(config, folder)
    plan = PhasePlan(config)
    loader = plan.loader_config(config)
    console.print(f"{config.name}: {describe_model(config)} -> {config.folder}", soft_wrap=True)
    for said, models in (("beside it", other_models), ("beside it, not trained", frozen_models)):
        for model in models(config, plan):
            console.print(f"{said}: {count_parameters(model):,} parameters in {model.num_hidden_layers} layers")
    table = Table("phase", *(phase.name for phase in plan.phases))
    if target is not None:
        world_size, price_per_hour = target.gpus, target.price if price_per_hour is None else price_per_hour
        rates = [target.tokens_per_second(config, phase) for phase in plan.phases]
    else:
        rates = [tokens_per_second for _ in plan.phases]
    columns = [
        _phase_facts(config, plan, phase, given, world_size, target) | _price([phase.tokens], [rate], price_per_hour)
        for phase, given, rate in zip(plan.phases, config.phases, rates, strict=True)
    ]
    for fact in columns[0]:
        table.add_row(fact, *(column[fact] for column in columns))
    console.print(table)
    _print_totals(config, plan, console, _price([phase.tokens for phase in plan.phases], rates, price_per_hour))
    if target is not None:
        console.print(target.describe(), soft_wrap=True)

    faults: list[str] = []
    streams, start = list[Stream](), None
    with _collected(faults):
        for change in folder.check_config(config):
            console.print(f"{folder.path}: to come: {change}", soft_wrap=True)
        folder.check_checkpoints(folder.checkpoints_gone())
    with _collected(faults):
        streams = _print_mixture(config, plan, loader, console)
    with _collected(faults):
        build_objectives(config, plan)
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
            if start is not None and "vocabulary" in start.record:
                console.print(describe_tokens(start.record["vocabulary"]), soft_wrap=True)
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
    config: RunConfig, plan: PhasePlan, phase: Phase, given: PhaseConfig, world_size: int, target: Target | None
) -> dict[str, str]:
    rows = phase.global_batch_size // world_size
    rows = Microbatches(config.trainer).rows(phase.max_seq_len, rows)
    flops = phase_flops_per_token(config, phase)
    on_gpu = target is not None or torch.cuda.is_available()
    half = config.trainer.precision == "amp_bf16" or (config.trainer.precision == "auto" and on_gpu)
    parallelism = config.trainer.parallelism
    shards = world_size if PARALLELISMS.build(parallelism, world_size=world_size).shards else 1
    shards //= getattr(parallelism, "replicate", 1)
    averages = int(config.ema is not None)
    tokens, activation_bytes = rows * phase.max_seq_len, 2 if half else 4
    memory = sum(
        memory_estimate(model, tokens, phase.masking.highest_rate, activation_bytes, shards, averages)
        for model in [config.model, *other_models(config, plan)]
    )
    memory += sum(4 * count_parameters(model) for model in frozen_models(config, plan))  # float32, on each rank
    memory += more_states(config, model_on_meta(config, plan))
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
        "objective": phase.objective.name,
        "masking rate": "none: next tokens" if phase.is_causal else phase.masking.describe(),
        "checkpoints": f"{plan.checkpoints(phase, config.checkpoint.interval):,}",
        "FLOPs per token": f"{flops / 1e9:.3f} G" if flops >= 1e8 else f"{flops / 1e6:.3f} M",
        "FLOPs": f"{flops * phase.tokens:.3e}",
        "memory per rank": f"{_memory(memory)} in microbatches of {rows}{more}; {ranks}",
    }


def _span(first: int, last: int, form: str) -> str:
    return form.format(last) if first == last else f"{form.format(first)} to {form.format(last)}"


def _price(tokens: list[int], rates: Sequence[float | None], price_per_hour: float | None) -> dict[str, str]:
    """Speed, time and cost of the phases' tokens at their rates, as far as they can be told."""
    told = [(each, rate) for each, rate in zip(tokens, rates, strict=True) if rate is not None]
    if len(told) < len(tokens):
        return {}
    hours = sum(each / rate for each, rate in told) / 3600
    cost = {} if price_per_hour is None else {"cost": f"{hours * price_per_hour:,.2f}"}
    return {"tokens/s": f"{sum(tokens) / hours / 3600:,.0f}", "hours": f"{hours:,.1f}"} | cost


def _print_totals(config: RunConfig, plan: PhasePlan, console: Console, price: dict[str, str]) -> None:
    need, options = disk_need(config, plan), config.checkpoint
    milestones = ", ".join(f"{phase.end_token:,}" for phase in plan.phases)
    said = "".join(f", {name} {value}" for name, value in price.items())
    often = f", one for ever every {options.keep_every:,} tokens" if options.keep_every is not None else ""
    best = f", the best {options.keep_best} too" if options.keep_best else ""
    more = "; step 0 and every checkpoint kept for ever are exported too" if config.exports_permanent else ""
    console.print(
        f"total: {plan.total_tokens:,} tokens (slots) in {plan.total_steps:,} steps; {config.lanes} lanes; "
        f"{run_flops(config):.3e} FLOPs{said}\n"
        f"checkpoints every {options.interval:,} tokens, {options.keep} kept{often}{best}; "
        f"milestones (kept, evaluated, exported) at {milestones}{more}; {_size(need.checkpoint)} each, "
        f"{_size(need.total, 1)} in all, {need.exports} exports among them",
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
    try:
        return is_url(path) or Path(path).is_dir()
    except OSError:  # it may be there; whoever opens it says what is wrong
        return True


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


def _size(count: float, digits: int = 2) -> str:
    """Bytes, in the unit that shows digits of them."""
    return f"{count / 1e9:,.{digits}f} GB" if count >= 1e8 else f"{count / 1e6:,.{digits}f} MB"


def _memory(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
