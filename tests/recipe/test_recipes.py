"""The recipes of configs/pretrain against what was published: steps worked out here by hand from rows, lengths, tokens."""

import io
import re
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from commands.dry_run import dry_run
from flexbert import build
from flexbert.accounting import count_parameters, flops_per_token
from flexbert.config import without_init
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig, load_run_config
from recipe.phases import PhasePlan
from tests.helpers.ranks import Ranks
from tests.helpers.runs import command, run

FOLDER = Path(__file__).parent.parent.parent / "configs" / "pretrain"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def recipe(name: str, *overrides: str) -> tuple[RunConfig, PhasePlan]:
    config = load_run_config(FOLDER / f"{name}.yaml", overrides)
    return config, PhasePlan(config)


def warmup_steps(start: int, target: int, step: int, tokens: float, max_seq_len: int) -> tuple[float, float]:
    """(steps, tolerance): each size as often, tokens / (length x sum of sizes); each rounded to whole steps."""
    sizes = range(start, target, step)
    return len(sizes) * tokens / (max_seq_len * sum(sizes)), len(sizes)


def printed(
    config: RunConfig,
    tokens_per_second: float | None = None,
    price_per_hour: float | None = None,
    world_size: int = 1,
) -> dict[str, list[str]]:
    """The dry run's table by fact, and its other lines under ''. The data are not there, and it says so."""
    console = Console(width=10_000, record=True, file=io.StringIO())
    with pytest.raises(ConfigError, match=r"^data\.streams\.[\w-]+\.path: "):
        dry_run(config, console, world_size, tokens_per_second, price_per_hour)
    facts: dict[str, list[str]] = {"": []}
    for line in console.export_text().splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if cells:
            facts[cells[0]] = cells[1:]
        else:
            facts[""].append(line)
    return facts


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_builds(file: Path) -> None:
    config = load_run_config(file)
    assert config.name == file.stem
    with torch.device("meta"):
        model = build(without_init(config.model))
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config.model)
    facts = printed(config)
    assert facts["phase"] == [phase.name for phase in config.phases]
    assert any(line.startswith("mixture: unknown, ") for line in facts[""])


def test_the_recipes_asked_for_are_there() -> None:
    names = {file.stem for file in RECIPES}
    assert names >= {"modernbert-base", "modernbert-large", "modernbert-large-rollback", "mosaicbert-base", "cramming"}
    assert names >= {"bert-base", "nomicbert", "gte-en-mlm-base", "ettin-17m", "ettin-32m", "ettin-68m"}


# (rows, length, tokens) of the phases with a constant batch size, and the steps that papers and cards print
@pytest.mark.parametrize(
    ("name", "phases", "steps", "parameters"),
    [
        ("bert-base", [(256, 128, None), (256, 512, None)], [900_000, 100_000], 110e6),
        ("mosaicbert-base", [(4096, 128, None), (4096, 128, None)], [4_200, 65_800], 137e6),
        ("nomicbert", [(4096, 2048, None), (4096, 2048, None)], [6_000, 94_000], 137e6),
        ("gte-en-mlm-base", [(4096, 2048, None), (1024, 8192, None)], [70_000, 20_000], 137e6),
        ("modernbert-base", [None, (576, 8192, 250e9), (576, 8192, 50e9)], None, 149e6),
        ("modernbert-large", [None, (4928, 1024, 819e9), (616, 8192, 250e9), (624, 8192, 50e9)], None, 395e6),
        ("modernbert-large-rollback", [(4928, 1024, 819e9), (616, 8192, 250e9), (624, 8192, 50e9)], None, 395e6),
        ("cramming", [None, (8192, 128, 5e9)], None, 120e6),
        ("ettin-17m", [None, (4608, 7999, 250e9), (4608, 7999, 50e9)], None, 17e6),
        ("ettin-32m", [None, (4608, 7999, 250e9), (4608, 7999, 50e9)], None, 32e6),
        ("ettin-68m", [None, (4608, 7999, 250e9), (4608, 7999, 50e9)], None, 68.5e6),
    ],
)
def test_steps_are_the_published_ones(
    name: str, phases: list[tuple[int, int, float | None] | None], steps: list[int] | None, parameters: float
) -> None:
    config, plan = recipe(name)
    facts = printed(config)
    assert count_parameters(config.model) == pytest.approx(parameters, rel=0.01)
    for number, phase in enumerate(phases):
        if phase is None:
            continue
        rows, length, tokens = phase
        wanted = steps[number] if steps else ceil((tokens or 0) / (rows * length))
        assert facts["tokens per step"][number] == f"{rows * length:,}"
        assert facts["steps"][number] == f"{wanted:,}"
        assert facts["tokens"][number] == f"{wanted * rows * length:,}"
        assert facts["rows x length"][number] == f"{rows} x {length}"
    assert plan.total_steps == sum(int(cell.replace(",", "")) for cell in facts["steps"])


