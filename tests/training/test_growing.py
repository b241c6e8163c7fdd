"""The source that `init.from` names is an export or a checkpoint; what is wrong with it is said in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from flexbert import FlexBertConfig, FlexBertForMaskedLM, build, to_hf
from flexbert_core.schema import ConfigError
from tests.helpers.models import batch_of, tiny
from tests.helpers.tokenizer import tokenizer_of
from training.checkpoints.files import take_snapshot, write_checkpoint
from training.growing import check_source, read_source


def grown(config: FlexBertConfig, task: Any = "mlm", seed: int = 0) -> Any:
    """As the trainer does."""
    check_source(config)
    return build(config, task, seed=seed, grow_from=read_source(config))


def checkpoint_of(model: FlexBertForMaskedLM, folder: Path) -> Path:
    """As a run writes it."""
    folder.mkdir()
    OmegaConf.save({"model": model.config.model_dump(mode="json")}, folder / "config.yaml")
    path = folder / "checkpoints" / "tokens-100"
    write_checkpoint(path, take_snapshot(model, torch.optim.AdamW(model.parameters())), {})
    return path


@pytest.mark.parametrize("kind", ["export", "checkpoint"])
def test_yaml_grows_an_export_or_a_checkpoint(tmp_path: Path, kind: str) -> None:
    small = build(tiny(), seed=5)
    if kind == "export":
        to_hf(small, tokenizer_of(97), tmp_path / "small")
        source = tmp_path / "small"
    else:
        source = checkpoint_of(small, tmp_path / "small")
    file = tmp_path / "large.yaml"
    node = {**small.config.to_dict(), "hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 80}
    OmegaConf.save({**node, "init": {"from": str(source), "method": "tile_edge"}}, file)
    config = FlexBertConfig.from_yaml(file)
    assert config.init.model_dump()["from"] == str(source)
    assert FlexBertConfig.from_dict(config.to_dict()) == config
    assert FlexBertConfig.from_dict(config.model_dump(mode="json")) == config
    large = grown(config).eval()
    batch = batch_of((9, 70))
    expected = small.eval()(*batch[:3]).logits
    torch.testing.assert_close(large(*batch[:3]).logits, expected, atol=1e-4, rtol=0)
    encoder = grown(config, "encoder").state_dict()
    assert all(torch.equal(encoder[name], tensor) for name, tensor in large.encoder.state_dict().items())
    classifier = grown(config, "classification", seed=1)
    assert torch.equal(classifier.encoder.token_table, large.encoder.token_table)
    fresh = build(tiny(**{key: node[key] for key in ("hidden_size", "num_attention_heads")}), "classification", seed=1)
    with torch.no_grad():
        scale = classifier.head.dense.weight.std() / fresh.head.dense.weight.std()
    assert 0.09 < scale < 0.11, "a head of another task starts fresh: std 0.02 here, 0.2 there"
    # A grown model's export names no folder of this machine
    to_hf(large, tokenizer_of(97), tmp_path / "large")
    assert str(tmp_path) not in (tmp_path / "large" / "config.json").read_text()


@pytest.mark.parametrize(("step", "theta"), [(0, 5000.0), (4, 5000.0), (5, 80000.0), (8, 80000.0), (9, 160000.0)])
def test_a_checkpoint_grows_with_the_theta_that_trained_it(
    tmp_path: Path, step: int, theta: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Phases of 4 steps; the model's own theta is the first one's."""
    small = build(tiny(), seed=5)
    source = checkpoint_of(small, tmp_path / "small")
    write_checkpoint(source, take_snapshot(small, torch.optim.AdamW(small.parameters())), {"step": step})
    phase = {"tokens": 2048, "max_seq_len": 128, "global_batch_size": 4, "lr": 1e-3}
    phases = [
        {"name": "short", **phase},
        {"name": "long", **phase, "rope_theta": {"global_layers": 80000}},
        {"name": "longer", **phase, "rope_theta": {"global_layers": 160000}},
    ]
    data = {"tokenizer": str(tmp_path), "streams": {"text": {"path": str(tmp_path)}}}
    run = {"name": "small", "model": small.config.model_dump(mode="json"), "data": data, "phases": phases}
    OmegaConf.save(run, tmp_path / "small" / "config.yaml")
    config = tiny(init={"name": "grow", "from": str(source)})
    read = read_source(config)
    assert read is not None
    assert (read.config.position.global_theta, read.config.position.local_theta) == (theta, 100.0)
    small.set_rope_theta(global_theta=theta)
    batch = batch_of((9, 70))
    assert torch.equal(read.eval()(*batch[:3]).logits, small.eval()(*batch[:3]).logits)
    build(config, grow_from=read)
    said = [f"init.from: {source}: position.global_theta is {theta} there, 5000.0 here"]
    assert caplog.messages == (said if theta != 5000 else [])


