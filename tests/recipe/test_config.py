"""The run file: every mistake is one line that names file, key and fix; what loads, loads back equal."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flexbert_core.schema import ConfigError, parse_count
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.recipe.run_file import RUN, edited

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return edited(tmp_path, "", "")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("seed: 17", "runs: s3://bucket/x", "runs: a run lives in a local folder: give one, and checkpoint.remote=s3://bucket/x"),
        ("seed: 17", "checkpoint: {remote: /tmp/x}", "checkpoint.remote: expected a URL that can be written to, such as s3://bucket/path, got '/tmp/x'"),
        ("seed: 17", "checkpoint: {remote: 'https://x/y'}", "checkpoint.remote: expected a URL that can be written to, such as s3://bucket/path, got 'https://x/y'"),
        ("seed: 17", "sed: 17", "unknown key 'sed', did you mean 'seed'?"),
        ("tokens: 2M", "token: 2M", r"phases[0]: unknown key 'token', did you mean 'tokens'?"),
        ("tokens: 2M", "tokens: -5", "phases[0].tokens: expected a whole count, 0 or more, got -5"),
        ("tokens: 2M", "tokens: 0", "phases[0].tokens: should be greater than 0, got 0"),
        ("tokens: 2M", "tokens: many", "phases[0].tokens: expected a count such as 50B, 300K or 1000000, got 'many'"),
        ("global_batch_size: 8", "global_batch_size: eight", "phases[0].global_batch_size: should be a valid integer, got 'eight'"),
        ("global_batch_size: 8", "global_batch_size: 8.5", "phases[0].global_batch_size: should be a valid integer"),
        ("seed: 17", "seed: true", "seed: should be a valid integer, got True"),
        ("model: modernbert-tiny", "model: modernbert-tny", "model: unknown preset 'modernbert-tny', did you mean 'modernbert-tiny'?"),
        ("model: modernbert-tiny", "model: {preset: modernbert-tiny, mlp: glou}", "model.mlp: unknown mlp 'glou', did you mean 'glu'?"),
        ("model: modernbert-tiny", "model: {preset: modernbert-tiny, hiden_size: 64}", "model: unknown key 'hiden_size', did you mean 'hidden_size'?"),
        ("optimizer: stableadamw", "optimizer: stableadam", "optimizer: unknown optimizer 'stableadam', did you mean 'stableadamw'?"),
        ("optimizer: stableadamw", "optimizer: {name: stableadamw, beta3: 1}", "optimizer: unknown key 'beta3', did you mean 'beta"),
        ("schedule: one_minus_sqrt", "schedule: one_minus_sqr", "phases[2].schedule: unknown schedule 'one_minus_sqr', did you mean 'one_minus_sqrt'?"),
        ("warmup: 100K", "warmup: 3M", "phases[0]: warmup of 3000000 tokens is longer than the phase of 2000000"),
        ("name: extension", "name: stable", "phases[1].name: 'stable' is taken"),
        ("max_seq_len: 2048", "max_seq_len: 4096", "phases[1].max_seq_len: 4096 is over model.max_position_embeddings 2048"),
        ("    lr: 3e-3\n", "", "phases[0].lr: is required in the first phase"),
        ("name: demo", "name: a/b", "name: String should match pattern"),
        ("name: demo\n", "", "name: is required and missing"),
        ("    tokens: 600K", "    tokens: 600K\n    streams: {pros: {weight: 1}}", "phases[2].streams.pros: no stream of data.streams, did you mean 'prose'?"),
        ("    tokens: 600K", "    tokens: 600K\n    streams: {prose: {tokens: 400K}}", "phases[2].streams: their tokens add up to 400000, the phases with this mixture train on 600000: make them equal, or give weights"),
        ("    tokens: 600K", "    tokens: 600K\n    streams: {prose: {path: elsewhere}}", "phases[2].streams.prose: unknown key 'path'"),
        ("    tokens: 600K", "    tokens: 600K\n    streams: {}", "phases[2].streams: "),
        ("    tokens: 600K", "    tokens: 600K\n    long_documents: cut", "phases[2].long_documents: "),
        ("path: datasets/demo/prose}", "path: datasets/demo/prose, weight: 0}", "data.streams.prose.weight: should be greater than 0, got 0"),
        ("prose: {path: datasets/demo/prose}", "prose: {path: p, weight: 1}, code: {path: c, repeat: 2}", "streams: give every stream the same of weight, repeat, tokens: weight and repeat differ"),
        ("prose: {path: datasets/demo/prose}", "prose: {path: p, tokens: 1M}, code: {path: c, tokens: 1M}", "data.streams: their tokens add up to 2000000, the phases with this mixture train on 3000000"),
        ("seed: 17", "seed: ${sede}", "Interpolation key 'sede' not found"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    file = edited(tmp_path, old, new)
    with pytest.raises(ConfigError) as caught:
        load_run_config(file)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{file}: ")
    assert line.removeprefix("name: String") in message


def test_yaml_syntax_error_names_the_place(tmp_path: Path) -> None:
    file = edited(tmp_path, "seed: 17", "seed: [17")
    with pytest.raises(ConfigError, match=r"run.yaml:\d+:\d+: not valid YAML: ") as caught:
        load_run_config(file)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_and_odd_files(tmp_path: Path) -> None:
    edited(tmp_path, "seed: 17", "seed: 18")
    with pytest.raises(ConfigError, match=r"rnu.yaml: no such file, did you mean '.*run.yaml'\?"):
        load_run_config(tmp_path / "rnu.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_run_config(tmp_path / "list.yaml")
    (tmp_path / "word.yaml").write_text("hello\n")
    with pytest.raises(ConfigError, match="word.yaml"):
        load_run_config(tmp_path / "word.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="binary.yaml: not valid YAML"):
        load_run_config(tmp_path / "binary.yaml")


def test_several_mistakes_are_several_lines(tmp_path: Path) -> None:
    file = edited(tmp_path, "tokens: 2M", "tokens: -1")
    with pytest.raises(ConfigError) as caught:
        load_run_config(file, ["trainer.precison=fp32", "phases.1.lr=-1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{file}: ") for line in lines)


def test_overrides(plain: Path) -> None:
    config = load_run_config(
        plain, ["phases.0.tokens=1M", "model.hidden_size=128", "model.num_attention_heads=2", "seed=3"]
    )
    assert (config.phases[0].tokens, config.model.hidden_size, config.seed) == (1_000_000, 128, 3)
    config = load_run_config(plain, ["model.num_hidden_layers=4", "model=modernbert-base"])
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (768, 4)
    for wrong in ("seed", "=3", "phases.7.tokens=1M", "seed.x=1"):
        with pytest.raises(ConfigError):
            load_run_config(plain, [wrong])


def test_defaults_compose(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RUN)
    (tmp_path / "child.yaml").write_text(
        "defaults: base.yaml\nname: child\nmodel: {preset: modernbert-tiny, num_hidden_layers: 3}\n"
    )
    config = load_run_config(tmp_path / "child.yaml")
    assert (config.name, config.model.num_hidden_layers, config.seed) == ("child", 3, 17)
    (tmp_path / "base.yaml").write_text("defaults: child.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load_run_config(tmp_path / "child.yaml")


@pytest.mark.parametrize(
    "file",
    [
        each
        for folder in ("configs", "configs/pretrain", "configs/objectives")
        for each in sorted((ROOT / folder).glob("*.yaml"))
    ],
)
def test_every_run_file_loads_and_loads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_run_config(file)
    (tmp_path / "resolved.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))
    assert load_run_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.719T", 1_719_000_000_000), ("50B", 50 * 10**9), ("300k", 300_000), ("1e9", 10**9), (7, 7), (2e6, 2_000_000)],
)
def test_counts(text: str | float, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "M", "1.5", "1..5M", "-3", True, None, "0.0001K", float("nan"), float("inf")])
def test_wrong_counts(text: object) -> None:
    with pytest.raises(ValueError, match="expected a"):
        parse_count(text)


def test_phases_are_steps(plain: Path) -> None:
    """The plan by hand: 2M / (8 x 512) = 488.3, 400K / (4 x 2048) = 48.8, 600K / (4 x 2048) = 73.2 steps."""
    plan = PhasePlan(load_run_config(plain))
    first, second, third = plan.phases
    assert [phase.steps for phase in plan.phases] == [489, 49, 74]
    assert [phase.first_step for phase in plan.phases] == [0, 489, 538]
    assert plan.total_tokens == 489 * 4096 + (49 + 74) * 8192
    assert plan.tokens_before(489) == first.end_token == 489 * 4096
    assert plan.tokens_before(612) == plan.total_tokens
    assert plan.at(488) is first
    assert plan.at(489) is second
    assert plan.at(10_000) is third
    assert [step for step in range(613) if plan.is_milestone(step)] == [489, 538, 612]
    assert (third.max_seq_len, third.global_batch_size, third.theta_global) == (2048, 4, 160000)
    # Steps end at 1,003,520, 2,002,944 and 3,002,368 tokens.
    assert [step for step in range(1, 613) if plan.crosses(step, 1_000_000)] == [245, 489, 611]


def test_learning_rates(plain: Path) -> None:
    plan = PhasePlan(load_run_config(plain, ["phases.0.warmup=40960", "phases.2.lr=1e-3"]))
    first, second, third = plan.phases
    assert [first.lr(step) for step in (0, 4, 9, 10, 400)] == pytest.approx([3e-4, 1.5e-3, 3e-3, 3e-3, 3e-3])
    assert second.lr(second.first_step) == 2e-3
    progress = 37 / third.steps
    assert third.lr(third.first_step) == 1e-3
    assert third.lr(third.first_step + 37) == pytest.approx(1e-3 * (0.001 + 0.999 * (1 - progress**0.5)))
