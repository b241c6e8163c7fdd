"""Folders of transformers and exports that are damaged or contradict themselves: one line that names file and fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbert import build, from_hf, to_hf
from flexbert_core.schema import ConfigError
from recipe.imports import import_components
from tests.helpers.hf_forms import older, rewrite
from tests.helpers.hf_models import reference_model
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tokenizer_of

Damage = Callable[[Path], object]


def fields(**changes: Any) -> Damage:
    """config.json with some fields changed, or left out (...)."""

    def damage(folder: Path) -> None:
        rewrite(folder, lambda node: older(node) | changes)

    return damage


def own(**changes: Any) -> Damage:
    """The same, inside the field `flexbert` of our own exports too."""

    def damage(folder: Path) -> None:
        node = json.loads((folder / "config.json").read_text())
        beside = {key: value for key, value in changes.items() if key in node}
        fields(flexbert=node["flexbert"] | changes, **beside)(folder)

    return damage


def config(text: str) -> Damage:
    return lambda folder: (folder / "config.json").write_text(text)


def quantized(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["head.norm.weight"] = state["head.norm.weight"].to(torch.int8)
    save_file(state, folder / "model.safetensors")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def renamed(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["head.spare.weight"] = state.pop("head.norm.weight")
    save_file(state, folder / "model.safetensors")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    to_hf(build(tiny(position="alibi")), tokenizer_of(97), folder / "own")
    for kind in ("bert", "roberta", "modernbert"):
        reference_model("eager", kind).save_pretrained(folder / kind)
    return folder


CASES: list[tuple[str, Damage, str]] = [
    ("bert", config("[1]"), "config.json: expected a mapping of keys to values, got list"),
    ("bert", config("{"), "config.json: cannot be read: "),
    ("bert", truncated, "model.safetensors: cannot be read: "),
    ("bert", without_weights, "model.safetensors: there is none"),
    ("bert", fields(num_hidden_layers=3), "bert.encoder.layer.3."),
    ("bert", fields(num_hidden_layers=5), "bert.encoder.layer.4."),
    ("bert", fields(intermediate_size=41), "bert.encoder.layer.0.intermediate.dense.weight: (40, 48) in the weights, (41,"),
    ("bert", fields(vocab_size=96), "config.json: pad_token_id: 96 is outside the vocabulary of 96"),
    ("bert", fields(pad_token_id=1000), "config.json: pad_token_id: 1000 is outside the vocabulary of 97"),
    ("bert", fields(hidden_act="foo"), "hidden_act: 'foo' has no counterpart here"),
    ("bert", fields(hidden_act=["gelu"]), "hidden_act: ['gelu'] has no counterpart here"),
    ("bert", fields(hidden_size="x"), "config.json: hidden_size: should be a valid integer, got 'x'"),
    ("bert", fields(hidden_size=None), "config.json: hidden_size: should be a valid integer, got None"),
    ("bert", fields(num_attention_heads=0), "config.json: num_attention_heads: should be greater than or equal to 1"),
    ("bert", fields(num_attention_heads=5), "config.json: hidden_size: 48 is no multiple of num_attention_heads 5"),
    ("bert", fields(hidden_dropout_prob=None), "hidden_dropout_prob: None of the Hugging Face config should be a num"),
    ("bert", fields(layer_norm_eps="1e-5"), "layer_norm_eps: '1e-5' of the Hugging Face config should be a number"),
    ("bert", fields(max_position_embeddings="x"), "max_position_embeddings: 'x' of the Hugging Face config should be"),
    ("bert", fields(initializer_range=0.0), "config.json: init.std: should be greater than 0"),
    ("bert", fields(model_type=["bert"]), "model_type: ['bert'] is not known"),
    ("roberta", fields(pad_token_id="x"), "pad_token_id: 'x' of the Hugging Face config should be a number"),
    ("modernbert", fields(num_hidden_layers=3), "model.layers.3."),
    ("modernbert", fields(local_attention=1), "config.json: attention.window_per_side: should be greater than or equ"),
    ("modernbert", fields(local_attention=None), "local_attention: None of the Hugging Face config should be a numbe"),
    ("modernbert", fields(global_attn_every_n_layers=0), "config.json: attention.global_attn_every_n_layers: should"),
    ("modernbert", fields(global_rope_theta=None), "global_rope_theta: None of the Hugging Face config should be a n"),
    ("modernbert", fields(initializer_range=0.0), "config.json: init.std: should be greater than 0"),
    ("modernbert", fields(eos_token_id=[2, 3]), "config.json: eos_token_id: should be a valid integer"),
    ("own", fields(flexbert=...), "config.json: flexbert: is missing"),
    ("own", fields(flexbert=None), "config.json: "),
    ("own", own(hiden_size=48), "config.json: unknown key 'hiden_size', did you mean 'hidden_size'?"),
    ("own", fields(flexbert="x"), "config.json: "),
    ("own", fields(max_position_embeddings=4096), "config.json: max_position_embeddings: 4096 contradicts flexbert.max_p"),
    ("own", fields(hidden_size=96), "config.json: hidden_size: 96 contradicts flexbert.hidden_size, 48"),
    ("own", fields(vocab_size=96), "encoder.embedding.tokens.weight: (97, 48) in the weights, (96, 48) by the config"),
    ("own", own(num_hidden_layers=3), "encoder.layers.3."),
    ("own", own(intermediate_size=41), "encoder.layers.0.mlp.Wi.weight: (80, 48) in the weights, (82, 48) by the conf"),
    ("own", quantized, "head.norm.weight: torch.int8 cannot be read as plain numbers"),
    ("own", truncated, "model.safetensors: cannot be read: "),
    ("own", without_weights, "model.safetensors: there is none"),
    ("own", renamed, "head.norm.weight: missing in this model"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "damage", "message"), CASES, ids=[f"{k}-{m[:40]}" for k, _, m in CASES])
def test_what_is_wrong_is_said_in_one_line(
    sources: Path, tmp_path: Path, kind: str, damage: Damage, message: str
) -> None:
    folder = shutil.copytree(sources / kind, tmp_path / "folder")
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        from_hf(folder)
    assert str(caught.value).startswith(f"{folder}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("saved", ["whole", "encoder alone"])
def test_layers_left_over_are_refused_of_an_encoder_too(tmp_path: Path, kind: str, saved: str) -> None:
    reference = reference_model("eager", kind)
    (reference if saved == "whole" else reference.base_model).save_pretrained(tmp_path)
    assert len(from_hf(tmp_path, task="encoder").layers) == 4
    fields(num_hidden_layers=3)(tmp_path)
    with pytest.raises(ConfigError, match=r"layers?\.3\..*: has no place in the model that the config describes"):
        from_hf(tmp_path, task="encoder")


def test_weights_that_older_versions_wrote_beside_the_model_are_ignored(tmp_path: Path) -> None:
    reference = reference_model("eager", "bert")
    state = {
        **reference.state_dict(),
        "bert.embeddings.position_ids": torch.arange(256)[None],
        "bert.pooler.dense.bias": torch.zeros(48),
        "cls.seq_relationship.bias": torch.zeros(2),
    }
    reference.save_pretrained(tmp_path, state_dict=state)
    expected = from_hf(reference).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in from_hf(tmp_path).state_dict().items())


def test_a_model_whose_config_was_changed_is_refused() -> None:
    reference = reference_model("eager", "bert")
    reference.config.intermediate_size = 41
    with pytest.raises(
        ConfigError,
        match=r"^bert\.encoder\.layer\.0\.intermediate\.dense\.weight: \(40, 48\) in the weights, \(41, 48\)",
    ):
        from_hf(reference)


@pytest.fixture(scope="module")
def with_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that carries a part from outside, examples/scale_norm.py."""
    folder = tmp_path_factory.mktemp("parts")
    import_components({"imports": ["scale_norm.py"]}, Path(__file__).parents[3] / "examples" / "run.yaml")
    to_hf(build(tiny(norm="scale_norm")), tokenizer_of(97), folder / "export")
    return folder / "export"