def checkpoint_file(name: str, text: str | None) -> Any:
    """Writes a file of a checkpoint anew, or takes it away (None)."""

    def damage(source: Path) -> None:
        file = source / name
        file.unlink() if text is None else file.write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (checkpoint_file("manifest.json", "{"), "{source}/manifest.json: damaged: take another checkpoint"),
        (checkpoint_file("manifest.json", "{}"), "{source}/manifest.json: damaged: take another checkpoint"),
        (checkpoint_file("manifest.json", "[]"), "{source}/manifest.json: damaged: take another checkpoint"),
        (checkpoint_file("manifest.json", '{"files": 1}'), "{source}/manifest.json: damaged: take another checkpoint"),
        (checkpoint_file("model.safetensors", None), "{source}/model.safetensors: cannot be read: [Errno 2] No such"),
        (checkpoint_file("../../config.yaml", None), "{run}/config.yaml: no such file"),
        (
            checkpoint_file("../../config.yaml", "a: 1"),
            "{run}/config.yaml: model: is missing: expected the config.yaml",
        ),
        (checkpoint_file("../../config.yaml", "model: 7"), "{run}/config.yaml: model: "),
        (checkpoint_file("config.json", "{"), "{source}: config.json: cannot be read: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_sources_are_said_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    source = checkpoint_of(build(tiny()), tmp_path / "small")
    damage(source)
    with pytest.raises(ConfigError) as caught:
        grown(tiny(init={"name": "grow", "from": str(source)}))
    assert str(caught.value).startswith(f"init.from: {message.format(source=source, run=tmp_path / 'small')}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"], ids=["long", "null"])
def test_names_that_no_file_can_have_are_said_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^(model: )?init\.from: expected (a path of names|one line)"):
        grown(tiny(init={"name": "grow", "from": name}))


def test_a_source_whose_weights_are_not_its_configs_is_refused(tmp_path: Path) -> None:
    source = checkpoint_of(build(tiny()), tmp_path / "small")
    file = tmp_path / "small" / "config.yaml"
    for changes, message in (
        ({"intermediate_size": 41}, "has another shape"),
        ({"num_hidden_layers": 5}, "is missing"),
    ):
        OmegaConf.save({"model": tiny(**changes).model_dump(mode="json")}, file)
        with pytest.raises(
            ConfigError, match=rf"^init\.from: {source}: encoder\.layers\..*: {message} there, by the config"
        ):
            grown(tiny(init={"name": "grow", "from": str(source)}))


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    absent = tiny(init={"name": "grow", "from": str(tmp_path / "absent")})
    for read in (check_source, read_source):  # the first is the dry run's
        with pytest.raises(ConfigError, match=r"^init\.from: .*absent: neither an export .* nor a checkpoint"):
            read(absent)
    source = checkpoint_of(build(tiny()), tmp_path / "small")
    save_file({"x": torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors: damaged: take another checkpoint"):
        grown(tiny(init={"name": "grow", "from": str(source)}))
