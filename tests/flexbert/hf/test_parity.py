"""Models of transformers, with random weights, are the reference for logits and for every gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbert import FlexBertConfig, FlexBertForMaskedLM, build, from_hf
from flexbert.hf.mappings import MAPPINGS
from flexbert.hf.state import hf_names
from tests.helpers.hf_forms import older
from tests.helpers.hf_models import CLASSES, TOLERANCE, batch_for, one_by_one, reference_model
from tests.helpers.models import ODD_LENGTHS, Batch, gradients
from tests.helpers.presets import RELEASED

GRADIENT_TOLERANCE = 1e-6


def padded(model: Any, batch: Batch) -> Tensor:
    pad = model.config.pad_token_id
    ids = nn.utils.rnn.pad_sequence(batch.split(), batch_first=True, padding_value=pad)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in batch.split()], batch_first=True)
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def check(reference: Any, model: FlexBertForMaskedLM, batch: Batch, logits: Tensor) -> None:
    output = model(*batch)
    ours = model(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
    assert logits.abs().max() > 1, "the comparison would be of nothing"
    torch.testing.assert_close(ours.logits, logits, atol=TOLERANCE, rtol=0)
    loss = F.cross_entropy(logits, batch.labels)
    torch.testing.assert_close(output.loss, loss, atol=TOLERANCE, rtol=0)
    loss.backward()
    assert output.loss is not None
    output.loss.backward()
    theirs = gradients(reference)
    mapping = MAPPINGS[reference.config.model_type]
    for name, gradient in gradients(model).items():
        other = torch.cat([theirs.pop(part) for part in hf_names(mapping, name)])
        torch.testing.assert_close(
            gradient, other, atol=GRADIENT_TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert not theirs


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", [one_by_one, padded])
@pytest.mark.parametrize("model_type", CLASSES)
def test_logits_and_gradients_equal_transformers(model_type: str, attn_implementation: str, layout: Any) -> None:
    reference = reference_model(attn_implementation, model_type)
    batch = batch_for(reference, ODD_LENGTHS)
    check(reference, from_hf(reference).eval(), batch, layout(reference, batch))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}),
    ("modernbert", {"decoder_bias": False}),
    ("modernbert", {"hidden_activation": "silu", "classifier_activation": "silu"}),
    ("modernbert", {"hidden_activation": "gelu_pytorch_tanh", "classifier_activation": "relu"}),
    ("modernbert", {"local_attention": 8, "global_attn_every_n_layers": 2}),
    ("modernbert", {"global_attn_every_n_layers": 1, "local_rope_theta": None}),
    ("modernbert", {"norm_eps": 1e-2}),
    ("bert", {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    ("bert", {"layer_norm_eps": 1e-2, "hidden_act": "relu"}),
    ("roberta", {"pad_token_id": 0, "type_vocab_size": 2}),
    ("roberta", {"hidden_act": "silu"}),
]


@pytest.mark.parametrize(("model_type", "changes"), OPTIONS, ids=str)
def test_every_option_of_transformers_that_is_accepted_means_the_same(model_type: str, changes: dict[str, Any]) -> None:
    reference = reference_model("sdpa", model_type, **changes)
    batch = batch_for(reference, (9, 65, 130))
    check(reference, from_hf(reference).eval(), batch, one_by_one(reference, batch))


def test_token_types_equal_transformers_packed_and_padded() -> None:
    reference = reference_model("sdpa", "bert")
    model = from_hf(reference).eval()
    batch = batch_for(reference, (9, 65, 1))
    types = torch.randint(0, 2, batch.input_ids.shape, generator=torch.Generator().manual_seed(3))
    pairs = zip(batch.split(), types.split((9, 65, 1)), strict=True)
    theirs = torch.cat([reference(input_ids=ids[None], token_type_ids=t[None]).logits[0] for ids, t in pairs])
    torch.testing.assert_close(model(*batch[:3], token_type_ids=types).logits, theirs, atol=TOLERANCE, rtol=0)
    plain = model(*batch[:3]).logits
    assert plain is not None
    assert not torch.allclose(plain, theirs, atol=0.1), "token types did nothing"
    assert torch.equal(model(*batch[:3], token_type_ids=torch.zeros_like(types)).logits, plain)
    ids, mask = batch.input_ids[9:74].view(5, 13), torch.arange(13) < torch.tensor([[13], [4], [1], [9], [0]])
    states = model.encode(ids, mask, token_type_ids=types[9:74].view(5, 13))
    expected = reference.base_model(ids[:4], mask[:4].long(), types[9:61].view(4, 13)).last_hidden_state
    torch.testing.assert_close(states[:4][mask[:4]], expected[mask[:4]], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("task", ["mlm", "encoder"])
def test_encode_equals_transformers_hidden_states(model_type: str, task: Any) -> None:
    reference = reference_model("sdpa", model_type)
    model = from_hf(reference, task).eval()
    mask = torch.arange(90) < torch.tensor([[90], [1], [70]])
    ids = torch.randint(3, 96, (3, 90), generator=torch.Generator().manual_seed(1))
    ids = torch.where(mask, ids, reference.config.pad_token_id)
    ours = model.encode(ids, mask)
    theirs = reference.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours[mask], theirs[mask], atol=TOLERANCE, rtol=0)
    assert not ours[~mask].any()
    weights = torch.randn(3, 90, 48, generator=torch.Generator().manual_seed(2)) / mask.sum()  # a mean over tokens
    (ours * weights)[mask].sum().backward()
    (theirs * weights)[mask].sum().backward()
    for name, parameter in (model.encoder if task == "mlm" else model).named_parameters():
        names = hf_names(MAPPINGS[model_type], f"encoder.{name}")
        expected = torch.cat([reference.get_parameter(part).grad for part in names])
        torch.testing.assert_close(
            parameter.grad, expected, atol=GRADIENT_TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(("preset", "model_type", "parameters"), RELEASED)
def test_presets_have_the_released_sizes(preset: str, model_type: str, parameters: int) -> None:
    config = FlexBertConfig.from_yaml(preset)
    config_class, model_class = CLASSES[model_type]
    fields = {**MAPPINGS[model_type].config_to(config), "pad_token_id": config.pad_token_id}
    with torch.device("meta"):
        ours, theirs = build(config), model_class(config_class(**fields))
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) == parameters
    shapes: dict[str, Any] = {}
    for name, tensor in ours.state_dict().items():
        parts = hf_names(MAPPINGS[model_type], name)
        shapes |= {part: chunk.shape for part, chunk in zip(parts, tensor.chunk(len(parts)), strict=True)}
    tied = {"decoder.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    tied |= {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items() if name not in tied}


@pytest.mark.parametrize(("preset", "model_type"), [("modernbert-base", "modernbert"), ("bert-base", "bert")])
def test_base_presets_are_what_transformers_calls_its_default(preset: str, model_type: str) -> None:
    config = FlexBertConfig.from_yaml(preset)
    default = CLASSES[model_type][0]()  # documented as ModernBERT-base and bert-base-uncased
    said = older(default.to_dict())
    for name, value in MAPPINGS[model_type].config_to(config).items():
        assert said[name] == value, name
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if (stated := getattr(default, name, None)) is not None:
            assert stated == getattr(config, name), name
