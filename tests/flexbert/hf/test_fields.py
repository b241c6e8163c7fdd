"""Configs of transformers, field by field: mapped with the same meaning, without effect, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert import FlexBertConfig, FlexBertForMaskedLM, from_hf
from flexbert.hf.fields import IRRELEVANT, Fields
from flexbert.hf.mappings import config_of
from flexbert_core.schema import ConfigError
from tests.helpers.hf_forms import kinds, newer, older, rewrite
from tests.helpers.hf_models import CLASSES, FIELDS, SIZES, TOLERANCE, batch_for, one_by_one, reference_model
from tests.helpers.models import batch_of

FULL, SLIDING = "full_attention", "sliding_attention"


def parameters(full: Any, sliding: Any) -> dict[str, Any]:
    return {"rope_parameters": {FULL: full, SLIDING: sliding}}


def logits(model: FlexBertForMaskedLM, lengths: tuple[int, ...] = (9, 65, 130)) -> Tensor:
    batch = batch_of(lengths, vocab_size=96)
    found = model.eval()(batch.input_ids.clamp(5), *batch[1:3]).logits
    assert found is not None
    return found


@pytest.mark.parametrize("form", [newer, older, lambda node: older(node) | newer(node)], ids=["5", "4", "both"])
@pytest.mark.parametrize(("period", "theta"), [(2, 10000.0), (3, 777.0), (1, 160000.0), (4, 5000.0)])
def test_both_generations_words_for_modernbert_mean_the_same(
    tmp_path: Path, form: Any, period: int, theta: float
) -> None:
    changes = {"global_attn_every_n_layers": period, "global_rope_theta": theta, "local_rope_theta": 300.0}
    reference = reference_model("eager", local_attention=16, **changes)
    reference.save_pretrained(tmp_path)
    rewrite(tmp_path, form)
    model = from_hf(tmp_path).eval()
    batch = batch_for(reference, (9, 65, 130))
    theirs = one_by_one(reference, batch)
    torch.testing.assert_close(model(*batch[:3]).logits, theirs, atol=TOLERANCE, rtol=0)
    assert model.config.attention.global_attn_every_n_layers == period
    assert (model.config.position.global_theta, model.config.position.local_theta) == (theta, 300.0)


@pytest.mark.parametrize(
    ("stated", "as_before"),
    [
        ({"layer_types": kinds(4, 2)}, {"global_attn_every_n_layers": 2}),
        (parameters({"rope_theta": 50.0}, None), {"global_rope_theta": 50.0}),
        (parameters({"rope_type": "default"}, {"type": "default", "rope_theta": 7.0}), {"local_rope_theta": 7.0}),
        ({"rope_parameters": {}}, {}),
        (parameters({"rope_theta": 5.0}, {"rope_theta": None}), {"global_rope_theta": 5.0, "local_rope_theta": 5.0}),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_newer_config_leaves_out_is_the_default(
    tmp_path: Path, stated: dict[str, Any], as_before: dict[str, Any]
) -> None:
    """160000, 10000 and every third layer, in both generations."""
    reference_model("eager").save_pretrained(tmp_path)
    bare = {**dict.fromkeys(("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"), ...)}
    rewrite(tmp_path, lambda node: older(node) | bare | stated)
    found = from_hf(tmp_path)
    thetas = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3} | as_before
    rewrite(tmp_path, lambda node: {**node, "rope_parameters": ..., "layer_types": ..., **thetas})
    expected = from_hf(tmp_path)
    assert found.config == expected.config
    assert expected.config.position.global_theta == thetas["global_rope_theta"]
    assert expected.config.attention.global_attn_every_n_layers == thetas["global_attn_every_n_layers"]


def test_linear_scaling_of_both_kinds_of_layers_divides_their_frequencies(tmp_path: Path) -> None:
    """transformers 4 has no such ModernBERT: its frequencies are divided here."""
    reference = reference_model("eager", local_attention=16, **(LINEAR if torch_has_newer() else {}))
    reference.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda node: newer(node) | LINEAR)
    model = from_hf(tmp_path).eval()
    assert (model.config.position.scaling, model.config.position.scaling_factor) == ("linear", 4.0)
    if not torch_has_newer():
        for layer in reference.model.layers:
            layer.attn.rotary_emb.inv_freq /= 4.0
    batch = batch_for(reference, (9, 130))
    theirs = one_by_one(reference, batch)
    torch.testing.assert_close(model(*batch[:3]).logits, theirs, atol=TOLERANCE, rtol=0)


LINEAR = parameters(
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
)


def torch_has_newer() -> bool:
    """Whether the transformers here is the fifth."""
    return "layer_types" in CLASSES["modernbert"][0]().to_dict()


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0, "original_max_position_embeddings": 128}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("modernbert", {"layer_types": [SLIDING] * 3 + [FULL]}, "layer_types: "),
    ("modernbert", {"layer_types": [FULL, SLIDING, FULL, FULL]}, "layer_types: "),
    ("modernbert", {"layer_types": [SLIDING] * 4}, "layer_types: "),
    ("modernbert", {"layer_types": kinds(3, 2)}, "layer_types: "),
    ("modernbert", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types: "),
    ("modernbert", {"layer_types": "full_attention"}, "layer_types: "),
    ("modernbert", parameters(YARN, PLAIN), "rope_parameters.full_attention: "),
    ("modernbert", parameters(PLAIN, {**YARN, "rope_type": "dynamic"}), "rope_parameters.sliding_attention: "),
    ("modernbert", parameters({**PLAIN, "rope_type": "linear", "factor": 2.0}, PLAIN), "rope_parameters: "),
    ("modernbert", parameters({**PLAIN, "rope_type": "linear"}, PLAIN), "rope_parameters.full_attention.factor: None"),
    ("modernbert", parameters({**PLAIN, "partial_rotary_factor": 0.5}, PLAIN), "rope_parameters.full_attention: "),
    ("modernbert", parameters({"rope_theta": "x"}, PLAIN), "rope_parameters.full_attention.rope_theta: 'x'"),
    ("modernbert", parameters({"rope_theta": None}, PLAIN), "global_rope_theta: None"),
    ("modernbert", {"rope_parameters": PLAIN}, "rope_parameters: "),
    ("modernbert", {"rope_parameters": [1]}, "rope_parameters: "),
    ("modernbert", parameters(5, PLAIN), "rope_parameters.full_attention: "),
    ("modernbert", {"global_rope_theta": 1.0} | parameters(PLAIN, PLAIN), "global_rope_theta: 1.0 contradicts"),
    ("modernbert", {"local_rope_theta": None} | parameters({"rope_theta": 9.0}, PLAIN), "local_rope_theta: None contr"),
    ("modernbert", {"global_attn_every_n_layers": 3, "layer_types": kinds(4, 2)}, "global_attn_every_n_layers: 3 con"),
    ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling: "),
    ("modernbert", {"rope_theta": 3.0}, "rope_theta: 3.0"),
    ("modernbert", {"sliding_window": 5}, "sliding_window: 5"),
    ("modernbert", {"head_dim": 24}, "head_dim: 24"),
    ("modernbert", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    ("modernbert", {"initializer_cutoff_factor": 0.0}, "config.json: init.cutoff_factor: "),
    ("modernbert", {"attn_logit_softcap": 30.0}, "attn_logit_softcap: 30.0 of the Hugging Face config is not known for m"),
    ("bert", {"attn_logit_softcap": 30.0}, "attn_logit_softcap: 30.0 of the Hugging Face config is not known for bert"),
    ("bert", {"glyph_embedding_dim": 1728}, "glyph_embedding_dim: 1728"),
    ("bert", {"embedding_size": 128}, "embedding_size: 128"),
    ("roberta", {"norm_type": "rmsnorm"}, "norm_type: 'rmsnorm'"),
    ("bert", {"position_embedding_type": "relative_key_query"}, "position_embedding_type: 'relative_key_query'"),
    ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
    ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings: False"),
    ("bert", {"add_cross_attention": True}, "add_cross_attention: True"),
    ("roberta", {"is_decoder": True}, "is_decoder: True"),
    ("bert", {"is_encoder_decoder": True}, "is_encoder_decoder: True"),
    ("bert", {"cross_attention_hidden_size": 48}, "cross_attention_hidden_size: 48"),
    ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads: {'0': [1]}"),
    ("modernbert", {"per_layer_config": {"1": {"hidden_size": 16}}}, "per_layer_config: {"),
    ("bert", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config: {"),
    ("bert", {"architectures": ["JinaBertForMaskedLM"]}, "architectures: 'JinaBertForMaskedLM' is no class of"),
    ("bert", {"architectures": ["RobertaForMaskedLM"]}, "architectures: 'RobertaForMaskedLM' is no class of"),
    ("bert", {"architectures": 7}, "architectures: "),
    ("bert", {"auto_map": {"AutoModel": "modeling_bert.BertModel"}}, "auto_map: AutoModel is code of the folder"),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each architecture, without the fields that the other generation has renamed."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in CLASSES:
        reference_model("eager", kind).save_pretrained(folder / kind)
        bare = dict.fromkeys(("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"), ...)
        rewrite(folder / kind, lambda node, bare=bare: older(node) | bare)
    return folder


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=[f"{k}-{c}"[:70] for k, c, _ in REFUSED])
def test_a_field_without_a_counterpart_is_refused_by_name(
    saved: Path, tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    node = json.loads((saved / kind / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(node | changes))
    with pytest.raises(ConfigError) as caught:  # before any weights are read: there are none
        from_hf(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_that_transformers_writes_is_used_or_known(kind: str) -> None:
    """A field with a value that makes no sense is refused by its name, or is on the list of those without effect."""
    stated = CLASSES[kind][0](**SIZES | FIELDS[kind]).to_dict() | {"model_type": kind}
    FlexBertConfig.from_dict(config_of(Fields(kind, stated)))
    for name in sorted(stated.keys() - IRRELEVANT[kind]):
        with pytest.raises(ConfigError, match=rf"\b{name}: "):
            FlexBertConfig.from_dict(config_of(Fields(kind, {**stated, name: "???"})))


WITHOUT_EFFECT: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"classifier_dropout": 0.3, "chunk_size_feed_forward": 13, "use_cache": False, "num_labels": 5}),
    ("bert", {"problem_type": "regression", "id2label": {0: "a"}, "label2id": {"a": 0}, "use_bfloat16": True}),
    ("roberta", {"classifier_dropout": 0.3, "gradient_checkpointing": False, "tie_encoder_decoder": True}),
    ("modernbert", {"sparse_prediction": True, "sparse_pred_ignore_index": 0, "classifier_pooling": "mean"}),
    ("modernbert", {"deterministic_flash_attn": True, "classifier_dropout": 0.4, "layer_norm_eps": 0.5}),
    ("modernbert", {"position_embedding_type": "absolute", "repad_logits_with_grad": True}),
    ("modernbert", {"local_attention": 17}),
    ("bert", {"attn_logit_softcap": None, "some_fork_has": False, "adapters": {}}),
    ("bert", {"directionality": "bidi", "pooler_fc_size": 768, "pooler_type": "first_token_transform"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes"), WITHOUT_EFFECT, ids=str)
def test_fields_on_the_list_have_no_effect_in_transformers_either(kind: str, changes: dict[str, Any]) -> None:
    plain = {"local_attention": 16} if "local_attention" in changes else {}
    reference, changed = reference_model("eager", kind, **plain), reference_model("eager", kind, **changes)
    changed.load_state_dict(reference.state_dict())
    batch = batch_for(reference, (26, 65))
    theirs = one_by_one(changed, batch)
    assert torch.equal(one_by_one(reference, batch), theirs)
    torch.testing.assert_close(from_hf(changed).eval()(*batch[:3]).logits, theirs, atol=TOLERANCE, rtol=0)


def test_a_model_that_an_older_transformers_misread_is_refused(saved: Path, tmp_path: Path) -> None:
    """transformers 4 takes its default thetas for a folder of transformers 5: the two say different models."""
    node = json.loads((saved / "modernbert" / "config.json").read_text()) | parameters({"rope_theta": 7.0}, PLAIN)
    model = reference_model("eager")
    model.config.rope_parameters = node["rope_parameters"]
    if not torch_has_newer():
        with pytest.raises(
            ConfigError, match=r"^global_rope_theta: 5000\.0 contradicts rope_parameters\.full_attention"
        ):
            from_hf(model)
