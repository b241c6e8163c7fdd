"""Weights of transformers as they come: in several files, in half precision, of other classes, left over or odd."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    ModernBertForSequenceClassification,
)

from flexbert import build, from_hf, to_hf
from flexbert.hf.mappings import MAPPINGS
from flexbert.hf.state import moved_table
from flexbert_core.schema import ConfigError
from tests.helpers.architectures import BERT
from tests.helpers.hf_models import CLASSES, TOLERANCE, batch_for, one_by_one, reference_model
from tests.helpers.models import equal, tiny
from tests.helpers.tokenizer import tokenizer_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [97, 131], ids=["as made", "resized"])
def test_copies_in_several_files_half_precision_or_another_vocabulary(
    tmp_path: Path, kind: str, dtype: torch.dtype, vocab_size: int
) -> None:
    reference = reference_model("eager", kind)
    reference.resize_token_embeddings(vocab_size)
    reference.to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).is_file()
    model, half = from_hf(tmp_path).eval(), reference
    reference = type(half)(half.config).eval()  # not `half.float()`: its buffers would stay rounded
    reference.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    batch = batch_for(reference, (9, 65))
    theirs = one_by_one(reference, batch)
    assert theirs.shape[1] == vocab_size
    torch.testing.assert_close(model(*batch[:3]).logits, theirs, atol=TOLERANCE, rtol=0)
    assert equal(from_hf(half), model)


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The whole state rewritten."""

    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def split(**changes: Any) -> Callable[[Path], None]:
    """The weights in two files, with changes in the index's weight_map."""

    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        first = dict(list(sorted(state.items()))[:10])
        rest = {name: tensor for name, tensor in state.items() if name not in first}
        save_file(first, folder / "a.safetensors")
        save_file(rest, folder / "b.safetensors")
        names = {name: "a.safetensors" for name in first} | {name: "b.safetensors" for name in rest} | changes
        weight_map = {name: file for name, file in names.items() if file is not None}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def both(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    split()(folder)
    (folder / WEIGHTS).write_bytes(whole)


def file(name: str, text: str = "{}", without: str | None = None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)
        if without is not None:
            (folder / without).unlink()

    return damage


NORM = "bert.embeddings.LayerNorm.weight"
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (both, f"{WEIGHTS}: and {INDEX} name different files with weights"),
    (split(**{NORM: "c.safetensors"}), f"{INDEX}: {NORM}: its file 'c.safetensors' is not in the folder"),
    (split(**{NORM: "../folder/a.safetensors"}), f"{INDEX}: {NORM}: its file '../folder/a.safetensors' is not in"),
    (split(**{NORM: 7}), f"{INDEX}: {NORM}: its file 7 is not in the folder"),
    (split(spare="a.safetensors"), f"spare: should be in a.safetensors by {INDEX}"),
    (split(**{NORM: None}), f"{NORM}: is not named by {INDEX}"),
    (file(INDEX, "[]", WEIGHTS), f"{INDEX}: expected a mapping of keys to values, got list"),
    (file(INDEX, "{", WEIGHTS), f"{INDEX}: cannot be read: "),
    (file(INDEX, "{}", WEIGHTS), f"{INDEX}: weight_map: expected names of weights with their files, got None"),
    (file("pytorch_model.bin", "x", WEIGHTS), f"{WEIGHTS}: there is none, only pytorch_model.bin: a pickle could run"),
    (file("adapter_config.json"), "adapter_config.json: an adapter lies beside the weights"),
    (file("adapter_config.json", "{}", "config.json"), "adapter_config.json: only an adapter is in it"),
    (changed(lambda s: s.update({NORM: s[NORM].to(torch.int8)})), f"{NORM}: torch.int8 cannot be read as plain numbers"),
    (changed(lambda s: s.update({NORM: s[NORM].to(torch.float8_e4m3fn)})), f"{NORM}: torch.float8_e4m3fn cannot be read"),
    (changed(lambda s: s.update({NORM.replace("weight", "gamma"): s[NORM] + 1})), "bert.embeddings.LayerNorm.gamma: is there under its"),
    (changed(lambda s: s.update({"bert.encoder.layer.0.output.dense.lora_A.weight": s[NORM] + 1})), "bert.encoder.layer.0.ou"),
    (changed(lambda s: s.update({"bert.embeddings.types.weight": s[NORM] + 1})), "bert.embeddings.types.weight: has no place"),
    (changed(lambda s: s.update({NORM: s[NORM][:40]})), f"{NORM}: (40,) in the weights, (48,) by the config"),
    (changed(lambda s: s.pop(NORM)), f"{NORM}: missing in the weights"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    reference_model("eager", "bert").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:60] for _, message in DAMAGES])
