"""ModernBERT of transformers, with random weights, is the reference for logits and for every gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertForMaskedLM

from flexbert import FlexBertConfig, FlexBertForMaskedLM, build, from_hf
from flexbert.hf_mappings import MAPPINGS, hf_name
from tests.flexbert.conftest import ODD_LENGTHS, Batch, batch_of, gradients

# Measured worst case over all cases here: 3.1e-6 on logits up to 6.2, 1.2e-7 on gradients up to 0.15.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-6


def reference_model(attn_implementation: str, **changes: Any) -> ModernBertForMaskedLM:
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 256,
        "global_rope_theta": 5000.0,
        "local_rope_theta": 100.0,
        "pad_token_id": 96,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "initializer_range": 0.2,
        "reference_compile": False,
        **changes,
    }
    torch.manual_seed(0)
    model = ModernBertForMaskedLM._from_config(ModernBertConfig(**fields), attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # ones and zeros would hide a norm or bias that is left out
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def one_by_one(model: nn.Module, batch: Batch) -> Tensor:
    return torch.cat([model(input_ids=ids[None]).logits[0] for ids in batch.split()])


def padded(model: nn.Module, batch: Batch) -> Tensor:
    ids = nn.utils.rnn.pad_sequence(batch.split(), batch_first=True, padding_value=96)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in batch.split()], batch_first=True)
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def check(reference: ModernBertForMaskedLM, model: FlexBertForMaskedLM, batch: Batch, logits: Tensor) -> None:
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
    for name, gradient in gradients(model).items():
        other = theirs.pop(hf_name(MAPPINGS["modernbert"], name))
        torch.testing.assert_close(
            gradient, other, atol=GRADIENT_TOLERANCE, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert not theirs


# 96 is padding for the reference, which keeps its row's gradient at zero, so the batches do not contain it.
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", [one_by_one, padded])
def test_logits_and_gradients_equal_transformers(attn_implementation: str, layout: Any) -> None:
    reference = reference_model(attn_implementation)
    batch = batch_of(ODD_LENGTHS, vocab_size=96)
    check(reference, from_hf(reference), batch, layout(reference, batch))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True},
        {"decoder_bias": False},
        {"hidden_activation": "silu", "classifier_activation": "silu"},
        {"local_attention": 8, "global_attn_every_n_layers": 2},
        {"global_attn_every_n_layers": 1, "local_rope_theta": None},
        {"norm_eps": 1e-2},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_every_option_of_transformers_that_is_accepted_means_the_same(changes: dict[str, Any]) -> None:
    reference = reference_model("sdpa", **changes)
    batch = batch_of((9, 65, 130), vocab_size=96)
    check(reference, from_hf(reference), batch, one_by_one(reference, batch))


def test_encode_equals_transformers_hidden_states() -> None:
    reference = reference_model("sdpa")
    model = from_hf(reference).eval()
    ids = torch.randint(0, 96, (3, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(90) < torch.tensor([[90], [1], [70]])
    ours = model.encode(ids, mask)
    theirs = reference.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours[mask], theirs[mask], atol=TOLERANCE, rtol=0)
    assert not ours[~mask].any()


SIZES = [("modernbert-base", 149_655_232), ("modernbert-large", 395_881_664)]


@pytest.mark.parametrize(("preset", "parameters"), SIZES)
def test_presets_have_the_released_sizes(preset: str, parameters: int) -> None:
    config = FlexBertConfig.from_yaml(preset)
    fields = MAPPINGS["modernbert"].config_to(config)
    with torch.device("meta"):
        ours, theirs = build(config), ModernBertForMaskedLM(ModernBertConfig(**fields))
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) == parameters
    shapes = {hf_name(MAPPINGS["modernbert"], name): tensor.shape for name, tensor in ours.state_dict().items()}
    tied = {"decoder.weight"}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items() if name not in tied}


def test_base_preset_is_what_transformers_calls_its_default() -> None:
    config = FlexBertConfig.from_yaml("modernbert-base")
    default = ModernBertConfig()  # documented as ModernBERT-base
    for name, value in MAPPINGS["modernbert"].config_to(config).items():
        assert getattr(default, name) == value, name
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        assert getattr(default, name) == getattr(config, name), name