@pytest.mark.parametrize(
    ("name", "start", "target", "step", "warmup", "tokens", "length"),
    [
        ("modernbert-base", 768, 4608, 64, 50e9, 1.719e12, 1024),
        ("modernbert-large", 448, 4928, 8, 10e9, 900e9, 1024),
        ("ettin-17m", 576, 4608, 64, 125e9, 1.7e12, 1024),
        ("ettin-32m", 512, 4608, 64, 100e9, 1.7e12, 1024),
        ("ettin-68m", 384, 4608, 64, 75e9, 1.7e12, 1024),
    ],
)
def test_first_phases_with_their_batch_warmup(
    name: str, start: int, target: int, step: int, warmup: float, tokens: float, length: int
) -> None:
    config, plan = recipe(name)
    facts, first = printed(config), plan.phases[0]
    rising, tolerance = warmup_steps(start, target, step, warmup, length)
    assert first.segments[-1].first_step == pytest.approx(rising, abs=tolerance)
    assert first.steps == pytest.approx(rising + (tokens - warmup) / (target * length), abs=tolerance)
    assert 0 <= first.tokens - tokens < target * length
    assert facts["rows x length"][0] == f"{start} to {target} x {length}"
    assert facts["tokens per step"][0] == f"{start * length:,} to {target * length:,}"


def test_modernbert_is_the_papers_table() -> None:
    config, plan = recipe("modernbert-base")
    assert [phase.tokens for phase in config.phases] == [1_719_000_000_000, 250_000_000_000, 50_000_000_000]
    assert [phase.peak_lr for phase in plan.phases] == [8e-4, 3e-4, 3e-4]
    assert (plan.phases[0].warmup, plan.phases[0].masking.rate) == (3_000_000_000, 0.3)
    assert config.model.position.global_theta == 10000
    assert [phase.theta_global for phase in plan.phases] == [None, 160000, 160000]
    end = plan.phases[2]
    assert end.lr(end.end_step - 1) == pytest.approx(3e-4 * 0.001, rel=0.1)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.beta1, optimizer.beta2, optimizer.eps) == ("stableadamw", 0.9, 0.98, 1e-6)
    assert (optimizer.weight_decay, optimizer.decouple_lr) == (1e-5, True)
    large, large_plan = recipe("modernbert-large")
    assert (large_plan.phases[0].peak_lr, large_plan.phases[0].warmup) == (5e-4, 2_000_000_000)
    assert sum(phase.tokens for phase in large.phases[:2]) == 1_719_000_000_000
    assert (large.model.init.method, large.model.init.rescale) == ("tile_center", False)
    assert large.model.init.source == f"runs/modernbert-base/exports/tokens-{plan.phases[0].end_token}"
    back, back_plan = recipe("modernbert-large-rollback")
    assert back.origin is not None
    assert back.origin.checkpoint == f"runs/modernbert-large/checkpoints/tokens-{large_plan.phases[0].end_token}"
    assert {phase.peak_lr for phase in back_plan.phases} == {5e-5}
    assert (back.optimizer.weight_decay, back.lanes) == (1e-6, large.lanes)
    assert back_plan.phases[0].tokens == large_plan.phases[1].tokens


@dataclass(frozen=True)
class Published:
    """What a recipe's source says of its training, as shared/architectures.md (section 2) and the sources in the recipe's
    header have it. phases: (peak lr, masking rate, schedule, its factor at the end; None: it has none). warmup: tokens,
    worked out from the source's steps or its share of all steps."""

    optimizer: str
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float | None
    warmup: float
    phases: tuple[tuple[float, float, str, float | None], ...]