@pytest.mark.parametrize(
    ("parts_of_config", "sources", "line"),
    [
        (["scale_norm.py"], None, r"config\.json: parts: expected the sha256 of each file"),
        ("scale_norm.py", None, r"config\.json: parts: expected the sha256 of each file"),
        ({"scale_norm.py": 3}, None, r"config\.json: parts: expected the sha256 of each file"),
        (None, "PARTS = []\nROOTS = []\nIMPORTABLE = []\n", r"flexbert_sources\.py: damaged"),
        (None, "PARTS = {'a.py': 3}\nROOTS = ['a.py']\nIMPORTABLE = []\n", r"flexbert_sources\.py: damaged"),
        (None, "PARTS = {}\nROOTS = ['a.py']\nIMPORTABLE = []\n", r"flexbert_sources\.py: damaged"),
        (None, "PARTS = {}\nROOTS = 3\nIMPORTABLE = []\n", r"flexbert_sources\.py: damaged"),
        (None, "PARTS = {}\nROOTS = []\nIMPORTABLE = 3\n", r"flexbert_sources\.py: damaged"),
        (None, "PARTS =", r"flexbert_sources\.py: cannot be read"),
    ],
)
def test_a_damaged_export_with_parts_is_one_line(
    with_parts: Path, tmp_path: Path, parts_of_config: Any, sources: str | None, line: str
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(with_parts, folder)
    if parts_of_config is not None:
        node = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**node, "parts": parts_of_config}))
    if sources is not None:
        (folder / "flexbert_sources.py").write_text(sources)
    with pytest.raises(ConfigError, match=line):
        from_hf(folder, trust_remote_code=True)
