"""Exports: whole, checked by transformers, or not there."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, ElectraConfig, ElectraForMaskedLM

from flexbert import build, from_hf, to_hf
from flexbert.hf.mappings import MAPPINGS
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.architectures import BERT, IDS
from tests.helpers.hf_forms import older
from tests.helpers.hf_models import batch_for, one_by_one, reference_model
from tests.helpers.models import ODD_LENGTHS, batch_of, tiny
from tests.helpers.tokenizer import tokenizer_of


def nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


def test_export_is_what_transformers_loads(tmp_path: Path) -> None:
    model = build(tiny(attention={"out_dropout": 0.1}))
    model.set_rope_theta(global_theta=777.0)
    state, rng = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    to_hf(model, tokenizer_of(97), tmp_path / "export", card="# A card\n")
    assert model.training
    assert torch.equal(torch.get_rng_state(), rng), "the export moved the global generator"
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    files = {file.name for file in (tmp_path / "export").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"} <= files
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "README.md").read_text() == "# A card\n"
    exported: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "export")
    assert exported.config.architectures == ["ModernBertForMaskedLM"]
    node = older(json.loads((tmp_path / "export" / "config.json").read_text()))
    assert (node["global_rope_theta"], node["local_rope_theta"]) == (777.0, 100.0)
    ids = {name: getattr(exported.config, f"{name}_token_id") for name in ("cls", "sep", "pad", "mask", "bos", "eos")}
    assert ids == {"cls": 1, "sep": 2, "pad": 3, "mask": 4, "bos": 1, "eos": 2}
    assert exported.config.max_position_embeddings == 256
    assert exported.config.attention_dropout == 0.0
    assert str(exported.dtype) == str(exported.config.dtype) == "torch.float32"
    batch = batch_of(ODD_LENGTHS)
    logits = model.eval()(*batch[:3]).logits
    torch.testing.assert_close(one_by_one(exported, batch), logits, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").mask_token_id == 4


def test_export_and_import_are_inverse(tmp_path: Path) -> None:
    numbers = {"cls": 1, "sep": 2, "pad": 3, "mask": 4, "bos": 1, "eos": 2}
    config = tiny(
        **{f"{name}_token_id": number for name, number in numbers.items()},
        norm={"name": "layernorm", "eps": 1e-6, "bias": True},
        mlp={"name": "glu", "activation": "silu", "in_bias": True, "out_bias": True, "inner_dropout": 0.1},
        attention={"qkv_bias": True, "out_bias": True, "probs_dropout": 0.1, "out_dropout": 0.1},
        head={"name": "mlm", "activation": "silu", "dense_bias": True, "decoder_bias": False},
        embedding={"name": "tokens", "dropout": 0.2},
    )
    model = build(config)
    to_hf(model, tokenizer_of(97), tmp_path / "export")
    again = from_hf(tmp_path / "export")
    assert again.config == config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"| parameters | {sum(parameter.numel() for parameter in model.parameters()):,} |" in card


def test_half_precision_model_is_exported_as_float32(tmp_path: Path) -> None:
    model = build(tiny()).to(torch.bfloat16)
    to_hf(model, tokenizer_of(97), tmp_path / "export")
    again = from_hf(tmp_path / "export")
    assert all(
        torch.equal(tensor.float(), again.state_dict()[name]) and again.state_dict()[name].dtype == torch.float32
        for name, tensor in model.state_dict().items()
    )


def test_tokenizer_may_be_a_folder_and_an_export_is_replaced(tmp_path: Path) -> None:
    tokenizer_of(97).save_pretrained(tmp_path / "tokenizer")
    to_hf(build(tiny(), seed=1), str(tmp_path / "tokenizer"), tmp_path / "export")
    second = build(tiny(), seed=2)
    to_hf(second, tmp_path / "tokenizer", tmp_path / "export")
    again = from_hf(tmp_path / "export")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in second.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "tokenizer"]


def test_tokenizer_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size: 97 is less than the 98 entries of the tokenizer"):
        to_hf(build(tiny()), tokenizer_of(98), tmp_path / "export")
    assert nothing_left(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer: .*absent: no such folder"):
        to_hf(build(tiny()), tmp_path / "absent", tmp_path / "export")


def test_token_ids_of_the_tokenizer_win_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flexbert.hf"):
        to_hf(build(tiny(pad_token_id=9, cls_token_id=1)), tokenizer_of(97), tmp_path / "export")
    assert from_hf(tmp_path / "export").config.pad_token_id == 3
    assert [record.getMessage() for record in caplog.records] == [
        "pad_token_id: 9 in the model, 3 in the tokenizer: exported as the tokenizer's"
    ]


def test_a_model_that_broke_is_not_published(tmp_path: Path) -> None:
    model = build(tiny())
    with torch.no_grad():
        model.get_parameter("encoder.layers.2.mlp.Wi.weight")[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"export's logits differ from the model's by nan: not published"):
        to_hf(model, tokenizer_of(97), tmp_path / "export")
    assert nothing_left(tmp_path)


def test_a_model_that_is_not_what_its_config_says_is_not_published(tmp_path: Path) -> None:
    model = build(tiny())
    model.head.activation = F.silu
    with pytest.raises(RunError, match=r"export's logits differ from the model's by [0-9.]+e.*: not published"):
        to_hf(model, tokenizer_of(97), tmp_path / "export")
    assert nothing_left(tmp_path)


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    """Nor is an export to which something was added, nor a model of somebody else: a fine-tuned one, a git clone."""
    for model in (build(tiny()), build(tiny(), seed=1)):
        to_hf(model, tokenizer_of(97), tmp_path / "export")
    for name, fault in (("thesis.tex", "thesis.tex is not of one"), ("parity.json", "parity.json is missing")):
        file = tmp_path / "export" / name
        if file.exists():
            file.unlink()
        else:
            file.write_text("years of work")
        before = {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}
        with pytest.raises(ConfigError, match=rf"exists and is not an export \({fault}\)"):
            to_hf(build(tiny()), tokenizer_of(97), tmp_path / "export")
        assert {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        (BERT, "BertForMaskedLM"),
        ({**BERT, "position": {"name": "learned", "offset": 4}, "head": {"name": "mlm", "dense_bias": True}}, "RobertaForMaskedLM"),
    ],
    ids=["bert", "roberta"],
)  # fmt: skip
def test_bert_and_roberta_are_exported_as_such(tmp_path: Path, changes: dict[str, Any], architecture: str) -> None:
    config = tiny(**changes, **IDS)
    model = build(config)
    to_hf(model, tokenizer_of(97), tmp_path / "export")
    exported: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "export")
    assert type(exported).__name__ == architecture
    assert not (tmp_path / "export" / "modeling_flexbert.py").exists()
    batch = batch_for(exported, ODD_LENGTHS)
    logits = model.eval()(*batch[:3]).logits
    torch.testing.assert_close(one_by_one(exported, batch), logits, atol=1e-5, rtol=0)
    again = from_hf(tmp_path / "export")
    assert again.config == config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    encoder = from_hf(tmp_path / "export", task="encoder")
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in model.encoder.state_dict().items())


@pytest.mark.slow
def test_bert_without_token_types_carries_its_code(tmp_path: Path) -> None:
    """transformers' BERT always looks a token type up, so it has no class for this one."""
    model = build(tiny(**{**BERT, **IDS, "embedding": {"name": "tokens", "token_types": 0}}))
    to_hf(model, tokenizer_of(97), tmp_path / "export")
    assert (tmp_path / "export" / "modeling_flexbert.py").is_file()


