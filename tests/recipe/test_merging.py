"""How presets, `defaults`, run files and overrides are merged: same name or none merges, another name replaces."""

from pathlib import Path

import pytest

from flexbert.config import FlexBertConfig
from flexbert_core.composing import load_node
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig, load_run_config

RUN = """
name: demo
model: {model}
data: {{tokenizer: x, streams: {{s: {{path: y}}}}}}
phases:
  - {{name: a, tokens: 2K, max_seq_len: 64, global_batch_size: 4, lr: 1e-4}}
  - {{name: b, tokens: 2K, schedule: {{name: cosine, final: 0.5}}}}
"""


def load(folder: Path, model: str, *overrides: str, more: str = "") -> RunConfig:
    (folder / "run.yaml").write_text(RUN.format(model=model) + more)
    return load_run_config(folder / "run.yaml", overrides)


@pytest.mark.parametrize(
    ("model", "overrides", "slot", "expected"),
    [
        ("{preset: bert-base, norm: {name: rmsnorm}}", [], "norm", {"name": "rmsnorm"}),
        ("bert-base", ["model.norm.name=rmsnorm"], "norm", {"name": "rmsnorm"}),
        ("bert-base", ["model.norm={name: rmsnorm}"], "norm", {"name": "rmsnorm"}),
        ("bert-base", ["model.norm.eps=1e-3", "model.norm=rmsnorm"], "norm", {"name": "rmsnorm", "eps": 1e-3}),
        ("{preset: bert-base, norm: rmsnorm}", ["model.norm.eps=1e-3"], "norm", {"name": "rmsnorm", "eps": 1e-3}),
        ("{preset: bert-base, norm: {eps: 1e-3}}", [], "norm", {"name": "layernorm", "eps": 1e-3, "bias": True}),
        ("{preset: modernbert-base, norm: layernorm}", [], "norm", {"name": "layernorm", "eps": 1e-5, "bias": False}),
        ("{preset: modernbert-base, position: {name: alibi}}", [], "position", {"name": "alibi"}),
        ("{preset: bert-base, init: {from: x, method: tile_edge}}", [], "init", {"name": "grow", "from": "x", "method": "tile_edge"}),
        ("bert-base", ["model.init.method=tile_edge", "model.init.from=x"], "init", {"name": "grow", "from": "x", "method": "tile_edge"}),
        ("{preset: bert-base, init: {std: 0.5}}", [], "init", {"name": "default", "std": 0.5}),
        ("{preset: modernbert-base, mlp: {name: mlp}}", [], "mlp", {"name": "mlp"}),
    ],
)  # fmt: skip
def test_another_name_replaces_the_presets_component(
    tmp_path: Path, model: str, overrides: list[str], slot: str, expected: dict[str, object]
) -> None:
    found = getattr(load(tmp_path, model, *overrides).model, slot).model_dump()
    defaults = FlexBertConfig.from_dict({"vocab_size": 64, slot: expected})
    assert found == {**getattr(defaults, slot).model_dump(), **expected}


def test_slots_in_slots(tmp_path: Path) -> None:
    """Each place has its own name, and only that decides."""
    model = "{preset: modernbert-tiny, attention: {qk_norm: {name: layernorm, bias: false}}, initial_layers: {count: 1, mlp: {name: mlp, activation: relu}}}"
    config = load(tmp_path, model, "model.attention.qk_norm.name=rmsnorm", "model.initial_layers.mlp.name=glu").model
    assert config.attention.qk_norm.model_dump() == {"name": "rmsnorm", "eps": 1e-5} | {
        "eps": config.attention.qk_norm.eps
    }
    assert config.attention.window_per_side == load(tmp_path, "modernbert-tiny").model.attention.window_per_side
    assert config.initial_layers is not None
    assert config.initial_layers.mlp == FlexBertConfig.from_dict({"vocab_size": 64, "mlp": "glu"}).mlp


def test_other_slots_over_defaults_and_overrides(tmp_path: Path) -> None:
    more = "optimizer: {name: stableadamw, decouple_lr: false, beta2: 0.9}\ntrainer: {parallelism: {name: fsdp2, reshard_after_forward: false}}\n"
    load(tmp_path, "{preset: modernbert-tiny, hidden_size: 64}", more=more)
    child = tmp_path / "child.yaml"
    child.write_text(
        "defaults: run.yaml\nname: child\noptimizer: {name: adamw, beta1: 0.5}\ntrainer: {parallelism: {name: ddp}}\nmodel: {num_hidden_layers: 2}\n"
    )
    config = load_run_config(child)
    assert config.name == "child"
    assert config.optimizer.model_dump() == {"name": "adamw", "beta1": 0.5} | {
        key: value for key, value in config.optimizer.model_dump().items() if key not in ("name", "beta1")
    }
    assert config.optimizer.beta2 == 0.98  # adamw's own default, not the other one's 0.9
    assert config.trainer.parallelism.name == "ddp"
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (64, 2)
    config = load_run_config(child, ["optimizer.beta2=0.7", "phases.1.schedule.name=linear", "phases.-1.name=end"])
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.5, 0.7)
    assert (config.phases[1].name, config.phases[1].tokens) == ("end", 2000)  # a phase's name chooses nothing
    assert config.phases[1].schedule.final == 0.001
    for override in ("optimizer=adamw", "optimizer={name: adamw}", "optimizer.name=adamw"):
        assert load_run_config(child, [override]).optimizer.beta1 == 0.5
    config = load_run_config(child, ["from=A", "from.data=restart"])
    assert config.origin is not None
    assert (config.origin.checkpoint, config.origin.data) == ("A", "restart")


def test_a_prepare_config(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "output: a\ntokenizer: {name: train, vocab_size: 512}\nstreams: {s: {source: {name: jsonl, paths: [a.jsonl], text: body}}}\n"
    )
    (tmp_path / "child.yaml").write_text(
        "defaults: base.yaml\ntokenizer: {name: load, path: t}\nstreams: {s: {source: {name: txt, paths: [b.txt]}}}\n"
    )
    node = load_node(tmp_path / "child.yaml", ["streams.s.source.paths=[c.txt]"])
    assert node == {
        "output": "a",
        "tokenizer": {"name": "load", "path": "t"},
        "streams": {"s": {"source": {"name": "txt", "paths": ["c.txt"]}}},
    }


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.norm.bais=true", "model.norm: unknown key 'bais', did you mean 'bias'?"),
        ("phases.0.lr={", "override 'phases.0.lr={': not valid YAML: "),
        ("+seed=3", "unknown key '+seed', did you mean 'seed'?"),
        ("~seed", "override '~seed': expected key.path=value"),
        ("phases..lr=3", "override 'phases..lr=3': expected key.path=value"),
        ("phases.0.=3", "override 'phases.0.=3': expected key.path=value"),
        ("model.norm name=rmsnorm", "override 'model.norm name=rmsnorm': expected key.path=value"),
    ],
)
def test_an_override_that_does_not_fit_is_one_line(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "bert-base", override)
    assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_of_one_key_given_twice_the_last_counts(tmp_path: Path) -> None:
    assert load(tmp_path, "bert-base", "seed=3", "seed= 4 ").seed == 4
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="found duplicate key seed"):
        load_node(tmp_path / "twice.yaml")
