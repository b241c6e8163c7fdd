"""Exports: whole, checked by transformers, or not there."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from flexbert import build, from_hf, to_hf
from flexbert.hf_mappings import MAPPINGS
from schema import ConfigError, RunError
from tests.flexbert.conftest import ODD_LENGTHS, batch_of, tiny
from tests.flexbert.test_hf_parity import one_by_one, reference_model

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    words = [*SPECIAL.values(), *(f"word{number}" for number in range(size - 5))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


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
    assert (exported.config.global_rope_theta, exported.config.local_rope_theta) == (777.0, 100.0)
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
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not an export"):
        to_hf(build(tiny()), tokenizer_of(97), tmp_path / "export")
    assert (tmp_path / "export" / "thesis.tex").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"attention": {"out_bias": True}}, "attention.out_bias: True"),
        ({"mlp": {"name": "glu", "in_bias": True}}, "mlp.out_bias: False"),
        ({"block": {"name": "prenorm", "skip_first_attention_norm": False}}, "block.skip_first_attention_norm: False"),
        ({"mlp": {"name": "test_relu"}}, "mlp: 'test_relu'"),
    ],
    ids=str,
)
def test_what_transformers_cannot_express_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    import tests.flexbert.test_registry  # noqa: F401  registers test_relu

    with pytest.raises(ConfigError) as caught:
        to_hf(build(tiny(**changes)), tokenizer_of(97), tmp_path / "export")
    assert str(caught.value).startswith(f"{field} has no counterpart in Hugging Face's ModernBERT")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation: 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: False"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling: {"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_here_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf(reference_model("eager", **changes))
    assert str(caught.value).startswith(field)


def test_other_architectures_and_folders_are_refused(tmp_path: Path) -> None:
    bert = BertForMaskedLM(
        BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(ConfigError, match="model_type: 'bert' is not known, valid names: modernbert"):
        from_hf(bert)
    with pytest.raises(ConfigError, match=r"no config\.json in it"):
        from_hf(tmp_path)
    reference_model("eager").save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        from_hf(tmp_path / "pickled")


def test_every_mapping_is_tested_here() -> None:
    assert list(MAPPINGS) == ["modernbert"], "add parity and export tests for the new architecture"