def test_separate_projections_are_exported_like_fused_ones(tmp_path: Path) -> None:
    attention = {**BERT["attention"], "fused": False}
    model = build(tiny(**{**BERT, "attention": attention})).eval()
    to_hf(model, tokenizer_of(97), tmp_path / "export")
    again = from_hf(tmp_path / "export").eval()
    assert again.config.attention.fused
    batch = batch_of((9, 30))
    torch.testing.assert_close(again(*batch[:3]).logits, model(*batch[:3]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_activation": "quick_gelu"}, "hidden_activation: 'quick_gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: False"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}}, "rope_"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_here_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf(reference_model("eager", **changes))
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
        ({"is_decoder": True}, "is_decoder: True"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_of_bert_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf(reference_model("eager", "bert", **changes))
    assert str(caught.value).startswith(field)


def test_other_architectures_and_folders_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    with pytest.raises(
        ConfigError, match="model_type: 'electra' is not known, valid names: bert, flexbert, modernbert"
    ):
        from_hf(ElectraForMaskedLM(ElectraConfig(**sizes)))
    with pytest.raises(ConfigError, match="task: 'regression': .* are for mlm, encoder, classification or tokens"):
        from_hf(reference_model("eager"), "regression")  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ConfigError, match=r"no config\.json in it"):
        from_hf(tmp_path)
    reference_model("eager").config.save_pretrained(tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: there is none, only pytorch_model\.bin: a pickle could"
    ):
        from_hf(tmp_path / "pickled")


def test_a_folder_without_a_head_is_no_masked_language_model(tmp_path: Path) -> None:
    bert = reference_model("eager", "bert")
    bert.base_model.save_pretrained(tmp_path / "encoder")
    with pytest.raises(
        ConfigError, match="cls.predictions.bias: missing in the weights: an encoder without .* task='encoder'"
    ):
        from_hf(tmp_path / "encoder")
    encoder = from_hf(tmp_path / "encoder", task="encoder").state_dict()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in from_hf(bert).encoder.state_dict().items())
    state = bert.state_dict()
    del state["bert.encoder.layer.1.output.dense.bias"]
    bert.save_pretrained(tmp_path / "torn", state_dict=state)
    with pytest.raises(ConfigError, match="bert.encoder.layer.1.output.dense.bias: missing in the weights"):
        from_hf(tmp_path / "torn")


def test_every_mapping_is_tested_here() -> None:
    assert list(MAPPINGS) == ["modernbert", "bert", "roberta"], "add parity and export tests for the new architecture"
