"""`main.py schema`: the JSON Schemas say of a YAML file what our own loader says of it, as far as one file can tell.

Judged by the package jsonschema and by our loaders, which know nothing of each other.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from omegaconf import OmegaConf

from commands.reference import markdown
from commands.schema import KINDS
from commands.write_schema import write_schema
from data.preparation.config import load_prepare_config
from evals.config import load_eval_file
from flexbert import FlexBertConfig
from flexbert_core.schema import Component, ConfigError, Schema, ShownSlot
from recipe.config import load_run_config
from recipe.track import load_track
from sweeps.file import load_sweep_file
from tests.helpers.runs import command, run

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LOADERS: dict[str, Any] = {"run": load_run_config, "prepare": load_prepare_config, "model": FlexBertConfig.from_yaml}
LOADERS |= {"eval": load_eval_file, "sweep": load_sweep_file, "track": load_track}

RUN = """
name: mine
model: modernbert-tiny
data:
  tokenizer: datasets/mine/tokenizer
  streams: {prose: {path: datasets/mine/prose}}
phases: [{name: all, tokens: 1M, max_seq_len: 512, global_batch_size: 4, lr: 1e-3}]
"""
PREPARE = """
output: datasets/mine
tokenizer: {name: train, vocab_size: 8192}
streams: {prose: {source: {name: txt, paths: [texts]}}}
"""
MODEL = "vocab_size: 8192\n"


def schema_errors(kind: str, file: Path) -> list[str]:
    """What the committed JSON Schema says against a file, as an editor that reads the same YAML would."""
    validator = jsonschema.Draft7Validator(json.loads((ROOT / f"configs/schema/{kind}.json").read_text()))
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    return [error.message for error in validator.iter_errors(content)]


def written(folder: Path, text: str, changes: dict[str, Any]) -> Path:
    """A file with the text's content, some keys set to other values; REMOVED: without the key."""
    node = OmegaConf.create(text)
    for key, value in changes.items():
        if value is REMOVED:
            parent, _, last = key.rpartition(".")
            del (OmegaConf.select(node, parent) if parent else node)[last]  # pyright: ignore
        else:
            OmegaConf.update(node, key, value, merge=False, force_add=True)
    file = folder / "config.yaml"
    OmegaConf.save(node, file)
    return file


REMOVED = object()


def test_schemas_are_up_to_date(tmp_path: Path) -> None:
    """In a process of its own: tests register components, too."""
    assert run(command("schema", "--json", "--output", str(tmp_path))).returncode == 0
    for kind in KINDS:
        committed = (ROOT / f"configs/schema/{kind}.json").read_text()
        assert (tmp_path / f"{kind}.json").read_text() == committed, "run `make schema`, and commit"
    assert run(command("schema", "--markdown", "--output", str(tmp_path / "page.md"))).returncode == 0
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs/reference.md").read_text(), "run `make schema`"