def ettin(warmup: float) -> Published:
    """JHU-CLSP/ettin-encoder-vs-decoder, pretraining/configs/standard/{very_tiny,tiny,mini}: encoder_*.yaml (t_decay 0: no
    decay in the first phase), de_decay, prolong_decay; arXiv 2507.11412, whose table has the same. decoupled_stableadamw
    is stableadamw with decouple_lr; gradients are not clipped."""
    phases = ((3e-3, 0.3, "constant", None), (3e-3, 0.3, "one_minus_sqrt", 0.5), (1.5e-3, 0.15, "one_minus_sqrt", 0.04))
    return Published("stableadamw", (0.9, 0.98), 1e-6, 3e-4, None, warmup, phases)


PUBLISHED = {
    # arXiv 1810.04805, app. A.2; google-research/bert, optimization.py (eps, clipping). The decay is one line to 0 over a
    # million steps: 0.1 of the peak is left after 900,000.
    "bert-base": Published(
        "adamw",
        (0.9, 0.999),
        1e-6,
        0.01,
        1.0,
        10_000 * 256 * 128,
        ((1e-4, 0.15, "linear", 0.1), (1e-5, 0.15, "linear", 0.0)),
    ),
    # mosaicml/examples, mosaic-bert-base-uncased.yaml: warmup over 6 % of 70,000 steps, then linear to 0.02; no clipping.
    "mosaicbert-base": Published(
        "decoupled_adamw",
        (0.9, 0.98),
        1e-6,
        1e-5,
        None,
        0.06 * 70_000 * 4096 * 128,
        ((5e-4, 0.3, "constant", None), (5e-4, 0.3, "linear", 0.02)),
    ),
    # nomic-ai/contrastors, mlm.yaml: warmup_pct 0.06 (of the model card's 100,000 steps), linear, max_grad_norm 0: off.
    "nomicbert": Published(
        "adamw",
        (0.9, 0.98),
        1e-6,
        1e-5,
        None,
        0.06 * 100_000 * 4096 * 2048,
        ((5e-4, 0.3, "constant", None), (5e-4, 0.3, "linear", 0.0)),
    ),
    # Published (model card) are lr and masking alone. Departure, said in the file: betas, eps, warmup and final factor
    # are MosaicBERT's (its 6 % in round tokens), 0.01 of decay, no clipping.
    "gte-en-mlm-base": Published(
        "adamw",
        (0.9, 0.98),
        1e-6,
        0.01,
        None,
        0.06 * 70_000 * 4096 * 2048,
        ((5e-4, 0.3, "linear", 0.02), (5e-5, 0.3, "linear", 0.02)),
    ),
    # JonasGeiping/cramming, train/bert-o4.yaml (optim/adam.yaml: betas, eps 1e-12). Departure, said in the file: there
    # lr starts at half its peak, which it has at half the budget; here it rises from 0 over the same half, 5B tokens.
    "cramming": Published(
        "adamw", (0.9, 0.98), 1e-12, 0.01, 0.5, 5e9, ((1e-3, 0.25, "constant", None), (1e-3, 0.25, "linear", 0.0))
    ),
    "ettin-17m": ettin(4e9),
    "ettin-32m": ettin(4e9),
    "ettin-68m": ettin(3e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_is_as_published(name: str) -> None:
    (config, plan), published = recipe(name), PUBLISHED[name]
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.beta1, optimizer.beta2) == (published.optimizer, *published.betas)
    assert (optimizer.eps, optimizer.weight_decay) == (published.eps, published.weight_decay)
    assert optimizer.decayed == "matrices"  # all of them spare biases and norms
    assert getattr(optimizer, "decouple_lr", True)
    assert config.trainer.gradient_clip_norm == published.clip
    assert plan.phases[0].warmup == pytest.approx(published.warmup, rel=0.01)
    assert all(phase.warmup == 0 for phase in plan.phases[1:])
    for phase, given, (lr, masking, schedule, final) in zip(plan.phases, config.phases, published.phases, strict=True):
        assert (phase.peak_lr, phase.masking.rate) == (lr, masking)
        assert (given.schedule.name, getattr(given.schedule, "final", None)) == (schedule, final)
        last = phase.lr(phase.end_step - 1)  # one step before the end
        assert last == pytest.approx(
            lr * (1.0 if final is None else final),
            abs=1.01 * lr / max(phase.steps * (1 - phase.warmup / phase.tokens), 1),
        )


def test_hours_cost_flops_and_checkpoints_on_paper() -> None:
    config, plan = recipe("modernbert-base")
    facts = printed(config, tokens_per_second=2.5e6, price_per_hour=20)
    for number, phase in enumerate(plan.phases):
        hours = phase.tokens / 2.5e6 / 3600
        assert float(facts["hours"][number]) == pytest.approx(hours, abs=0.06)
        assert float(facts["cost"][number].replace(",", "")) == pytest.approx(20 * hours, abs=0.01)
        flops = flops_per_token(config.model, phase.max_seq_len, 0.3) * phase.tokens
        assert float(facts["FLOPs"][number]) == pytest.approx(flops, rel=1e-3)
    # one for each 10B tokens passed, and one at the end of each phase, where 10B tokens are not passed
    assert [int(cell) for cell in facts["checkpoints"]] == [171 + 1, 25 + 1, 5 + 1]
    hours = plan.total_tokens / 2.5e6 / 3600
    assert any(f"hours {hours:,.1f}, cost {20 * hours:,.2f}" in line for line in facts[""])


def test_memory_is_of_the_ranks_that_share() -> None:
    def gib(*overrides: str, world_size: int = 8) -> tuple[float, str]:
        config, _ = recipe("modernbert-large", "trainer.microbatch_tokens=1", *overrides)
        size, _, rest = printed(config, world_size=world_size)["memory per rank"][0].partition(" ")
        return float(size), rest

    whole, said = gib()
    assert said == "GiB in microbatches of 1; 8 ranks, each whole"
    shared, said = gib("trainer.parallelism=fsdp2")
    assert said == "GiB in microbatches of 1; 8 ranks, sharded"
    assert whole / 3 < shared < whole / 2
    assert (
        gib("trainer.parallelism=fsdp2", world_size=1)
        == gib(world_size=1)
        == (whole, "GiB in microbatches of 1; 1 rank")
    )
    assert gib("ema={decay: 0.999}")[0] - whole == pytest.approx(4 * 395_881_664 / 2**30, abs=0.011)


def test_disk_room_on_paper() -> None:
    """149,655,232 parameters: 12 bytes of each in a checkpoint, 4 in an export, and 4 more with an average."""
    config, _ = recipe("modernbert-base", "checkpoint.keep_every=10B", "checkpoint.keep_best=2", "ema={decay: 0.999}")
    line = next(line for line in printed(config)[""] if line.startswith("checkpoints every"))
    assert "3 kept, one for ever every 10,000,000,000 tokens, the best 2 too" in line
    checkpoints = 172 + 26 + 6 + 3 + 2 + 1
    whole = 149_655_232 * (16 * checkpoints + 4 * 6) / 1e9
    assert f"2.39 GB each, {whole:,.1f} GB in all, 6 exports among them" in line
    plain = next(line for line in printed(recipe("modernbert-base")[0])[""] if line.startswith("checkpoints every"))
    assert f"1.80 GB each, {149_655_232 * (12 * 7 + 4 * 3) / 1e9:,.1f} GB in all, 3 exports" in plain


@pytest.mark.slow
def test_the_command_prints_the_plan_and_then_what_is_absent(ranks: Ranks) -> None:
    done = run(command("train", str(FOLDER / "modernbert-large.yaml"), "--dry-run", "--tokens-per-second", "1e6"))
    assert done.returncode == 2
    assert f" {recipe('modernbert-large')[1].phases[0].steps:,} " in done.stdout
    assert "250.0" in done.stdout  # hours of the first phase: 900B / 1M / 3600
    lines = done.stderr.strip().splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["data.streams.web.path", "init.from"]
    for wrong in (["--tokens-per-second", "1e6"], ["--dry-run", "--price-per-hour", "20"]):
        codes, text = ranks.run(1, "train", str(FOLDER / "modernbert-base.yaml"), *wrong)
        assert (codes, len(text.strip().splitlines())) == ([2], 1)
        assert f"error: {wrong[-2]}: " in text
