"""The tokenizer of an export: it knows the longest sequence, and loads in transformers 4 and 5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from flexbert import build, to_hf
from flexbert.config import PRESETS, FlexBertConfig
from flexbert.hf.tokenizer import load_tokenizer, save_tokenizer
from flexbert_core.schema import ConfigError
from tests.helpers.architectures import BERT
from tests.helpers.hf_forms import rewrite
from tests.helpers.models import tiny
from tests.helpers.presets import SIZES
from tests.helpers.tokenizer import tokenizer_of

ROBERTA = {
    **BERT,
    "embedding": {"name": "tokens", "token_types": 1},
    "position": {"name": "learned", "offset": 2},
    "head": {"name": "mlm", "dense_bias": True},
}
CONFIG = "tokenizer_config.json"


def words() -> PreTrainedTokenizerFast:
    """One that takes text apart, with token types for pairs."""
    tokenizer = tokenizer_of(97)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.mark.parametrize("changes", [{}, BERT, ROBERTA], ids=["modernbert", "bert", "roberta"])
def test_an_export_cuts_and_pads_to_the_longest_sequence(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny(**changes, max_position_embeddings=64)
    to_hf(build(config), words(), tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    model: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "export").eval()
    assert json.loads((tmp_path / "export" / CONFIG).read_text())["model_max_length"] == 64
    texts = ["word1 word2 " * 100, "word3"]
    cut = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    assert cut.input_ids.shape == (2, 64)
    assert ("token_type_ids" in cut) == (model.config.model_type == "bert")
    filled = tokenizer(texts, truncation=True, padding="max_length", return_tensors="pt")
    assert torch.equal(filled.input_ids, cut.input_ids)
    assert model(**cut).logits.shape == (2, 64, 97)
    pairs = tokenizer(
        ["word1 " * 99, "word2"], ["word3 " * 99, "word4"], truncation=True, padding=True, return_tensors="pt"
    )
    assert torch.isfinite(model(**pairs).logits).all()


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.yaml")))
def test_of_every_preset(preset: str, tmp_path: Path) -> None:
    config = FlexBertConfig.from_dict(
        FlexBertConfig.from_yaml(preset).to_dict() | SIZES | {"bos_token_id": None, "eos_token_id": None}
    )
    tokenizer = tokenizer_of(97)
    save_tokenizer(tokenizer, config, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == config.max_position_embeddings == 256
    assert tokenizer.model_max_length > 256  # the user's own stays as it is


def test_settings_of_a_call_do_not_travel_and_the_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.model_max_length = 7
    tokenizer(["word1 word2 word3"], truncation=True, max_length=2, padding="max_length")
    before = (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding, dict(tokenizer.init_kwargs))
    assert before[0] is not None
    names = list(tokenizer.model_input_names)
    save_tokenizer(tokenizer, tiny(), tmp_path)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == before[:2]
    assert (tokenizer.model_max_length, tokenizer.model_input_names, tokenizer.init_kwargs) == (7, names, before[2])
    node = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (node["truncation"], node["padding"]) == (None, None)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 256
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "word1 [MASK] word2"
    assert again(text).input_ids == tokenizer(text).input_ids


def test_a_tokenizer_of_words_in_a_file_without_tokenizer_json(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(90))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    save_tokenizer(BertTokenizer(str(tmp_path / "vocab.txt")), tiny(**BERT), tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("word1 " * 300, truncation=True).input_ids == [2, *[6] * 254, 3]


def of_transformers_5(node: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes for a tokenizer with an extra special token, and 4 cannot read."""
    kept = ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token", "model_max_length")
    return {name: node[name] for name in kept if name in node} | {
        "backend": "tokenizers",
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["word9"],
    }


def test_a_tokenizer_that_transformers_5_saved_is_read_and_exported_for_both(tmp_path: Path) -> None:
    tokenizer_of(97).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    file = tmp_path / "tokenizer" / CONFIG
    file.write_text(json.dumps(of_transformers_5(json.loads(file.read_text()))))
    loaded = load_tokenizer(str(tmp_path / "tokenizer"))
    assert (loaded.mask_token_id, loaded.pad_token_id, len(loaded)) == (4, 3, 97)
    assert 14 in loaded.all_special_ids
    to_hf(build(tiny()), tmp_path / "tokenizer", tmp_path / "export")
    node = json.loads((tmp_path / "export" / CONFIG).read_text())
    assert node["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert node["additional_special_tokens"] == ["word9"]
    assert not isinstance(node.get("extra_special_tokens"), list)
    assert 14 in AutoTokenizer.from_pretrained(tmp_path / "export").all_special_ids


@pytest.mark.parametrize("text", ["{", "[1]"], ids=str)
def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    tokenizer_of(97).save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"tokenizer: {tmp_path}: cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_a_home_folder_may_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer_of(97).save_pretrained(tmp_path / "tokenizer")
    to_hf(build(tiny()), "~/tokenizer", "~/export")
    assert (tmp_path / "export" / CONFIG).is_file()
    from flexbert import from_hf

    assert from_hf("~/export").config.vocab_size == 97


def test_a_later_generation_reads_the_words_of_the_one_before(tmp_path: Path) -> None:
    """config.json states the older fields, whichever transformers wrote it: 4 would take its defaults, silently."""
    to_hf(build(tiny()), tokenizer_of(97), tmp_path / "export")
    seen: list[dict[str, Any]] = []
    rewrite(tmp_path / "export", lambda node: (seen.append(node), node)[1])
    assert (seen[0]["global_rope_theta"], seen[0]["local_rope_theta"]) == (5000.0, 100.0)
    assert seen[0]["global_attn_every_n_layers"] == 3