@pytest.mark.parametrize("kind", KINDS)
def test_schema_is_a_schema(kind: str) -> None:
    schema = json.loads((ROOT / f"configs/schema/{kind}.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    references = set(re.findall(r'"\$ref": "#/\$defs/([^"]+)"', json.dumps(schema)))
    assert references == set(schema["$defs"])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_name_their_schema_and_keep_to_it(file: Path) -> None:
    first = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", file.read_text().split("\n")[0])
    assert first is not None
    schema = (file.parent / first[1]).resolve()
    assert schema.is_file()
    assert schema.parent == ROOT / "configs" / "schema"
    assert not schema_errors(schema.stem, file)
    # `model: from` is that of a folder that is not there: tests/recipe/test_continue_files.py
    stand_in = ["model=modernbert-tiny"] if "\nmodel: from\n" in file.read_text() else []
    LOADERS[schema.stem](file, *([stand_in] if stand_in else []))


WRONG: list[tuple[str, str, dict[str, Any]]] = [
    # unknown keys, at every depth
    ("run", RUN, {"sed": 1}),
    ("run", RUN, {"trainer": {"precison": "fp32"}}),
    ("run", RUN, {"phases": [{"name": "a", "tokens": "1M", "max_seq_len": 512, "global_batch_size": 4, "lrr": 1e-3}]}),
    ("run", RUN, {"data.streams.prose.wieght": 2}),
    ("run", RUN, {"optimizer": {"name": "adamw", "decouple_lr": True}}),
    ("run", RUN, {"model": {"preset": "modernbert-tiny", "hiden_size": 128}}),
    ("prepare", PREPARE, {"streams.prose.source.text_column": "text"}),
    ("model", MODEL, {"norm": {"name": "rmsnorm", "bias": True}}),
    # wrong types
    ("run", RUN, {"seed": "many"}),
    ("run", RUN, {"seed": True}),
    ("run", RUN, {"phases": {"name": "a"}}),
    ("run", RUN, {"data.num_workers": 1.5}),
    ("run", RUN, {"trainer": {"compile": "sometimes"}}),
    ("run", RUN, {"imports": "layers.py"}),
    ("run", RUN, {"checkpoint": {"interval": "often"}}),
    ("run", RUN, {"data.cache_limit": "50 gigs"}),
    ("prepare", PREPARE, {"streams": ["prose"]}),
    ("model", MODEL, {"hidden_size": "wide"}),
    ("model", MODEL, {"hidden_size": None}),
    # out of range
    ("run", RUN, {"masking": {"rate": 1.5}}),
    ("run", RUN, {"trainer": {"microbatch_size": 0}}),
    ("run", RUN, {"data.streams.prose.weight": 0}),
    ("run", RUN, {"data.streams": {}}),
    ("run", RUN, {"phases": []}),
    ("run", RUN, {"ema": {"decay": 1}}),
    ("run", RUN, {"checkpoint": {"keep_every": 0}}),
    ("run", RUN, {"name": "../elsewhere"}),
    ("prepare", PREPARE, {"validation_fraction": 1.0}),
    ("prepare", PREPARE, {"tokenizer.vocab_size": 8193}),
    ("model", MODEL, {"num_hidden_layers": 0}),
    # unknown components and choices
    ("run", RUN, {"optimizer": "adam"}),
    ("run", RUN, {"optimizer": {"name": "sgd", "lr": 1}}),
    ("run", RUN, {"optimizer": {"weight_decay": 0.1}}),
    ("run", RUN, {"model": "modernbert-huge"}),
    ("run", RUN, {"model": {"preset": "modernbert-tiny", "norm": "rmsnrm"}}),
    ("run", RUN, {"trainer": {"precision": "fp16"}}),
    ("run", RUN, {"from": {"checkpoint": "runs/x", "data": "again"}}),
    ("prepare", PREPARE, {"executor": "kubernetes"}),
    ("prepare", PREPARE, {"executor": "slurm"}),  # which needs a partition
    ("prepare", PREPARE, {"streams.prose.filters": ["minhsh"]}),
    ("model", MODEL, {"mlp": {"name": "glu", "activation": "gellu"}}),
    # missing
    ("run", RUN, {"data": REMOVED}),
    ("run", RUN, {"phases": [{"tokens": "1M", "max_seq_len": 512, "global_batch_size": 4, "lr": 1e-3}]}),
    ("prepare", PREPARE, {"output": REMOVED}),
    ("model", "norm: rmsnorm\n", {}),
]


@pytest.mark.parametrize(("kind", "text", "changes"), WRONG)
def test_wrong_files_are_refused_by_both(kind: str, text: str, changes: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path, text, changes)
    with pytest.raises(ConfigError):
        LOADERS[kind](file)
    assert schema_errors(kind, file)


RIGHT: list[tuple[str, str, dict[str, Any]]] = [
    ("run", RUN, {}),
    ("run", RUN, {"seed": "${data.num_workers}", "data.num_workers": 2}),
    ("run", RUN, {"masking": {"rate": 0.15}, "evaluation": {"masking": "${masking}"}}),
    ("run", RUN, {"data.streams.prose.path": "${oc.env:HOME}/prose"}),
    ("run", RUN, {"optimizer": "${oc.env:NOT_SET_HERE,adamw}"}),
    ("run", RUN, {"checkpoint": {"interval": 1e6, "keep_every": "0.5B"}, "data.cache_limit": "1.5tb"}),
    ("run", RUN, {"trainer": {"spike_guard": {}, "microbatch_size": "auto", "gradient_clip_norm": 1}}),
    ("run", RUN, {"from": "runs/other", "ema": {"decay": 0.999}}),
    ("run", RUN, {"from": {"checkpoint": "runs/other", "weights_only": True}}),
    ("run", RUN, {"model": {"preset": "bert-base", "attention": {"out_dropout": 0.0}, "norm": {"eps": 1e-6}}}),
    ("run", RUN, {"model": {"vocab_size": 8192, "init": {"from": "runs/small", "method": "tile_edge"}}}),
    ("run", RUN, {"model": {"preset": "bert-base", "initial_layers": {"count": 2, "mlp": {"name": "mlp"}}}}),
    ("prepare", PREPARE, {"executor": {"name": "slurm", "partition": "cpu", "sbatch_args": {"qos": "high"}}}),
    ("prepare", PREPARE, {"streams.prose.filters": ["minhash", {"name": "length", "min_characters": 3}]}),
    ("model", MODEL, {"attention": {"name": "multihead", "qk_norm": "rmsnorm"}, "pad_token_id": None}),
]


@pytest.mark.parametrize(("kind", "text", "changes"), RIGHT)
def test_right_files_are_taken_by_both(kind: str, text: str, changes: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path, text, changes)
    LOADERS[kind](file)
    assert not schema_errors(kind, file)


def test_a_file_with_defaults_may_be_a_part(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RUN + "optimizer: {name: adamw, weight_decay: 0.1}\n")
    file = written(tmp_path, "defaults: base.yaml\noptimizer: {weight_decay: 0.01}\ndata: {num_workers: 0}\n", {})
    assert load_run_config(file).optimizer.weight_decay == 0.01
    assert not schema_errors("run", file)
    wrong = written(tmp_path, "defaults: base.yaml\noptimizer: {weight_decy: 0.01}\n", {})
    with pytest.raises(ConfigError):
        load_run_config(wrong)
    assert schema_errors("run", wrong)


def test_imported_components_have_names_that_the_schema_cannot_know(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text(
        "import flexbert, torch\nfrom flexbert_core.schema import Component\n"
        '@flexbert.register("norm", "of_test_schema")\nclass Norm(torch.nn.Identity):\n'
        "    class Config(Component):\n        pass\n    def __init__(self, config, *, hidden_size): super().__init__()\n"
    )
    changes = {"model": {"preset": "modernbert-tiny", "norm": "of_test_schema"}}
    file = written(tmp_path, "imports: [layers.py]\n" + RUN, changes)
    try:
        assert load_run_config(file).model.norm.name == "of_test_schema"
    finally:
        from flexbert.registry import NORMS

        NORMS.entries.pop("of_test_schema", None)
    assert not schema_errors("run", file)
    assert schema_errors("run", written(tmp_path, RUN, changes))


def parts(annotation: Any) -> Iterator[type[Schema]]:
    """The configs that a field's annotation or metadata names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Schema):
        yield annotation
    elif isinstance(annotation, ShownSlot):
        for entry in annotation.registry.entries.values():
            if not entry.__module__.startswith(("tests.", "imported_")):
                yield entry.Config
    for each in get_args(annotation):
        yield from parts(each)


def all_configs() -> set[type[Schema]]:
    """Every class that checks a piece of a YAML file."""
    found: set[type[Schema]] = set()
    waiting: list[Any] = list(KINDS.values())
    while waiting:
        schema = waiting.pop()
        if schema not in found:
            found.add(schema)
            for field in schema.model_fields.values():
                waiting += [each for part in (field.annotation, *field.metadata) for each in parts(part)]
    return found


def test_every_field_has_help_text() -> None:
    configs = all_configs()
    assert len(configs) > 50
    without = [
        f"{schema.__module__}.{schema.__qualname__}.{name}"
        for schema in configs
        for name, field in schema.model_fields.items()
        if not (field.description or "").strip() and not (issubclass(schema, Component) and name == "name")
    ]
    assert not without, "give these a description, or a docstring below them"


def test_reference_has_every_key() -> None:
    page = markdown()
    for schema in all_configs():
        for name, field in schema.model_fields.items():
            key = field.alias or name
            there = re.search(rf"\| `([^`]*\.)?{re.escape(key)}` \|", page)
            assert there or (issubclass(schema, Component) and key == "name"), (schema, key)
    for key in ("trainer.spike_guard.sigmas", "data.streams.NAME.weight", "phases[].rope_theta.global_layers"):
        assert f"| `{key}` |" in page
    assert "| `trainer.max_bad_steps` | integer, at least 1 | `10` |" in page
    assert "| `checkpoint.keep` | integer, at least 1 | `2` |" in page
    assert "| `phases[].tokens` | integer, over 0 or text such as `50B` | required |" in page


@pytest.mark.parametrize(
    ("flags", "said"),
    [((False, False), "give --markdown or --json"), ((True, True), "not both")],
)
def test_one_of_both_forms(flags: tuple[bool, bool], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        write_schema(*flags, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for flags in ((True, False), (False, True)):
        with pytest.raises(ConfigError, match="--output: .*file"):
            write_schema(*flags, tmp_path / "file" / "below")