def test_odd_weights_are_refused_by_name(
    bert: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(bert, tmp_path / "folder")
    damage(folder)
    with pytest.raises(ConfigError) as caught:
        from_hf(folder)
    assert str(caught.value).startswith(f"{folder}: {message}")
    assert "\n" not in str(caught.value)


def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(state: dict[str, Any]) -> None:
        renamed = {change(name): tensor for name, tensor in state.items()}
        state.clear()
        state.update(renamed)

    return changed(damage)


@pytest.mark.parametrize(
    "damage",
    [
        split(),
        rename(lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")),
        rename(lambda name: f"_orig_mod.{name}"),
        rename(lambda name: f"module.{name}"),
        rename(lambda name: "cls.predictions.decoder.bias" if name == "cls.predictions.bias" else name),
        rename(lambda name: name.replace("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")),
    ],
    ids=["two files", "old names of norms", "compiled", "DataParallel", "the bias of the decoder", "its weight"],
)  # fmt: skip
def test_weights_under_names_that_others_write(bert: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = shutil.copytree(bert, tmp_path / "folder")
    damage(folder)
    assert equal(from_hf(folder), from_hf(bert))


def test_what_is_left_out_is_said(bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(bert, tmp_path / "folder")
    word = "bert.embeddings.word_embeddings.weight"
    changed(lambda state: state.update({"cls.predictions.decoder.weight": state[word] + 1}))(folder)
    shutil.copy(folder / WEIGHTS, folder / "old.safetensors")
    with caplog.at_level(logging.WARNING, logger="flexbert"):
        assert equal(from_hf(folder), from_hf(bert))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{folder}: not read, since they are not the model's: old.safetensors",
        f"cls.predictions.decoder.weight: is not {word}, which takes its place since the two are tied: left out",
    ]


def test_models_of_other_classes(caplog: pytest.LogCaptureFixture) -> None:
    reference = reference_model("eager", "bert")
    expected = from_hf(reference)
    pretraining = BertForPreTraining(reference.config)
    pretraining.load_state_dict(reference.state_dict(), strict=False)
    with caplog.at_level(logging.INFO, logger="flexbert"):
        assert equal(from_hf(pretraining), expected)
    assert (
        "not part of a model for task mlm: bert.pooler.dense.bias, bert.pooler.dense.weight, cls.seq_rel" in caplog.text
    )
    classifier = BertForSequenceClassification(reference.config)
    classifier.bert.load_state_dict(reference.bert.state_dict(), strict=False)
    with caplog.at_level(logging.INFO, logger="flexbert"):
        assert equal(from_hf(classifier, task="encoder"), expected.encoder)
    assert "task encoder: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias" in caplog.text
    modern = reference_model("eager")
    other = ModernBertForSequenceClassification(modern.config)
    other.model.load_state_dict(modern.model.state_dict())
    assert equal(from_hf(other, task="encoder"), from_hf(modern).encoder)
    for model in (classifier, reference.bert, BertModel(reference.config)):
        with pytest.raises(ConfigError, match=r"^cls\.predictions\.\S+: missing in the weights: .* task='encoder'$"):
            from_hf(model)


def test_models_as_they_are_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    reference = reference_model("eager", "bert")
    expected = from_hf(reference)
    assert equal(from_hf(torch.compile(reference)), expected)
    for layer in reference.bert.encoder.layer:
        layer.compile()
    assert equal(from_hf(reference), expected)
    handle = reference.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, logger="flexbert"):
        assert equal(from_hf(reference), expected)
    handle.remove()
    own = type("MyBert", (type(reference),), {"__module__": "my_models"})(reference.config)
    own.load_state_dict(reference.state_dict())
    with caplog.at_level(logging.WARNING, logger="flexbert"):
        assert equal(from_hf(own), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "hooks are left out: of bert.encoder.layer.1",
        "MyBert: is no class of transformers: its weights are taken, its code is not",
    ]
    for model, message in (
        (reference.to("meta"), r"\S+: is not in memory \(device meta\)"),
        (torch.nn.Linear(2, 2), "Linear: expected a folder, or a model of transformers"),
        (expected, "FlexBertForMaskedLM: expected a folder, or a model of transformers"),
        (None, "NoneType: expected a folder"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            from_hf(model)


@pytest.mark.parametrize("pad", [0, 1, 2, 7, 60])
def test_roberta_is_exported_as_such_whatever_the_padding_id(tmp_path: Path, pad: int) -> None:
    """Its positions start at row pad + 1 of the table, where the run had them at row 2."""
    position = {"name": "learned", "offset": 2}
    config = tiny(**{**BERT, "position": position, "head": {"name": "mlm", "dense_bias": True}})
    model, tokenizer = build(config), tokenizer_of(97)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    to_hf(model, tokenizer, tmp_path / "export")  # verified against transformers
    node = json.loads((tmp_path / "export" / "config.json").read_text())
    assert node["architectures"] == ["RobertaForMaskedLM"]
    assert (node["max_position_embeddings"], node["pad_token_id"]) == (256 + pad + 1, pad)
    again = from_hf(tmp_path / "export")
    assert again.config.position == config.position
    ours, theirs = model.state_dict(), again.state_dict()
    table = "encoder.position.table.weight"
    assert torch.equal(ours[table][2:], theirs[table][2:])
    assert equal(again, model) or pad == 0  # one row less that no position reads
    encoder = from_hf(tmp_path / "export", task="encoder")
    assert equal(encoder, again.encoder)
    reference = CLASSES["roberta"][1].from_pretrained(tmp_path / "export").eval()
    batch = batch_for(reference, (9, 256))
    torch.testing.assert_close(
        one_by_one(reference, batch), model.eval()(*batch[:3]).logits, atol=TOLERANCE, rtol=0
    )  # at the longest sequence too


def test_a_table_that_is_moved_keeps_the_rows_in_front_that_fit() -> None:
    table = torch.arange(12.0).view(6, 2)
    assert torch.equal(moved_table(moved_table(table, 2, 5), 5, 2), table)
    assert moved_table(table, 2, 3).tolist() == [[0, 1], [2, 3], [0, 0], *table[2:].tolist()]
    assert moved_table(table, 2, 1).tolist() == [[0, 1], *table[2:].tolist()]


def test_dropout_that_an_export_cannot_say_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(tiny(attention={"out_dropout": 0.1}, mlp={"name": "glu", "out_dropout": 0.2}))
    with caplog.at_level(logging.WARNING, logger="flexbert"):
        to_hf(model, tokenizer_of(97), tmp_path / "export")
    lost = "attention.out_dropout, mlp.out_dropout"
    assert f"{lost}: have no field in Hugging Face's ModernBERT: fine-tuning the export drops" in caplog.text
    assert f"Fine-tuning drops nothing at {lost}" in (tmp_path / "export" / "README.md").read_text()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flexbert"):
        to_hf(build(tiny(**BERT)), tokenizer_of(97), tmp_path / "bert")
    assert "dropout" not in caplog.text
    assert "dropout" not in (tmp_path / "bert" / "README.md").read_text()


def test_every_mapping_is_in_the_tests() -> None:
    assert MAPPINGS.keys() == CLASSES.keys()


def test_to_hf_takes_a_compiled_model_and_no_other_kind(tmp_path: Path) -> None:
    model = build(tiny())
    to_hf(torch.compile(model), tokenizer_of(97), tmp_path / "export")  # pyright: ignore[reportArgumentType]
    assert equal(from_hf(tmp_path / "export"), model)
    for other in (model.encoder, reference_model("eager")):
        with pytest.raises(ConfigError, match=rf"^{type(other).__name__}: expected a FlexBertForMaskedLM"):
            to_hf(other, tokenizer_of(97), tmp_path / "other")  # pyright: ignore[reportArgumentType]
